"""Processes: their number changes nothing, and one that dies is no loss."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_folder import write_images

import vitslim
from vitslim.workflow.report.journal import read_summary

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder of share_stages.py, made once."""
    folder = tmp_path_factory.mktemp("shared")
    write_images(folder / "images")
    command = [sys.executable, HERE / "share_stages.py", folder, folder / "images"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@torch.no_grad()
def difference(one: Path, other: Path) -> float:
    """The largest difference of any weight or mask."""
    pairs = zip(vitslim.load(one).parameters(), vitslim.load(other).parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("one", "accumulated"),
        ("one", "two"),
        ("one", "two-accumulated"),
        ("one", "sharded-accumulated"),
        ("averaged", "sharded"),
        ("proximal", "two-proximal"),
        ("proximal", "sharded-proximal"),
        ("mixed", "two-mixed"),
        ("mixed", "sharded-mixed"),
    ],
)
def test_the_number_of_processes_changes_nothing(shared: Path, one: str, other: str) -> None:
    assert difference(shared / one, shared / other) < 1e-6
    rows, others = (read_summary(shared / name / "summary.csv") for name in (one, other))
    assert len(rows) == 3
    for a, b in zip(rows, others, strict=True):
        assert a["accuracy"] == b["accuracy"]
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-6)
        assert float(a["penalty"]) == pytest.approx(float(b["penalty"]), abs=1e-6)
    forecasts = [(shared / name / "forecast.csv").read_text() for name in (one, other)]
    assert forecasts[0] == forecasts[1]


def test_the_ways_that_should_differ_do(shared: Path) -> None:
    assert difference(shared / "one", shared / "averaged") > 1e-4
    assert difference(shared / "one", shared / "proximal") > 1e-4
    assert difference(shared / "one", shared / "mixed") > 1e-4


def test_masks_have_moved(shared: Path) -> None:
    masks = vitslim.Masks.load(shared / "one/masks.safetensors")
    assert max(float(mask.max()) for mask in masks.mlp) < 0.99


@pytest.fixture(scope="module")
def trouble(shared: Path, tmp_path_factory) -> Path:
    """The folder of what share_stages.py stopped or killed."""
    folder = tmp_path_factory.mktemp("trouble")
    command = [sys.executable, HERE / "share_stages.py", shared, shared / "images", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["one", "averaged"])
def test_torchrun_starts_again_where_a_process_died(shared: Path, trouble: Path, name: str) -> None:
    assert "search: going on after epoch 1" in (trouble / f"{name}.log").read_text()
    assert difference(shared / name, trouble / name) < 1e-6


def test_what_two_processes_began_one_can_end(shared: Path, trouble: Path) -> None:
    """The checkpoint of two is gone on with by one, as an elastic restart may have to."""
    assert "going on after epoch" in (trouble / "fewer.log").read_text()
    assert difference(shared / "one", trouble / "fewer") < 1e-6
