"""`vitslim compress`, the second way of `vitslim run`, and searches that begin rotated."""

import functools
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import TINY
from image_folder import write_images
from safetensors.torch import load_file

import vitslim
from vitslim.cli import main
from vitslim.errors import VitslimError
from vitslim.oneshot import prepare
from vitslim.workflow.classifier import fit_classifier
from vitslim.workflow.data.batches import open_data
from vitslim.workflow.data.calibration import calibration, chosen, folder_without_labels
from vitslim.workflow.evaluate import evaluate
from vitslim.workflow.latency import measure
from vitslim.workflow.options.asked import ask
from vitslim.workflow.options.choices import MaskOptions
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.report.page import report
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.runtime.journal import read_summary
from vitslim.workflow.search import search

QUICK = ("--batch-size", "8", "--workers", "0", "--device", "cpu", "--round-to", "1")


@pytest.fixture(scope="module", autouse=True)
def short_latency() -> Iterator[None]:
    """Times each model for a moment only; how long is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for room in ("run", "compress", "latency_budget"):
            brief = lambda *args, **how: measure(*args, **{**how, "seconds": 0.02})  # noqa: E731
            patch.setattr(f"vitslim.workflow.{room}.measure", brief)
        yield


def save_dense(folder: Path, classes: int = 2, names: bool = True) -> str:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", **{**TINY, "in_chans": 3, "num_classes": classes}
    )
    if names:
        model.pretrained_cfg["label_names"] = ["dark", "light"]
    vitslim.save(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, and a dense model that has learned them."""
    folder = tmp_path_factory.mktemp("compress")
    write_images(folder / "images")
    start = save_dense(folder / "start")
    words = ["finetune", start, "--data", f"folder:{folder}/images", *QUICK[:-2], "--lr", "1e-2"]
    assert main([*words, "--epochs", "2", "--output", str(folder / "dense")]) == 0
    return folder


def words(place: Path, *more: str, data: str = "images") -> list[str]:
    return ["compress", str(place / "dense"), "--data", f"folder:{place / data}", *QUICK, *more]


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    output = place / "small"
    budgets = ("--budget", "macs=80%", "--budget", "macs=60%")
    assert main(words(place, *budgets, "--output", str(output))) == 0
    return output


def settings(place: Path, data: str = "images", **given):
    given = {"batch_size": 8, "workers": 0, "device": "cpu", **given}
    return settings_for("retrain", {"data": f"folder:{place / data}", **given}, "compress")


