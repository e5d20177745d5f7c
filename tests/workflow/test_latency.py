"""Latencies are taken in turns, from the model as it is, and leave no trace on it."""

import time
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from vitslim import VitslimError
from vitslim.workflow import latency
from vitslim.workflow.latency import evaluating, example_input, format_table, measure


class Sleeper(nn.Module):
    """A model that takes a known time and writes down when it was called."""

    def __init__(self, name: str = "", seconds: float = 0.0, log: list[str] | None = None) -> None:
        super().__init__()
        self.patch_embed = SimpleNamespace(img_size=(4, 6), proj=SimpleNamespace(in_channels=2))
        self.weight = nn.Parameter(torch.zeros(1))
        self.name, self.seconds, self.log = name, seconds, [] if log is None else log

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        self.log.append(self.name)
        self.shape = tuple(images.shape)
        time.sleep(self.seconds)
        return images


def small_vit(**kwargs):
    return timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3} | kwargs,
    )


def test_median_milliseconds_are_right():
    models = {"fast": Sleeper(seconds=0.002), "slow": Sleeper(seconds=0.008)}
    times = measure(models, (1, 4), seconds=0.05)
    assert list(times) == ["fast", "slow"]
    assert all(list(row) == ["1", "4"] for row in times.values())
    assert 2 <= times["fast"]["4"] < times["slow"]["4"]
    assert times["slow"]["1"] >= 8


def test_models_take_turns():
    log: list[str] = []
    models = {name: Sleeper(name, 0.03, log) for name in "ab"}
    measure(models, (1,), seconds=0.01)
    # Two calls of each to warm up, then rounds that run forwards and backwards.
    assert "".join(log[4:14]) == "abbaabbaab"


def test_disturbed_machine_is_measured_longer_and_told(monkeypatch, caplog):
    times = iter([1.0, 9.0] * 10_000)
    monkeypatch.setattr(latency, "_timed_call", lambda model, images: next(times))
    measure({"slim": Sleeper()}, (1,), seconds=0.001)
    assert "latency at batch 1 is uncertain for slim" in caplog.text


def test_every_model_gets_its_own_image_size_and_batch():
    sleeper = Sleeper()
    times = measure({"vit": small_vit(in_chans=1), "sleeper": sleeper}, (3,), seconds=0.01)
    assert sleeper.shape == (3, 2, 4, 6)
    assert times["vit"]["3"] > 0


def test_model_is_left_as_it_was():
    model = small_vit().train()
    model.blocks.eval()
    before = [module.training for module in model.modules()]
    measure({"model": model}, (1,), seconds=0.01, device="cpu")
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_after_a_failure():
    model = small_vit().train()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert all(module.training for module in model.modules())


def test_input_is_deterministic_and_has_the_dtype_of_the_model():
    model = small_vit(in_chans=1).double()
    first, again = example_input(model, 2), example_input(model, 2)
    assert first.shape == (2, 1, 16, 16) and first.dtype == torch.float64
    assert torch.equal(first, again) and first.std() > 0.5


def test_model_without_image_size_is_refused_by_name():
    with pytest.raises(VitslimError, match="Linear does not say which images it takes"):
        measure({"linear": nn.Linear(2, 2)})


def test_table_shows_ratios_against_the_first_model():
    times = {"dense": {"1": 3.0, "32": 120.0}, "slim": {"1": 1.5, "32": 150.0}}
    head, dense, slim = format_table(times).splitlines()
    assert head.split("  ")[0].startswith("model") and "batch 32, ms" in head
    assert dense.split() == ["dense", "3.00", "333", "1.00x", "120", "267", "1.00x"]
    assert slim.split() == ["slim", "1.50", "667", "2.00x", "150", "213", "0.80x"]
