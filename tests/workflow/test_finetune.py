"""Fine-tuning: dense and slim models on other classes and sizes, and the dense stage of a run."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY
from torch import nn

import vitslim
from vitslim.cli import main
from vitslim.errors import VitslimError
from vitslim.workflow.finetune import finetune
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.report.page import report
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.runtime.interrupt import Stopped
from vitslim.workflow.runtime.journal import read_summary
from vitslim.workflow.training.loop import Loop
from vitslim.workflow.training.optimise import make_optimizer, make_scheduler
from vitslim.workflow.training.penalty import Penalty
from vitslim.workflow.training.train import open_stage

QUICK = ("--batch-size", "8", "--workers", "0", "--device", "cpu", "--lr", "1e-2")
RUN = (
    *("--budget", "macs=80%", "--round-to", "1", "--batch-size", "8", "--workers", "0"),
    *("--device", "cpu", "--search-epochs", "1", "--retrain-epochs", "1"),
)


@pytest.fixture
def five() -> nn.Module:
    """A dense model of five classes, where the images have two."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, "in_chans": 3, "num_classes": 5})


@pytest.fixture
def saved(five, tmp_path) -> str:
    vitslim.save(five, tmp_path / "five")
    return str(tmp_path / "five")


@pytest.fixture
def context(images, world, tmp_path) -> StageContext:
    given = {"data": f"folder:{images}", "epochs": 2, "batch_size": 8, "workers": 0, "lr": 1e-2}
    return StageContext("finetune", settings_for("finetune", given), world, tmp_path / "out")


def changed(context: StageContext, **settings) -> StageContext:
    return dataclasses.replace(context, settings=dataclasses.replace(context.settings, **settings))


def slim_of(model: nn.Module, kinds: tuple[str, ...] = ("attention", "mlp", "token")):
    masked = vitslim.mask(model, kinds=kinds)
    return vitslim.slim(masked, vitslim.threshold(masked, "macs=70%", round_to=1))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["dense", "slim"])
def test_a_model_learns_other_classes_and_keeps_their_names(five, context, kind) -> None:
    model = five if kind == "dense" else slim_of(five)
    before = state(model)
    done = finetune(model, context)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(done.model) is type(model)
    assert done.model.num_classes == 2 and done.model.head.out_features == 2
    assert done.model.pretrained_cfg["label_names"] == ["dark", "light"]
    assert json.loads((context.folder / "config.json").read_text())["label_names"][0] == "dark"
    assert "dark, light" in (context.folder / "README.md").read_text()
    assert done.result["after"]["accuracy"] == 100.0
    assert done.result["before"]["accuracy"] <= 100.0
    assert (done.result["params"], done.result["macs"]) == tuple(vitslim.cost(done.model))
    assert [row["stage"] for row in read_summary(context.folder / "summary.csv")] == [
        "finetune"
    ] * 2
    again = finetune(model, dataclasses.replace(context, resume=True))
    assert again.result == done.result


def test_a_classifier_that_fits_stays(context) -> None:
    torch.manual_seed(0)
    two = timm.create_model("vit_tiny_patch16_224", **{**TINY, "in_chans": 3, "num_classes": 2})
    done = finetune(two, changed(context, lr=0.0, min_lr=0.0, warmup_lr=0.0))
    assert torch.equal(done.model.head.weight, two.head.weight)
    assert done.result["before"] == done.result["after"]


def test_a_classifier_of_as_many_other_classes_does_not_fit(context, capsys) -> None:
    two = timm.create_model("vit_tiny_patch16_224", **{**TINY, "in_chans": 3, "num_classes": 2})
    two.pretrained_cfg["label_names"] = ["cat", "dog"]
    done = finetune(two, context)
    assert "the classifier of other 2 classes is made anew for the 2 of" in capsys.readouterr().out
    assert done.model.pretrained_cfg["label_names"] == ["dark", "light"]


def test_a_masked_model_is_refused(five, context) -> None:
    with pytest.raises(VitslimError, match=r"A masked model is not fine-tuned: fine-tune the den"):
        finetune(vitslim.mask(five), context)


def test_data_of_unknown_classes_needs_a_classifier(five, context, monkeypatch) -> None:
    from vitslim.workflow import classifier
    from vitslim.workflow.data.datasets import Datasets

    monkeypatch.setattr(classifier, "open_datasets", lambda *_: Datasets(None, None, 0))
    five.reset_classifier(0)
    with pytest.raises(VitslimError, match=r"no classifier, .*give --model-kwargs num_classes=N"):
        finetune(five, context)


