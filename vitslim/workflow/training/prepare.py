"""What training makes of a model before its first update."""

import torch
from timm.layers import DropPath
from torch import nn

from ..options.settings import Settings


def prepare(model: nn.Module, settings: Settings) -> None:
    """Sets memory format, checkpointing and stochastic depth of a model, in place.

    Args:
        model: A timm vision transformer, masked or slim or neither, on its device.
        settings: How it is trained.
    """
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    if settings.drop_path is not None:
        _set_drop_path(model, settings.drop_path)


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """Sets stochastic depth to grow linearly, as timm builds it, to `rate` in the deepest block."""
    depth = len(model.blocks)
    for index, block in enumerate(model.blocks):
        each = rate * index / max(depth - 1, 1)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(each) if each else nn.Identity())