def test_the_folder_holds_what_it_promises(done: Path, place: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert [slim["name"] for slim in summary["slim"]] == ["macs-80", "macs-60"]
    assert summary["dense"]["accuracy"] == 100.0 and summary["images"] == 32
    assert set(summary["by_class"]) == {"dense", "macs-80", "macs-60"}
    for slim, share in zip(summary["slim"], (0.8, 0.6), strict=True):
        assert slim["macs"] <= share * summary["dense"]["macs"]
        assert slim["method"] == "compressed" and "retrained" not in slim
        assert set(slim["latency_ms"]) == {"1", "32"}
        model = vitslim.load(done / slim["folder"])
        assert vitslim.cost(model) == (slim["params"], slim["macs"])
        assert model.pretrained_cfg["label_names"] == ["dark", "light"]
        assert vitslim.Plan.load(done / slim["plan"]).reached["macs"] == slim["macs"]
    assert not (done / "summary.csv").exists() and not list(done.rglob("*.tmp"))
    page = report(done).read_text()
    assert "cut without training" in page and "is not complete" not in page
    assert "<em>Search</em>" not in page and "<em>Compression</em>" in page


def test_it_does_what_python_does(done: Path, place: Path, world) -> None:
    ours = settings(place)
    dense = vitslim.load(place / "dense").eval()
    images, labels = calibration(ours, dense, world, 1024)
    small = vitslim.compress(dense, (images, labels), "macs=60%", seed=ours.seed, quiet=True)
    # The verb's widths are exact, so the plan is made again.
    prepared = prepare(dense, (images, labels), seed=ours.seed, quiet=True)
    small = prepared.cut(prepared.plan("macs=60%", round_to=1)).eval()
    saved = vitslim.load(done / "slim/macs-60").eval()
    torch.testing.assert_close(saved(images), small(images))
    with_data = open_data(ours, saved, world)
    accuracy = evaluate(saved, with_data, world, ours)
    told = json.loads((done / "cut/macs-60/result.json").read_text())["cut"]["accuracy"]
    assert accuracy == pytest.approx(told)


def test_defaults_are_those_of_python() -> None:
    ours = {name: each.default for name, each in inspect.signature(prepare).parameters.items()}
    choices = ask([], {}, "compress").choices
    assert (choices.kinds, choices.criterion) == (ours["kinds"], ours["criterion"])
    assert (choices.rotate, choices.refit) == (ours["rotation"], ours["refitted"])
    assert choices.ranking == "macs"


def test_what_is_compressed_is_retrained_gently() -> None:
    digits = settings_for("retrain", {"data": "digits"}, "compress")
    assert (digits.lr, digits.hflip, digits.distill_loss_weight) == (3e-5, 0.0, 0.5)
    searched = settings_for("retrain", {"data": "digits"})
    gentle = searched.gentler()
    assert (searched.epochs, gentle.epochs, gentle.lr) == (40, 10, pytest.approx(1e-4))
    assert settings_for("retrain", {"data": "digits", "epochs": 1}).gentler().epochs == 1


def test_more_budgets_and_what_is_done_stays(done: Path, place: Path, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in done.glob("cut/*/result.json")}
    again = words(place, "--budget", "macs=80%", "--budget", "latency=95%", "--output", str(done))
    assert main(again) == 2
    assert "holds an earlier run: add --resume" in capsys.readouterr().err
    code = main([*again, "--resume"])
    told = capsys.readouterr()
    # How fast a model of two tiny layers is, no plan decides: out of reach is an answer too.
    assert code == 0 or "A latency of 95% of the dense model's is out of reach" in told.err
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert main([*words(place, "--budget", "params=70%", "--output", str(done)), "--resume"]) == 0
    names = [slim["name"] for slim in json.loads((done / "summary.json").read_text())["slim"]]
    assert names[:2] == ["macs-80", "macs-60"] and names[-1] == "params-70"
    assert main([*again[:-4], "--output", str(done), "--resume", "--floor", "2"]) == 2
    assert "floor was 1 and is now 2" in capsys.readouterr().err


def test_args_yaml_asks_for_the_same(done: Path, place: Path) -> None:
    args = yaml.safe_load((done / "args.yaml").read_text())
    assert args["criterion"] and args["rotate"] and args["retrain"]["epochs"] == 0
    assert main(["compress", "-c", str(done / "args.yaml"), "--resume"]) == 0


def test_retraining_goes_on_from_the_cut(place: Path) -> None:
    output = place / "retrained"
    first = words(place, "--budget", "macs=60%", "--output", str(output))
    assert main(first) == 0
    cut = vitslim.load(output / "slim/macs-60").state_dict()
    cut = {name: value.clone() for name, value in cut.items()}
    assert main([*first, "--resume", "--retrain-epochs", "2", "--lr", "1e-3"]) == 0
    slim = json.loads((output / "summary.json").read_text())["slim"][0]
    assert set(slim["cut"]) == set(slim["retrained"]) == {"accuracy"}
    trained = vitslim.load(output / "slim/macs-60").state_dict()
    assert any(not torch.equal(cut[name], value) for name, value in trained.items())
    stages = [row["stage"] for row in read_summary(output / "summary.csv")]
    assert stages == ["retrain/macs-60"] * 2
    args = yaml.safe_load((output / "args.yaml").read_text())["retrain"]
    assert args["teacher"] == "dense" and args["distill_loss_weight"] == 0.5
    # Who adds a budget need not train it, and what was trained stays so.
    assert main([*words(place, "--budget", "macs=80%", "--output", str(output)), "--resume"]) == 0
    slims = json.loads((output / "summary.json").read_text())["slim"]
    assert slims[0]["retrained"] == slim["retrained"] and "retrained" not in slims[1]
    page = report(output).read_text()
    assert "cut without a search" in page and "is not complete" not in page


def flat(place: Path, name: str, train: bool) -> Path:
    """The training images in no classes, in train/ or at the top."""
    folder = place / name / "train" if train else place / name
    folder.mkdir(parents=True)
    for number, image in enumerate(sorted((place / "images/train").rglob("*.png"))):
        shutil.copy(image, folder / f"{number}.png")
    return place / name


@pytest.mark.parametrize("train", [True, False])
def test_images_without_labels_are_enough(place: Path, capsys, train: bool) -> None:
    name = f"flat-{train}"
    flat(place, name, train)
    output = place / f"from-{name}"
    assert main(words(place, "--budget", "macs=60%", "--output", str(output), data=name)) == 0
    assert "are looked at without labels, and no accuracy" in capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text())
    assert summary["labelled"] is False and summary["dense"]["accuracy"] is None
    assert summary["slim"][0]["cut"] == {"accuracy": None} and summary["by_class"] == {}
    assert "The images have no labels, so that accuracy was not" in report(output).read_text()
    # As without their labels, which fisher does not look at.
    saved = load_file(output / "slim/macs-60/model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    more = ("--retrain-epochs", "1", "--resume", "--output", str(output))
    assert main(words(place, "--budget", "macs=60%", *more, data=name)) == 2
    assert "has no labels to retrain with" in capsys.readouterr().err


def test_images_are_chosen_by_the_seed_and_come_as_for_evaluation(place: Path, world) -> None:
    ours, model = settings(place), vitslim.load(place / "dense")
    some = calibration(ours, model, world, 12)
    assert some.images.shape == (12, 3, 8, 8) and len(some.labels) == 12
    again = calibration(settings(place, batch_size=5, workers=1), model, world, 12)
    assert torch.equal(some.images, again.images) and torch.equal(some.labels, again.labels)
    assert len(calibration(ours, model, world, 999).images) == 32
    assert chosen(32, 12, 1) != chosen(32, 12, 2) and len({*chosen(32, 12, 1)}) == 12
    assert folder_without_labels(ours) is None


@pytest.mark.parametrize("data", ["digits", "synthetic"])
def test_other_data_give_images_too(data: str, world, tiny) -> None:
    given = {"data": "digits", "synthetic": data == "synthetic", "device": "cpu"}
    found = calibration(settings_for("retrain", given, "compress"), tiny, world, 40)
    assert found.images.shape == (40, 1, 8, 8) and found.labels.max() < 10


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--budget", "macs=1%"], "out of reach"),
        (["--budget", "token=0.8"], "A budget names token: add --kinds attention mlp token."),
        ([], "--budget is needed."),
        (["--budget", "macs=60%", "--retrain-epochs", "-1"], "must be at least 0, not -1"),
        (["--budget", "macs=60%", "--calibration-images", "0"], "must be at least 1, not 0"),
        (["--budget", "macs=60%", "--calibration-images", "4"], "images are too few"),
        (["--budget", "macs=60%", "--criterion", "guess"], "invalid choice: 'guess'"),
        (["--budget", "macs=60%", "--data", "folder:/nowhere"], "There is no image folder"),
    ],
)
def test_bad_input_is_one_sentence(place: Path, tmp_path: Path, capsys, more, sentence) -> None:
    assert main(words(place, *more, "--output", str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_models_that_cannot_be_compressed(place: Path, done: Path, tmp_path, capsys) -> None:
    def refused(model: str, *more: str, data: str = "images") -> str:
        asked = words(place, *more, "--budget", "macs=60%", "--output", str(tmp_path), data=data)
        assert main(["compress", model, *asked[2:]]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    five = save_dense(tmp_path / "five", 5, names=False)
    assert "fine-tune it first with `vitslim finetune`" in refused(five)
    more = ("--model-kwargs", "num_classes=2")
    assert "was never trained: fine-tune it first" in refused(five, *more)
    assert "comes without weights" in refused("vit_tiny_patch16_224")
    assert "is masked or slim already" in refused(str(done / "slim/macs-80"))
    (place / "nothing").mkdir(exist_ok=True)
    dense = str(place / "dense")
    assert "There are no images in" in refused(dense, data="nothing")


def test_a_classifier_is_refused_instead_of_made_anew(place: Path, world, tmp_path) -> None:
    model = vitslim.load(save_dense(tmp_path / "five", 5, names=False))
    context = StageContext("compress", settings(place), world, tmp_path)
    with pytest.raises(VitslimError, match=r"a classifier of 5 classes and folder:.* has 2, so"):
        fit_classifier(model, context, may_renew=False)
    assert model.num_classes == 5


@pytest.fixture(scope="module")
def both(place: Path) -> Path:
    output = place / "both"
    asked = ["run", "--model", str(place / "dense"), "--data", f"folder:{place}/images", *QUICK]
    asked += ["--search-epochs", "1", "--retrain-epochs", "1", "--lr-base", "1e-2", "--rotate"]
    budgets = ["--budget", "macs=70%", "--budget", "attention=0.7,mlp=0.7,token=0.75"]
    assert main([*asked, *budgets, "--compress", "--output", str(output)]) == 0
    assert main(["run", "-c", str(output / "args.yaml"), "--resume"]) == 0
    return output


def test_a_run_goes_both_ways(both: Path) -> None:
    summary = json.loads((both / "summary.json").read_text())
    assert [each["method"] for each in summary["slim"]] == ["searched"] * 2
    for ours, theirs in zip(summary["compressed"], summary["slim"], strict=True):
        assert ours["budget"] == theirs["budget"] and ours["method"] == "compressed"
        assert set(ours["cut"]) == set(ours["retrained"]) == {"accuracy"}
        assert set(ours["latency_ms"]) == {"1", "32"} and ours["retrain"]["epochs"] == 1
        assert vitslim.cost(vitslim.load(both / ours["folder"])) == (ours["params"], ours["macs"])
    # Tokens go only where a budget names them.
    plans = [vitslim.Plan.load(both / each["plan"]) for each in summary["compressed"]]
    assert plans[0].blocks[0].tokens is None and plans[1].blocks[-1].tokens is not None
    stages = [row["stage"] for row in read_summary(both / "summary.csv")]
    names = ("macs-70", "attention-0.7-mlp-0.7-token-0.75")
    expected = [f"{stage}/{name}" for stage in ("retrain", "compress") for name in names]
    assert stages == ["search", *expected]
    page = (both / "report/index.html").read_text()
    assert "compressed, no search" in page and "searched, really removed" in page
    assert "is not complete" not in page and "macs=70%, without a search" in page


def test_a_folder_is_of_a_run_or_of_a_compression(both: Path, place: Path, capsys) -> None:
    assert main(words(place, "--budget", "macs=70%", "--output", str(both), "--resume")) == 2
    assert "is the folder of a whole run" in capsys.readouterr().err


def test_a_search_may_begin_rotated(place: Path, world, tmp_path: Path, capsys) -> None:
    given = {"data": f"folder:{place}/images", "epochs": 1, "batch_size": 8, "workers": 0}
    still = {**given, "lr": 0.0, "warmup_lr": 0.0, "min_lr": 0.0, "mask_lr_scale": 0.0}
    dense = vitslim.load(place / "dense").eval()
    masks = MaskOptions(kinds=("attention", "mlp"))
    context = StageContext("search", settings_for("search", still), world, tmp_path / "search")
    masked = search(dense, context, masks=masks, rotate=16, base="dense").eval()
    found = calibration(context.settings, dense, world, 16)
    # It computes what the dense model does, in other coordinates: those that `rotate` gives.
    torch.testing.assert_close(masked(found.images), dense(found.images), atol=1e-4, rtol=1e-4)
    rotated = vitslim.rotate(dense, found.images, seed=context.settings.seed, quiet=True)
    for ours, theirs, old in zip(masked.blocks, rotated.blocks, dense.blocks, strict=True):
        torch.testing.assert_close(ours.attn.qkv.weight, theirs.attn.qkv.weight)
        assert not torch.allclose(ours.attn.qkv.weight, old.attn.qkv.weight, atol=1e-3)
    again = functools.partial(search, dense, masks=masks, base="dense")
    resumed = StageContext("search", context.settings, world, context.folder, resume=True)
    with pytest.raises(VitslimError, match="rotate was True and is now None"):
        again(resumed)
    with pytest.raises(VitslimError, match="calibration_images was 16 and is now 8"):
        again(resumed, rotate=8)
