"""TensorBoard shows what summary.csv and forecast.csv say, each epoch once."""

import importlib
import sys

import pytest

import vitslim
from vitslim import Masks, VitslimError
from vitslim.workflow.report import board

ROW = {"loss": 0.5, "penalty": 0.25, "accuracy": 90.0, "lr": 1e-3, "images_per_second": 700.0}
FORECAST = [
    {"budget": "macs=60%", "accuracy": 80.0, "attention": 0.6, "mlp": 0.5, "token": None},
    {"budget": "params=1", "accuracy": None, "attention": None, "mlp": None, "token": None},
]


def read(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    return events.Reload()


def values(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("tensorboard")
    return tmp_path


def test_an_epoch_is_there_before_the_stage_is_over(folder, tiny):
    masks = Masks.of(vitslim.mask(tiny))
    writer = board.Board(folder, "search")
    writer.epoch({"epoch": 1, **ROW}, masks, FORECAST)
    events = read(folder / "tensorboard" / "search")
    writer.close()
    assert {tag: values(events, tag) for tag in events.Tags()["scalars"]} == {
        **{f"epoch/{name}": [(1, pytest.approx(value))] for name, value in ROW.items()},
        "accuracy if cut now/macs=60%": [(1, 80.0)],
        "kept attention/macs=60%": [(1, pytest.approx(0.6))],
        "kept mlp/macs=60%": [(1, 0.5)],
    }
    assert set(events.Tags()["histograms"]) == {"masks/attention", "masks/mlp", "masks/token"}
    (histogram,) = events.Histograms("masks/mlp")
    assert histogram.histogram_value.num == sum(len(each) for each in masks.mlp)
    assert histogram.histogram_value.max == 1.0


def test_a_stage_that_goes_on_has_every_epoch_once(folder):
    writer = board.Board(folder, "retrain/macs-60")
    for epoch in (1, 2, 3):
        writer.epoch({"epoch": epoch, **ROW})
    writer.close()
    writer = board.Board(folder, "retrain/macs-60", done=1)
    for epoch in (2, 3, 4):
        writer.epoch({"epoch": epoch, **ROW, "loss": 0.125})
    writer.close()
    events = read(folder / "tensorboard" / "retrain" / "macs-60")
    assert values(events, "epoch/loss") == [(1, 0.5), (2, 0.125), (3, 0.125), (4, 0.125)]


def test_a_stage_without_masks_has_no_curve_of_the_penalty(folder):
    writer = board.Board(folder, "dense")
    writer.epoch({"epoch": 1, **ROW, "penalty": 0.0})
    writer.close()
    tags = read(folder / "tensorboard" / "dense").Tags()
    assert "epoch/penalty" not in tags["scalars"] and tags["histograms"] == []


def test_missing_package_is_one_sentence_and_only_for_those_who_ask(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    importlib.reload(board)
    for ask in (board.require_tensorboard, lambda: board.Board(tmp_path, "search")):
        with pytest.raises(VitslimError, match="pip install tensorboard") as error:
            ask()
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