@pytest.mark.parametrize("kind", ["dense", "slim"])
def test_freezing_trains_the_classifier_alone(five, context, kind) -> None:
    model = five if kind == "dense" else slim_of(five)
    modes = []
    model.blocks[1].register_forward_hook(lambda block, *_: modes.append(block.training))
    done = finetune(model, changed(context, freeze=True, drop_path=0.5))
    before, after = state(model), state(done.model)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all(
        name.startswith("head.") for name in moved if before[name].shape == after[name].shape
    )
    assert modes and not any(modes)
    assert all(parameter.requires_grad for parameter in done.model.parameters())


@pytest.mark.parametrize("kind", ["dense", "slim", "masked", "student"])
def test_layers_have_rates_of_their_own(five, context, tiny, kind) -> None:
    model = {"slim": slim_of, "masked": vitslim.mask}.get(kind, lambda model: model)(five)
    settings = dataclasses.replace(context.settings, layer_decay=0.5, lr=1.0, warmup_epochs=0)
    settings = dataclasses.replace(settings, sched="none", mask_lr_scale=7.0)
    net, prefix = model, ""
    if kind == "student":
        net, prefix = nn.Module(), "student."
        net.student, net.projection = model, nn.Linear(2, 2)
    optimizer = make_optimizer(net, settings, 8)
    make_scheduler(optimizer, settings, 4).step_update(0)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    rates = {
        names[id(p)].removeprefix(prefix): g["lr"]
        for g in optimizer.param_groups
        for p in g["params"]
    }
    assert len(rates) == len(names)
    assert rates["head.weight"] == 1.0
    assert rates["blocks.1.mlp.fc1.weight"] == 0.5
    assert rates["blocks.0.attn.qkv.weight"] == 0.25
    assert rates["patch_embed.proj.weight"] == 0.125
    if kind == "masked":
        assert rates["blocks.0.mlp.mask"] == 7.0
    if kind == "student":
        assert rates["projection.weight"] == 1.0


def test_a_search_may_have_layer_decay_and_proximal_steps(five, context) -> None:
    settings = dataclasses.replace(
        context.settings, data="digits", l1_step="proximal", layer_decay=0.5
    )
    torch.manual_seed(0)
    masked = vitslim.mask(timm.create_model("vit_tiny_patch16_224", **TINY))
    own = dataclasses.replace(context, settings=settings)
    loop = Loop(masked, own, open_stage(own, {}), Penalty(settings))
    loop._update([next(loop.data.epoch(0))], 0, 0)
    assert loop._rate() == pytest.approx(settings.warmup_lr)


def test_fine_tuning_goes_on_to_the_bit(five, context, tmp_path) -> None:
    whole = finetune(five, context)
    broken = dataclasses.replace(context, folder=tmp_path / "broken", resume=True)
    step, calls = Loop._update, []

    def stopping(self, *args) -> None:
        calls.append(args)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGTERM)
        step(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Loop, "_update", stopping)
        finetune(five, broken)
    resumed = finetune(five, broken)
    ours, theirs = state(resumed.model), state(whole.model)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert resumed.result["before"] == whole.result["before"]


def test_a_teacher_teaches_a_slim_model(five, context) -> None:
    five.reset_classifier(2)
    settings = {"distill_loss_weight": 0.5, "distill_type": "feature"}
    done = finetune(slim_of(five), changed(context, **settings), teacher=five)
    assert done.result["after"]["accuracy"] >= 50.0


def test_the_verb_trains_at_another_size_and_is_reported(saved, images, tmp_path, capsys) -> None:
    small = tmp_path / "slim"
    vitslim.save(slim_of(vitslim.load(saved), ("attention", "mlp")), small)
    output = tmp_path / "tuned"
    words = ["finetune", str(small), "--data", f"folder:{images}", *QUICK, "--epochs", "2"]
    assert main([*words, "--img-size", "16", "--output", str(output)]) == 0
    told = capsys.readouterr().out
    assert "the classifier of 5 classes is made anew for the 2 of folder:" in told
    assert f"{output}: accuracy " in told
    model = vitslim.load(output)
    assert model.patch_embed.img_size == (16, 16)
    assert {path.name for path in output.iterdir()} >= {
        *("args.yaml", "summary.csv", "config.json", "model.safetensors", "result.json")
    }
    page = report(output).read_text()
    assert "the fine-tuning of a model" in page and "dark, light" in page
    # Its args.yaml asks for the same, and what is done stays.
    assert main(["finetune", "-c", str(output / "args.yaml"), "--resume"]) == 0
    assert main([*words, "--output", str(output)]) == 2
    assert "holds an earlier run" in capsys.readouterr().err


