"""`vitslim run`, killed while it searches and while it retrains, ends as if never killed."""

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vitslim
from vitslim.cli import main
from vitslim.cli_options import parse
from vitslim.cli_verbs import build_parser
from vitslim.workflow.latency import measure
from vitslim.workflow.options.asked import ask
from vitslim.workflow.options.option import OF_A_RUN
from vitslim.workflow.runtime.journal import read_summary

OPTIONS = [
    *("--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=8", "patch_size=4"),
    *("in_chans=1", "num_classes=10", "embed_dim=16", "depth=2", "num_heads=2", "--budget"),
    *("macs=60%", "--batch-size", "64", "--dense-epochs", "1", "--search-epochs", "4"),
    *("--retrain-epochs", "4", "--device", "cpu"),
]


@pytest.fixture(scope="module", autouse=True)
def short_latency() -> Iterator[None]:
    """Times each model for a moment only; how long is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitslim.workflow.run.measure", functools.partial(measure, seconds=0.05))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("run") / "whole"
    assert main(["run", *OPTIONS, "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_a_run_killed_twice_ends_bit_for_bit_the_same(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    script = Path(__file__).parent / "training/kill_run.py"
    done = subprocess.run(
        [sys.executable, str(script), str(output), *OPTIONS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert main(["run", *OPTIONS, "--output", str(output), "--resume"]) == 0
    for name in ("dense/model", "search/masks", "search/model", "slim/macs-60/model"):
        # Tensors, because safetensors writes its metadata in no fixed order.
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (output, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    plan = "plans/macs-60.json"
    assert (output / plan).read_bytes() == (whole / plan).read_bytes()
    ours, theirs = (read_summary(folder / "summary.csv") for folder in (output, whole))
    for row, other in zip(ours, theirs, strict=True):
        for name in ("stage", "epoch", "loss", "penalty", "accuracy", "lr"):
            assert row[name] == other[name]


def test_the_run_folder_holds_what_it_promises(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    slim = summary["slim"][0]
    assert slim["macs"] <= 0.6 * summary["dense"]["macs"]
    assert slim["budget"] == {"macs": "60%"}
    assert set(slim["latency_ms"]) == {"1", "32"}
    assert set(slim["cut"]) == set(slim["retrained"]) == {"accuracy"}
    assert summary["masked"]["params"] == summary["dense"]["params"]
    assert summary["environment"]["timm"]
    model = vitslim.load(whole / slim["folder"])
    assert vitslim.cost(model) == (slim["params"], slim["macs"])
    stages = [row["stage"] for row in read_summary(whole / "summary.csv")]
    assert stages == ["dense"] + ["search"] * 4 + ["retrain/macs-60"] * 4
    assert (whole / "report/index.html").exists()
    assert not list(whole.rglob("*.tmp"))


def test_the_same_options_are_needed_to_resume(whole: Path, capsys) -> None:
    command = ["run", *OPTIONS, "--output", str(whole), "--resume", "--search-lr", "0.25"]
    assert main(command) == 2
    assert "lr was 0.0005 and is now 0.25" in capsys.readouterr().err
    command[-2:] = ["--round-to", "2"]
    assert main(command) == 2
    assert "macs-60.json was planned otherwise" in capsys.readouterr().err


def test_a_budget_can_be_added_without_searching_again(whole: Path, capsys) -> None:
    before = (whole / "search/result.json").stat().st_mtime_ns
    second = ["--budget", "attention=0.6,mlp=0.5,token=0.9", "--resume", "--no-fold"]
    # Not folding is another way to retrain, so the first slim model would have to be made anew.
    assert main(["run", *OPTIONS, *second, "--output", str(whole)]) == 2
    assert "fold was True and is now False" in capsys.readouterr().err
    assert main(["run", *OPTIONS, *second[:3], "--output", str(whole)]) == 0
    names = [each["name"] for each in json.loads((whole / "summary.json").read_text())["slim"]]
    assert names == ["macs-60", "attention-0.6-mlp-0.5-token-0.9"]
    assert (whole / "search/result.json").stat().st_mtime_ns == before


def test_args_yaml_says_what_was_asked(whole: Path) -> None:
    flags = parse(*build_parser(), ["run", *OPTIONS, "--output", str(whole)])
    assert flags.pop("verb") == "run"
    from_file, given = ask([str(whole / "args.yaml")], {}), ask([], flags)
    assert from_file.stages(*OF_A_RUN) == given.stages(*OF_A_RUN)
    # Budgets may have been added since.
    assert from_file.choices.budget[:1] == given.choices.budget


def test_a_model_that_has_weights_is_not_trained_again(whole: Path, tmp_path: Path) -> None:
    quick = ["--search-epochs", "1", "--retrain-epochs", "1", "--batch-size", "256"]
    budget = ["--budget", "params=80%", "--round-to", "1"]
    command = ["run", "--model", str(whole / "dense"), *quick, *budget, "--seed", "1"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    stages = {row["stage"] for row in read_summary(tmp_path / "run/summary.csv")}
    assert stages == {"search", "retrain/params-80"}
    ours, theirs = (
        json.loads((folder / "summary.json").read_text())["dense"]["accuracy"]
        for folder in (tmp_path / "run", whole)
    )
    assert ours == pytest.approx(theirs)
