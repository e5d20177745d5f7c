"""Budgets: exact counts, ties, rules, floors, rounding, and what is out of reach."""

import time

import pytest
import timm
import torch

import vitslim
from vitslim.cost import Geometry
from vitslim.masks import Masks, mask_parameters
from vitslim.planning.ranking import Ranking
from vitslim.planning.threshold import budget_name, parse_budget, threshold


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = vitslim.mask(timm.create_model("deit_tiny_patch16_224"))
    for _, parameter in mask_parameters(model):
        torch.nn.init.uniform_(parameter)
    return model


def small(granularity="head_dim", kinds=("attention", "mlp", "token")):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=24, num_heads=3
    )
    masked = vitslim.mask(model, granularity=granularity, kinds=kinds)
    for _, parameter in mask_parameters(masked):
        torch.nn.init.uniform_(parameter)
    return masked


def kept(plan):
    return {
        "attention": sum(sum(block.head_dims) for block in plan.blocks),
        "mlp": sum(len(block.hidden) for block in plan.blocks),
        "token": sum(len(block.tokens) for block in plan.blocks),
    }


@pytest.mark.parametrize("fraction", [0.1, 0.37, 0.5, 0.77, 0.999, 1.0])
def test_exactly_the_fraction_stays(tiny, fraction):
    budget = dict.fromkeys(("attention", "mlp", "token"), fraction)
    counts = kept(threshold(tiny, budget, round_to=1))
    assert counts == {
        "attention": round(fraction * 12 * 192),
        "mlp": round(fraction * 12 * 768),
        "token": round(fraction * 12 * 196),
    }


def test_the_largest_scores_stay_over_all_layers(tiny):
    masks = Masks.of(tiny)
    plan = threshold(tiny, {"mlp": 0.4}, round_to=1)
    flat = torch.cat(masks.mlp)
    best = set(flat.abs().topk(round(0.4 * len(flat))).indices.tolist())
    assert {i * 768 + u for i, block in enumerate(plan.blocks) for u in block.hidden} == best


def test_ties_go_by_index():
    model = small()
    for _, parameter in mask_parameters(model):
        torch.nn.init.constant_(parameter, 0.5)
    plan = threshold(model, {"attention": 0.5, "mlp": 0.5}, round_to=1, floor=0)
    assert [block.head_dims for block in plan.blocks] == [[8, 8, 8], [8, 4, 0], [0, 0, 0]]
    assert [len(block.hidden) for block in plan.blocks] == [96, 48, 0]
    assert plan.blocks[1].heads[1] == [0, 1, 2, 3]


def test_floors_keep_every_layer_alive():
    model = small()
    for name, parameter in mask_parameters(model):
        torch.nn.init.constant_(parameter, 1e-6 if "blocks.1." in name else 1.0)
    plan = threshold(model, {"attention": 0.5, "mlp": 0.5, "token": 0.5}, round_to=1, floor=2)
    assert sum(plan.blocks[1].head_dims) == len(plan.blocks[1].hidden) == 2
    assert len(plan.blocks[2].tokens) >= 2
    assert kept(plan) == {"attention": 36, "mlp": 144, "token": 24}


def test_dropped_tokens_stay_dropped_by_the_papers_rule():
    model = small(kinds=("token",))
    gates = [torch.tensor([3.0, 2.0, 0.1, 1.0] * 4) for _ in range(3)]
    gates[1] = torch.tensor([3.0, 0.05, 2.0, 1.0] * 4)
    for (_, parameter), values in zip(mask_parameters(model), gates, strict=True):
        parameter.data.copy_(values)
    # Running minima, by patch modulo 4: layer 0 has 3 2 0.1 1, layers 1 and 2 have 3 0.05 0.1 1.
    plan = threshold(model, {"token": 36 / 48}, round_to=1)
    assert [len(block.tokens) for block in plan.blocks] == [16, 12, 8]
    assert [t % 4 for t in plan.blocks[1].tokens] == [0, 2, 3] * 4
    plan = threshold(model, {"token": 28 / 48}, round_to=1)
    assert [t % 4 for t in plan.blocks[0].tokens] == [0, 1, 3] * 4
    assert [t % 4 for t in plan.blocks[1].tokens] == [0, 3] * 4


