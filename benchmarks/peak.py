"""What the processor could do at most, and what a packed model has to do."""

from concurrent.futures import ThreadPoolExecutor

import shapes
from torch import nn

import vitslim
from vitslim import native
from vitslim.cost import Geometry


def multiply_add_rate(threads: int) -> float:
    """Returns the float32 multiply-adds a second of so many threads at work at the same time."""
    seconds = 0.01 if shapes.SMOKE else 0.2
    with ThreadPoolExecutor(threads) as pool:
        # The kernel lets go of the interpreter's lock.
        return sum(pool.map(native.multiply_add_rate, [seconds] * threads))


def macs_done(model: nn.Module, rows: int = 1) -> int:
    """Returns the MACs of one image where the last block computes only the rows the head reads.

    Keys and values are needed of all its tokens; queries, attention, projection and MLP of `rows`.
    """
    geometry = Geometry.of(model)
    last, unread = geometry.blocks[-1], geometry.blocks[-1].tokens - rows
    queries_and_projection = 2 * last.dim * last.attn_dim
    attention = 2 * last.tokens * last.attn_dim
    mlp = 2 * last.dim * last.hidden
    return vitslim.cost(model).macs - unread * (queries_and_projection + attention + mlp)
