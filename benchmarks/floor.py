"""The least time that work can take on this device, by what the device was seen to reach.

A pass over data takes at least its bytes over the bandwidth of a large copy, and at least its
multiply-accumulates (MACs) over the rate of a large matrix product; passes follow one another.
Both rates are measured once a session.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import shapes
import torch
from timing import seconds


@dataclass(frozen=True)
class Pass:
    """What one pass must do at least.

    Attributes:
        moved: Bytes, each input read once and each output written once.
        macs: Multiply-accumulates of its matrix products.
    """

    moved: int
    macs: int = 0


def floor_s(passes: Sequence[Pass], device: str, dtype: torch.dtype) -> float:
    """Returns the seconds under which nothing can do these passes on the device."""
    total = 0.0
    for each in passes:
        moving = each.moved / bandwidth(device)
        total += max(moving, each.macs / mac_rate(device, dtype) if each.macs else 0.0)
    return total


@cache
def bandwidth(device: str) -> float:
    """Returns the bytes per second, read and written, of a copy far larger than any cache."""
    count = 2**16 if shapes.SMOKE else 2**28
    source = torch.randn(count, device=device)
    to = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: to.copy_(source), device)


@cache
def mac_rate(device: str, dtype: torch.dtype) -> float:
    """Returns the MACs per second of a large matrix product of random numbers."""
    size = 64 if shapes.SMOKE else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return size**3 / _best(lambda: torch.mm(a, b, out=out), device)


def _best(call, device: str) -> float:
    turns, repeats = (1, 1) if shapes.SMOKE else (5, 10)
    seconds(call, 3, device)
    return min(seconds(call, repeats, device) for _ in range(turns))
