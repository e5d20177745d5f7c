"""What summary.json says of models and of the machine."""

import platform
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import __version__
from ..checkpoint import load
from ..cost import cost
from .data.batches import open_data
from .evaluate import accuracy_by_class
from .options.settings import Settings
from .runtime.world import World

MOST_CLASSES = 100


def class_names(model: nn.Module) -> list[str]:
    """Returns the names of the classes that a model knows."""
    return list(model.pretrained_cfg.get("label_names") or ())


def by_class(
    dense: nn.Module, folders: Mapping[str, Path], settings: Settings, world: World
) -> dict[str, list[float | None]]:
    """Returns the accuracy of every class, of the dense model and of saved ones by name.

    Classes without names, and so many that no table shows them, are left out.
    """
    if not 0 < len(class_names(dense)) <= MOST_CLASSES:
        return {}
    models = {"dense": dense} | {name: load(folder) for name, folder in folders.items()}
    with closing(open_data(settings, dense, world)) as data:
        return {
            name: accuracy_by_class(model.to(world.device), data, world, settings)
            for name, model in models.items()
        }


def entry(model: nn.Module, accuracy: float | None, latency: Mapping[str, float]) -> dict[str, Any]:
    """Returns what is said of a model that is not slim."""
    params, macs = cost(model)
    return {"accuracy": accuracy, "params": params, "macs": macs, "latency_ms": dict(latency)}


def environment(world: World) -> dict[str, Any]:
    """Returns what the numbers depend on."""
    cuda = world.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vitslim": __version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "processes": world.size,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
