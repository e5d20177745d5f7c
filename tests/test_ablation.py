"""The study on digits: its rivals score what they say, its tables judge as they say."""

import importlib
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import vitslim
from vitslim.plan import BlockPlan, Plan

ROOT = Path(__file__).parent.parent
TINY = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}


@pytest.fixture
def ablation(monkeypatch):
    """Imports a module of the study by name."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.ablation.{name}")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def batch(model):
    return torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)


def without(kind, unit):
    """A plan that cuts one unit of the first block: (head, dimension), or a hidden unit."""
    whole = BlockPlan([list(range(8))] * 2, list(range(64)))
    heads = [[d for d in range(8) if kind != "attention" or (h, d) != unit] for h in range(2)]
    hidden = [u for u in range(64) if kind != "mlp" or (u,) != unit]
    return Plan({}, {}, {}, 1, [BlockPlan(heads, hidden), whole])


def squares(model):
    return sum(parameter.square().sum() for parameter in model.parameters())


UNITS = pytest.mark.parametrize("kind, unit", [("attention", (1, 3)), ("mlp", (5,))])


@UNITS
def test_magnitude_is_the_norm_of_what_a_cut_removes(model, kind, unit):
    score = getattr(vitslim.importance(model, criterion="magnitude"), kind)[0][unit]
    removed = squares(model) - squares(vitslim.slim(model, without(kind, unit)))
    assert_close(score.square(), removed, check_dtype=False, rtol=1e-5, atol=0)


@pytest.fixture
def searched(model):
    masked = vitslim.mask(model.float(), kinds=("attention", "mlp"))
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if name.endswith(".mask"):
                # The second layer scores higher throughout, and would keep more.
                parameter.uniform_(*((0, 0.6) if name.startswith("blocks.0") else (0.4, 1)))
    return masked


def planned(masked, masks):
    return vitslim.threshold(masked, "attention=0.5,mlp=0.5", masks=masks, round_to=1).blocks


def test_even_layers_keep_equal_numbers_and_the_best_of_each(ablation, searched):
    masks = vitslim.Masks.of(searched)
    blocks = planned(searched, ablation("criteria").even_layers(masks, 0))
    for block, scores in zip(blocks, masks.mlp, strict=True):
        assert block.hidden == sorted(scores.topk(32).indices.tolist())
        assert sum(map(len, block.heads)) == 8
    assert len({len(block.hidden) for block in planned(searched, masks)}) == 2


def test_random_units_keep_the_widths_and_not_the_units(ablation, searched):
    masks = vitslim.Masks.of(searched)
    plan, drawn = (
        planned(searched, each) for each in (masks, ablation("criteria").random_units(masks, 0))
    )
    for block, other in zip(plan, drawn, strict=True):
        assert [len(head) for head in block.heads] == [len(head) for head in other.heads]
        assert len(block.hidden) == len(other.hidden)
        assert block.hidden != other.hidden


@UNITS
def test_taylor_is_how_the_loss_changes_as_a_unit_fades(ablation, model, batch, kind, unit):
    score = getattr(ablation("criteria").taylor(model, [batch]), kind)[0][unit]
    first = model.blocks[0]
    if kind == "attention":
        row = unit[0] * 8 + unit[1]
        rows = [row, row + 16, row + 32]
        fading = [(first.attn.qkv.weight, (rows,)), (first.attn.qkv.bias, (rows,))]
        fading.append((first.attn.proj.weight, (slice(None), [row])))
    else:
        fading = [(first.mlp.fc1.weight, unit), (first.mlp.fc1.bias, unit)]
        fading.append((first.mlp.fc2.weight, (slice(None), *unit)))
    losses = []
    with torch.no_grad():
        for factor in (1 + 1e-5, 1 - 1e-5):
            before = [parameter[where].clone() for parameter, where in fading]
            for parameter, where in fading:
                parameter[where] = parameter[where] * factor
            losses.append(F.cross_entropy(model(batch[0]), batch[1]))
            for (parameter, where), values in zip(fading, before, strict=True):
                parameter[where] = values
    assert_close(score, ((losses[0] - losses[1]) / 2e-5).abs(), rtol=1e-5, atol=1e-8)


def test_taylor_averages_the_absolute_values_of_batches(ablation, model, batch):
    taylor = ablation("criteria").taylor
    halves = [(batch[0][:2], batch[1][:2]), (batch[0][2:], batch[1][2:])]
    both = taylor(model, halves)
    each = [taylor(model, [half]) for half in halves]
    assert_close(both.mlp[1], (each[0].mlp[1] + each[1].mlp[1]) / 2)
    assert_close(both.attention[1], (each[0].attention[1] + each[1].attention[1]) / 2)
    assert min(both.mlp[1].min(), both.attention[1].min()) >= 0


def test_random_scores_depend_on_the_seed_alone_and_make_a_plan(model):
    one, same, other = (
        vitslim.importance(model, criterion="random", seed=seed) for seed in (1, 1, 2)
    )
    assert_close(one.attention, same.attention, rtol=0, atol=0)
    assert not torch.equal(one.mlp[0], other.mlp[0])
    assert not torch.equal(one.mlp[0], one.mlp[1])
    plan = vitslim.threshold(model, {"macs": "40%"}, masks=one, round_to=1)
    assert plan.blocks[0].tokens is None
    assert 0.38 < plan.reached["macs"] / vitslim.cost(model).macs <= 0.4


def test_torch_pruning_fills_the_budget_with_heads_of_one_width(ablation, model, batch):
    pytest.importorskip("torch_pruning")
    dense = vitslim.cost(model).macs
    pruned = ablation("uniform").prune(model.float(), 0.5 * dense, [_single(batch)])
    assert 0.45 < vitslim.cost(pruned).macs / dense <= 0.5
    shapes = {(b.attn.num_heads, b.attn.head_dim, b.mlp.fc1.out_features) for b in pruned.blocks}
    assert len(shapes) == 1
    with FlopCounterMode(display=False) as counter:
        pruned(_single(batch)[0][:1])
    assert counter.get_total_flops() == 2 * vitslim.cost(pruned).macs


def _single(batch):
    return batch[0].float(), batch[1]


def test_pairs_take_the_noise_of_seeds_away(ablation):
    spread = ablation("spread")
    reference = {0: 1.0, 1: 5.0, 2: 3.0}
    shifted = {2: 2.9, 1: 4.91, 0: 0.89}
    difference = spread.paired(shifted, reference)
    assert difference.verdict == spread.BETTER
    assert_close(difference.mean, -0.1)
    # 4.303 is Student's quantile for two degrees of freedom.
    assert_close(difference.half, 4.3026527 * 0.01 / 3**0.5)


@pytest.mark.parametrize(
    "values, said",
    [
        ([0.1, 0.1, 0.1], "worse"),
        ([-0.1, -0.1, -0.1], "better"),
        ([0.1, -0.1, 0.2], "no difference"),
        ([0.0, 0.0, 0.0], "no difference"),
        ([0.1], "no difference"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(ablation, values, said):
    spread = ablation("spread")
    seeds = dict(enumerate(values))
    assert spread.paired(seeds, dict.fromkeys(seeds, 0.0)).verdict == said


def losses_of(name, way, budget):
    """Invented losses: proximal is better at 15% alone, random is bad, magnitude is good after."""
    losses = {
        "proximal step": 0.4 if budget == "15%" else 0.5,
        "random": 0.9,
        "magnitude": 0.3 if way == "after" else 0.7,
        "tokens too": 0.8,
        "token gate on keys": 0.8,
    }
    return losses.get(name, 0.5)


@pytest.fixture
def results(ablation, tmp_path):
    """A study with invented figures, gathered from its folder."""
    study = ablation("study")
    plan = study.phases(range(3), ("30%", "15%"))
    for cell in (cell for phase in plan for cell in phase):
        facts, path = cell.facts, cell.path(tmp_path)
        loss = losses_of(facts["name"], facts.get("way"), facts.get("budget"))
        loss += 0.01 * facts["seed"]
        scores = {"accuracy": 100 * (1 - loss), "cross_entropy": loss}
        found = {"cut": scores, "retrained": scores, "attention": [3, 4], "hidden": [5, 6]}
        if cell.table == "models":
            found = {"masked": scores, "zero": 0.25}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"table": cell.table, **facts, **found}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    study.run(plan, tmp_path, jobs=1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(before) == sum(len(phase) for phase in plan), "two cells share a file"
    return study.gather(plan, tmp_path)


def test_tables_judge_every_setting_by_its_own_reference(ablation, results):
    text = "\n".join(ablation("tables").sections(results))
    said = {line[4:].partition("**")[0]: line for line in text.splitlines() if line[:4] == "- **"}
    assert len(said) == 11
    assert "no difference at 30%; better at 15% (-0.100" in said["proximal step"]
    # The tokens cost 0.3 against the paper's widths, and the keys nothing against the tokens.
    assert "no difference at 30%; no difference at 15%." in said["token gate on keys"]
    assert (
        "| (a) proximal step | 59.0 ± 1.0 | 59.0 ± 1.0 | 0.410 ± 0.010 | -0.100 ± 0.000 |" in text
    )


def test_a_rival_is_judged_in_its_better_way_and_on_our_schedule(ablation, results):
    lines = "\n".join(ablation("tables").sections(results)).splitlines()
    better, own = (line for line in lines if line.startswith("- At 30%"))
    same = "to Taylor, Torch-Pruning, vitslim.compress"
    assert f"wins against random; shows no difference {same}, from scr" in better
    assert better.endswith("loses against magnitude.")
    assert own.endswith(f"{same}; loses against magnitude.")
    assert "| random, cut at once, retrained longer | 3 / 5 | 4 / 6 |" in lines


def test_the_picture_is_drawn_and_small(ablation, results):
    picture = ablation("tables").picture(results["cells"])
    assert picture.startswith(b"\x89PNG")
    assert 10_000 < len(picture) < 300_000


def test_a_folder_of_another_recipe_is_refused(ablation, tmp_path, monkeypatch):
    study = ablation("study")
    study.claim(tmp_path)
    study.claim(tmp_path)
    monkeypatch.setitem(study.EPOCHS, "search", 1)
    with pytest.raises(vitslim.VitslimError, match="another recipe"):
        study.claim(tmp_path)


def test_cells_go_from_dense_to_retrained(ablation, tmp_path, monkeypatch):
    recipe, study = ablation("recipe"), ablation("study")
    for stage in recipe.EPOCHS:
        monkeypatch.setitem(recipe.EPOCHS, stage, 1)
    for name in ("embed_dim", "depth", "num_heads"):
        monkeypatch.setitem(recipe.MODEL, name, TINY[name])
    monkeypatch.setitem(recipe.COMMON, "batch_size", 512)
    plan = study.phases([0], ["50%"])
    wanted = {"dense", "paper", "from scratch"}
    chosen = [cell for phase in plan for cell in phase if cell.facts["name"] in wanted]
    for cell in chosen:
        study.make(cell, tmp_path)
    found = study.gather([chosen], tmp_path)["cells"]
    paper, same, every = (cell for cell in found if cell.get("budget"))
    dense = vitslim.cost(vitslim.load(tmp_path / "models/dense-0")).macs
    for cell in (paper, same, every):
        assert 0.47 < cell["macs"] / dense <= 0.5
        assert cell["hidden"] == paper["hidden"]
    assert same["cut"] == every["cut"] != paper["cut"]
    assert same["retrained"] != every["retrained"]
