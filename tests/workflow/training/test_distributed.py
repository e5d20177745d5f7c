"""Processes: their number changes nothing, and one that dies is no loss."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_folder import write_images

import vitslim
from vitslim.allowed import KINDS
from vitslim.workflow.report.ongoing import masks_so_far
from vitslim.workflow.runtime.journal import read_summary
from vitslim.workflow.training import diagnosis
from vitslim.workflow.training.sharded import load_parts

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
        # The scaler leaves out updates by the loss of a process, so as many processes.
        ("two-half", "sharded-half"),
    ],
)
def test_the_number_of_processes_changes_nothing(shared: Path, one: str, other: str) -> None:
    # A graph may round float16 elsewhere than eager kernels do.
    limit = 1e-3 if "half" in one else 1e-6
    assert difference(shared / one, shared / other) < limit
    rows, others = (read_summary(shared / name / "summary.csv") for name in (one, other))
    assert len(rows) == 3
    for a, b in zip(rows, others, strict=True):
        assert a["accuracy"] == b["accuracy"]
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=limit)
        assert float(a["penalty"]) == pytest.approx(float(b["penalty"]), abs=limit)
    forecasts = [(shared / name / "forecast.csv").read_text() for name in (one, other)]
    assert forecasts[0] == forecasts[1]


def test_the_ways_that_should_differ_do(shared: Path) -> None:
    assert difference(shared / "one", shared / "averaged") > 1e-4
    assert difference(shared / "one", shared / "proximal") > 1e-4
    assert difference(shared / "one", shared / "mixed") > 1e-4


def test_masks_have_moved(shared: Path) -> None:
    masks = vitslim.Masks.load(shared / "one/masks.safetensors")
    assert max(float(mask.max()) for mask in masks.mlp) < 0.99


@pytest.mark.parametrize("name", ["full", "sharded-full"])
def test_a_full_disk_of_one_process_is_told_and_all_go_on(shared: Path, name: str) -> None:
    log = (shared / f"{name}.log").read_text()
    told = [line for line in log.splitlines() if "could not be written (No space left" in line]
    # Of the first checkpoint, the third, and the one for the signal that came then.
    assert len(told) == 3
    assert "Traceback" not in log
    # Neither process says that it was saved.
    assert json.loads((shared / f"{name}.statuses").read_text()) == [2, 2]
    assert len(re.findall(r"error: stopped after update [78] of 12, which could not be", log)) == 2
    left = [path.name for path in (shared / name / "state").iterdir()]
    assert left == ["step-0000000004"]


def test_a_process_with_a_bad_image_asks_as_much_of_a_sharded_model(tiny, monkeypatch) -> None:
    """For those that look for what their gradient has from it, and would wait for its parts."""
    asked, finite = [], diagnosis._finite
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}

    def listening(tensor: torch.Tensor) -> bool:
        asked.append(names.get(id(tensor)))
        return finite(tensor)

    monkeypatch.setattr(diagnosis, "_finite", listening)
    images, found = torch.zeros(2, 1, 8, 8), []
    for pixel in (0.0, float("nan")):
        images[0, 0, 0, 0] = pixel
        asked.clear()
        where = diagnosis.first_non_finite(tiny, images, backward=True)
        found.append((where, [*asked]))
    assert [where for where, _ in found] == ["the loss itself", "the images"]
    assert found[0][1] == found[1][1]


def test_the_masks_of_a_sharded_search_can_be_looked_at_as_it_goes(shared: Path) -> None:
    folder = shared / "sharded-full/state/step-0000000004"
    masked = vitslim.load(shared / "one")
    load_parts(folder, {"model": masked.state_dict()})
    masks, when = masks_so_far(shared / "sharded-full")
    assert when == "update 4"
    wanted = vitslim.Masks.of(masked)
    for kind in KINDS:
        for ours, theirs in zip(getattr(masks, kind), getattr(wanted, kind), strict=True):
            assert torch.equal(ours, theirs)
    # What is of another model is told by an exception that can be caught.
    with pytest.raises(ValueError, match="Size mismatch"):
        load_parts(folder, {"model": {"head.weight": torch.zeros(3)}})


@pytest.fixture(scope="module")
def trouble(shared: Path, tmp_path_factory) -> Path:
    """The folder of what share_stages.py stopped or killed."""
    folder = tmp_path_factory.mktemp("trouble")
    command = [sys.executable, HERE / "share_stages.py", shared, shared / "images", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "averaged"])
def test_torchrun_starts_again_where_a_process_died(shared: Path, trouble: Path, name: str) -> None:
    assert "search: going on after epoch 1" in (trouble / f"{name}.log").read_text()
    assert difference(shared / name, trouble / name) < 1e-6


@pytest.mark.slow
def test_what_two_processes_began_one_can_end(shared: Path, trouble: Path) -> None:
    """The checkpoint of two is gone on with by one, as an elastic restart may have to."""
    assert "going on after epoch" in (trouble / "fewer.log").read_text()
    assert difference(shared / "one", trouble / "fewer") < 1e-6