def test_a_slim_model_that_drops_patches_keeps_its_size(five, images, tmp_path, capsys) -> None:
    vitslim.save(slim_of(five), tmp_path / "slim")
    words = ["finetune", str(tmp_path / "slim"), "--data", f"folder:{images}", *QUICK]
    assert main([*words, "--img-size", "16", "--output", str(tmp_path / "out")]) == 2
    assert "keeps patches of a grid of 2 x 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--distill-loss-weight", "0.5"], "--distill-loss-weight needs --teacher: a timm name"),
        (["--layer-decay", "1.5"], "--layer-decay must be above 0 and at most 1, not 1.5."),
        (["--img-size", "2"], "five cannot be loaded with img_size=2: "),
        (["--data", "folder:/nowhere"], "There is no image folder /nowhere."),
    ],
)
def test_bad_input_is_one_sentence(saved, images, tmp_path, capsys, words, sentence) -> None:
    output = str(tmp_path / "out")
    command = ["finetune", saved, "--data", f"folder:{images}", *QUICK, "--output", output]
    assert main([*command, *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_a_teacher_of_other_classes_is_refused(saved, images, tmp_path, capsys) -> None:
    command = ["finetune", saved, "--data", f"folder:{images}", *QUICK, "--teacher", saved]
    assert main([*command, "--distill-loss-weight", "1", "--output", str(tmp_path / "out")]) == 2
    assert "The teacher has 5 classes and the student 2" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["new classifier", "--dense-epochs", "neither", "no weights"])
def test_a_run_trains_the_dense_model_where_it_must_and_says_why(
    saved, images, tmp_path, capsys, given
) -> None:
    words = ["--data", f"folder:{images}", "--dense-lr", "1e-2"]
    model = saved
    if given != "new classifier":
        torch.manual_seed(0)
        kwargs = {**TINY, "in_chans": 3, "num_classes": 2}
        model = str(tmp_path / "two")
        vitslim.save(timm.create_model("vit_tiny_patch16_224", **kwargs), model)
    if given == "no weights":
        model = "vit_tiny_patch16_224"
        words += ["--model-kwargs", *(f"{k}={v}" for k, v in TINY.items() if k != "in_chans")]
    if given in ("new classifier", "no weights"):
        words += ["-c", str(epochs(tmp_path))]
    if given == "--dense-epochs":
        words += ["--dense-epochs", "2"]
    output = tmp_path / "run"
    assert main(["run", "--model", model, *words, *RUN, "--output", str(output)]) == 0
    told = capsys.readouterr().out
    reason = {
        "new classifier": "is trained first: its classifier is new",
        "--dense-epochs": "is trained first: as --train-dense or --dense-epochs ask",
        "neither": "has weights and is evaluated as it is",
        "no weights": "is trained first: it came without weights",
    }[given]
    assert reason in told
    stages = [row["stage"] for row in read_summary(output / "summary.csv")]
    assert stages.count("dense") == (0 if given == "neither" else 2)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["classes"] == ["dark", "light"]
    assert {name: sum(each) / 2 for name, each in summary["by_class"].items()} == {
        "dense": summary["dense"]["accuracy"],
        "macs-80": summary["slim"][0]["retrained"]["accuracy"],
    }
    assert vitslim.load(output / "slim/macs-80").pretrained_cfg["label_names"] == ["dark", "light"]
    page = (output / "report/index.html").read_text()
    assert "dark, light" in page and "Class by class" in page
    again = ["run", "-c", str(output / "args.yaml"), "--resume"]
    assert main(again) == 0


def epochs(folder: Path) -> Path:
    """A recipe that sets the epochs of the dense stage without asking for it to be trained."""
    recipe = folder / "short.yaml"
    recipe.write_text("dense: {epochs: 2}\n")
    return recipe


def test_classes_that_weights_never_had_are_learned_first(saved, images, tmp_path, capsys) -> None:
    """num_classes makes a new classifier as well as the data does."""
    words = ["--data", f"folder:{images}", "--model-kwargs", "num_classes=2"]
    words += ["-c", str(epochs(tmp_path)), *RUN, "--output", str(tmp_path / "run")]
    assert main(["run", "--model", saved, *words]) == 0
    assert "its classifier is new" in capsys.readouterr().out


def test_a_new_classifier_cannot_go_untrained(saved, images, tmp_path, capsys) -> None:
    words = ["--data", f"folder:{images}", *RUN, "--output", str(tmp_path / "run")]
    assert main(["run", "--model", saved, *words, "--dense-epochs", "0"]) == 2
    assert "--epochs must be at least 1, not 0." in capsys.readouterr().err


def test_a_search_is_not_taught_by_an_untrained_classifier(saved, images, tmp_path, capsys) -> None:
    words = ["search", saved, "--data", f"folder:{images}", "--model-kwargs", "num_classes=2"]
    words += ["--teacher", "dense", "--distill-loss-weight", "1", "--output", str(tmp_path / "out")]
    assert main([*words, *QUICK]) == 2
    assert "a classifier that was never trained: train it first" in capsys.readouterr().err
