"""How the size of a model's images is told: one number for squares, height and width otherwise."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .latency import input_shape

Size = int | list[int]


def image_size(model: nn.Module) -> Size:
    """Returns the size of a timm vision transformer's images as JSON has it."""
    return told(input_shape(model)[1:])


def told(size: Sequence[int]) -> Size:
    """Returns [height, width] as JSON has it."""
    height, width = size
    return height if height == width else [height, width]


def pixels(size: Any) -> str:
    """Says a size, which may be one number or [height, width], with its unit."""
    if isinstance(size, Sequence) and not isinstance(size, str):
        height, width = size[-2:] if len(size) > 1 else (size[0], size[0])
        if height != width:
            return f"{height} x {width} pixels"
        size = height
    return f"{size} pixels"