def test_the_published_rule_keeps_what_any_deeper_layer_keeps():
    model = small(kinds=("token",))
    values = [[0.1, 3.0], [0.1, 2.0], [1.5, 0.2]]  # even and odd patches, layer by layer
    for (_, parameter), pair in zip(mask_parameters(model), values, strict=True):
        parameter.data.copy_(torch.tensor(pair * 8))
    # Any deeper layer: the even patches stay everywhere thanks to the last layer.
    plan = threshold(model, {"token": 40 / 48}, round_to=1, token_rule="any-deeper")
    assert [len(block.tokens) for block in plan.blocks] == [16, 16, 8]
    assert [t % 2 for t in plan.blocks[2].tokens] == [0] * 8
    # The paper's rule: they are down from the first layer on.
    plan = threshold(model, {"token": 24 / 48}, round_to=1)
    assert [[t % 2 for t in block.tokens] for block in plan.blocks] == [[1] * 8] * 3


@pytest.mark.parametrize("rule", ["running-min", "any-deeper"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_tokens_never_come_back(tiny, rule, fraction):
    plan = threshold(tiny, {"token": fraction}, round_to=1, token_rule=rule)
    for before, after in zip(plan.blocks, plan.blocks[1:], strict=False):
        assert set(before.tokens) >= set(after.tokens)


@pytest.mark.parametrize(
    "budget",
    [
        "macs=60%",
        "macs=0.8G",
        "params=4M",
        "params=70%",
        "macs=50%,token=0.8",
        "params=4M,macs=60%",
    ],
)
@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_params_and_macs_are_met_within_a_percent(tiny, budget, round_to):
    plan = threshold(tiny, budget, round_to=round_to)
    dense = vitslim.cost(tiny)._asdict()
    limits = {"macs=60%": 0.6 * dense["macs"], "macs=0.8G": 0.8e9, "params=4M": 4e6}
    limits |= {"params=70%": 0.7 * dense["params"], "macs=50%": 0.5 * dense["macs"]}
    wanted = {p.split("=")[0]: limits[p] for p in budget.split(",") if p in limits}
    used = {name: plan.reached[name] / limit for name, limit in wanted.items()}
    assert max(used.values()) <= 1
    assert max(used.values()) >= 0.99
    for block in plan.blocks:
        assert all(width % round_to == 0 or width == 64 for width in block.head_dims)
        assert len(block.hidden) % round_to == 0


@pytest.fixture(scope="module")
def on_meta():
    """DeiT-T without weights, and masks for it: attention is worth most, tokens least."""
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            model = timm.create_model("deit_tiny_patch16_224")
    except RuntimeError as error:
        pytest.skip(f"this timm cannot build on the meta device: {error}")
    columns = [(2 * torch.rand(3, 64), torch.rand(768), 0.8 + 0.2 * torch.rand(196))] * 12
    scales = torch.rand(12, 1) + 0.5
    attention, mlp, token = zip(*columns, strict=True)
    return model, Masks(
        [each * scale for each, scale in zip(attention, scales, strict=True)],
        [each * scale for each, scale in zip(mlp, scales, strict=True)],
        list(token),
    )


@pytest.mark.parametrize(
    "budget", ["macs=60%", "macs=30%", "params=70%", "macs=60%,token=0.8", "params=4M,macs=60%"]
)
@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_one_ranking_per_mac_meets_budgets_within_a_percent(on_meta, budget, round_to):
    model, masks = on_meta
    dense = vitslim.cost(model)._asdict()
    plan = threshold(model, budget, masks=masks, round_to=round_to, ranking="macs")
    limits = {"macs=60%": 0.6 * dense["macs"], "macs=30%": 0.3 * dense["macs"]}
    limits |= {"params=70%": 0.7 * dense["params"], "params=4M": 4e6}
    parts = {p: limits[p] for p in budget.split(",") if p in limits}
    used = [plan.reached[p.split("=")[0]] / limit for p, limit in parts.items()]
    assert 0.99 <= max(used) <= 1
    for before, after in zip(plan.blocks, plan.blocks[1:], strict=False):
        assert set(before.tokens) >= set(after.tokens)
    if "token" in budget:
        assert sum(len(block.tokens) for block in plan.blocks) == round(0.8 * 12 * 196)
    if budget == "params=70%":
        assert all(len(block.tokens) == 196 for block in plan.blocks)
    # It is another plan than equal fractions give.
    equal = threshold(model, budget, masks=masks, round_to=round_to)
    assert plan.blocks != equal.blocks


def test_one_ranking_keeps_what_is_worth_most_per_mac(on_meta):
    model, masks = on_meta
    plan = threshold(model, "macs=60%", masks=masks, round_to=1, ranking="macs")
    embed, dims, hidden, tokens = 192, 192, 768, 197
    macs = {
        "attention": tokens * (4 * embed + 2 * tokens),
        "mlp": tokens * 2 * embed,
        "token": embed * (4 * dims + 2 * hidden) + 2 * tokens * dims,
    }
    # Every unit: its worth, and whether it stays.
    lowest = torch.stack(masks.token).cummin(0).values
    units = []
    for layer, block in enumerate(plan.blocks):
        for head, kept in enumerate(block.heads):
            scores = masks.attention[layer][head].double() / macs["attention"]
            units += [(float(s), unit in kept, "attention") for unit, s in enumerate(scores)]
        scores = masks.mlp[layer].double() / macs["mlp"]
        units += [(float(s), unit in block.hidden, "mlp") for unit, s in enumerate(scores)]
        scores = lowest[layer].double() / macs["token"]
        units += [(float(s), unit in block.tokens, "token") for unit, s in enumerate(scores)]
    assert {kind for _, kept, kind in units if not kept} == set(macs)
    first_gone = max(score for score, kept, _ in units if not kept)
    # After the beginning that fits, less than one unit's room is left to smaller ones.
    out_of_order = [macs[kind] for score, kept, kind in units if kept and score < first_gone]
    floors = 3 * 12  # the best of every layer stays whatever its worth
    assert sum(sorted(out_of_order)[:-floors]) <= max(macs.values())


def test_one_ranking_without_a_limit_or_with_all_fractions_changes_nothing(on_meta):
    model, masks = on_meta
    for budget in ({"mlp": 0.5}, {"attention": 0.5, "mlp": 0.5, "token": 0.5}):
        plans = [threshold(model, budget, masks=masks, ranking=r) for r in ("fractions", "macs")]
        assert plans[0] == plans[1]


def test_one_ranking_begins_with_the_floors(on_meta):
    model, masks = on_meta
    ranking = Ranking(masks, Geometry.of(model), 1, "running-min", 5, "macs")
    kinds = ("attention", "mlp", "token")
    assert ranking.best(kinds, 3 * 5 * 12) == dict.fromkeys(kinds, 5 * 12)


@pytest.mark.parametrize("granularity", ["uniform", "head"])
def test_one_ranking_of_coarse_granularities(granularity):
    model = small(granularity, kinds=("attention", "mlp"))
    dims = {"uniform": 3, "head": 8}[granularity]
    tokens, embed = 17, 24
    for name, parameter in mask_parameters(model):
        worth = 0.5 * dims * (4 * embed + 2 * tokens) if "attn" in name else 2 * embed
        torch.nn.init.constant_(parameter, worth * tokens)
    # Per MAC a hidden unit is worth twice a value of an attention mask, though it is smaller.
    plan = threshold(model, "macs=90%", round_to=1, ranking="macs")
    assert [len(block.hidden) for block in plan.blocks] == [96] * 3
    assert sum(map(sum, (block.head_dims for block in plan.blocks))) < 3 * 24
    model = small(granularity)
    plan = threshold(model, "macs=60%", round_to=1, ranking="macs")
    dense = vitslim.cost(model).macs
    assert 0.55 <= plan.reached["macs"] / dense <= 0.6
    with pytest.raises(vitslim.VitslimError, match="no ranking is called 'flops'"):
        threshold(model, "macs=60%", ranking="flops")
    with pytest.raises(vitslim.VitslimError, match="out of reach"):
        threshold(model, "macs=0.1%", ranking="macs")


@pytest.mark.parametrize("round_to", [4, 8])
def test_rounded_fractions_do_not_exceed_the_budget(tiny, round_to):
    plan = threshold(tiny, {"attention": 0.5, "mlp": 0.5}, round_to=round_to)
    for count, total in ((kept_part(plan, "attention"), 2304), (kept_part(plan, "mlp"), 9216)):
        assert 0.49 <= count / total <= 0.5


def kept_part(plan, kind):
    if kind == "attention":
        return sum(sum(block.head_dims) for block in plan.blocks)
    return sum(len(block.hidden) for block in plan.blocks)


def test_one_search_any_number_of_budgets_in_milliseconds(tiny):
    masks = Masks.of(tiny)
    threshold(tiny, "macs=60%", masks=masks)
    start = time.perf_counter()
    plans = [threshold(tiny, f"macs={p}%", masks=masks) for p in range(40, 100, 10)]
    assert (time.perf_counter() - start) / len(plans) < 1.0
    macs = [plan.reached["macs"] for plan in plans]
    assert macs == sorted(macs)
    assert len(set(macs)) == len(macs)


@pytest.mark.parametrize("granularity", ["uniform", "head"])
def test_coarse_granularities(granularity):
    model = small(granularity)
    plan = threshold(model, {"attention": 0.5}, round_to=1)
    for block in plan.blocks:
        if granularity == "uniform":
            assert block.heads[0] == block.heads[1] == block.heads[2]
        else:
            assert set(block.head_dims) <= {0, 8}
    total = sum(sum(block.head_dims) for block in plan.blocks)
    assert total == {"uniform": 12 * 3, "head": round(0.5 * 9) * 8}[granularity]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("macs=1%", r"macs 12.5\dM is out of reach: .* from .*M to 1.254G"),
        ("params=100M", "params 100M is out of reach"),
        ("attention=0", "attention=0 is out of reach: .* from 0.0053 to 1"),
        ("macs=fast", "macs=fast is no amount"),
        ("speed=2", "cannot read the budget 'speed=2'"),
        ("attention=1.5", "not a fraction between 0 and 1"),
        ("attention=0.5,mlp=0.5,token=0.5,macs=60%", "nothing is left to meet macs"),
        ("macs", "cannot read the budget"),
    ],
)
def test_bad_budgets_get_a_sentence(tiny, budget, said):
    with pytest.raises(vitslim.VitslimError, match=said):
        threshold(tiny, budget, round_to=1)


def test_masks_of_another_model_are_refused(tiny):
    with pytest.raises(vitslim.VitslimError, match="searched on another model"):
        threshold(tiny, "macs=60%", masks=Masks.of(small()))
    with pytest.raises(vitslim.VitslimError, match="has no token masks"):
        threshold(small(kinds=("mlp",)), {"token": 0.5})


def test_masks_survive_a_round_trip(tiny, tmp_path):
    masks = Masks.of(tiny)
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.load(tmp_path / "masks.safetensors")
    assert threshold(tiny, "macs=60%", masks=again) == threshold(tiny, "macs=60%")
    (tmp_path / "masks.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(vitslim.VitslimError, match="cannot read masks from"):
        Masks.load(tmp_path / "masks.safetensors")


def test_budgets_as_text():
    assert parse_budget("attention=0.7, mlp=70%") == {"attention": 0.7, "mlp": 0.7}
    assert parse_budget("macs=60%") == {"macs": "60%"}
    assert budget_name({"macs": "60%"}) == "macs-60"
    assert budget_name({"attention": 0.7, "token": 0.8}) == "attention-0.7-token-0.8"
