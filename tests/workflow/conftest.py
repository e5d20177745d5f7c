"""A tiny model and tiny data, so that a whole stage takes about a second."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from image_folder import write_images
from torch import nn

from vitslim.workflow.options.settings import Settings, settings_for
from vitslim.workflow.runtime.world import World

TINY = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread here and in subprocesses: bit-equality is promised for equal threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def world() -> World:
    return World(torch.device("cpu"))


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY)


@pytest.fixture
def quick() -> Settings:
    return settings_for("search", {"epochs": 3, "batch_size": 256, "device": "cpu"})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")
