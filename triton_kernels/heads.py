"""Where a head's columns lie in the packed projection, and the narrowest tile that holds them.

A program reads its head's offset and width from a small table and works on tiles of MAIN columns,
or of MAIN + TAIL where a power of two would waste too much: 16, 32, 32+16, 64, 64+32, 128, 128+64,
256.
A tile of rows by columns is a tuple, (main,) or (main, tail).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import round_to

# The widest head of each case, and the tile that holds it.
TILES = {
    16: (16, 0),
    32: (32, 0),
    48: (32, 16),
    64: (64, 0),
    96: (64, 32),
    128: (128, 0),
    192: (128, 64),
    256: (256, 0),
}


# The widest head of a dtype by its bytes: registers hold no more of float32.
WIDEST = {2: 256, 4: 128}


def tile_width(width: int, itemsize: int) -> int:
    """Returns the width of the narrowest tile that holds a head of a dtype of so many bytes."""
    if width <= WIDEST[itemsize]:
        return next(tile for tile in TILES if width <= tile)
    raise ValueError(
        f"ragged_attention: a head is {width} wide and Triton's kernels hold {WIDEST[itemsize]} at "
        f"most in a dtype of {8 * itemsize} bits; "
        'use another backend, vitslim.use_backend("reference", "ragged_attention")'
    )


@lru_cache(maxsize=1024)
def head_table(head_dims: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns [heads, 3] int32 on the device: number, offset and width of each, widest first.

    The widest start first, so that what is left for the end of the launch is short. It is made once
    for a model's layer: a copy to the GPU at every call would be waited for, and could not be
    captured in a CUDA graph.
    """
    rows, offset = [], 0
    for head, width in enumerate(head_dims):
        rows.append((head, offset, width))
        offset += width
    rows.sort(key=lambda row: -row[2])
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device=device)


def narrowest_and_widest(head_dims: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Returns the tile widths between which a kernel must choose.

    The narrowest is the widest itself where all heads share a tile, else 16, so that a model's
    layers, each with its own widths, need few compiled kernels.
    """
    tiles = {tile_width(width, itemsize) for width in head_dims}
    widest = max(tiles)
    return (widest if len(tiles) == 1 else min(TILES)), widest


def vectorises(head_dims: Sequence[int], *tensors: Tensor) -> bool:
    """Returns whether every head starts at a multiple of 16 bytes in every row of every tensor."""
    if any(width % 8 for width in head_dims):
        return False
    return all(
        t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(1) % 8 == 0 for t in tensors
    )


@triton.jit
def load_head(base, rows, row_stride, end, width, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Loads a head's columns of some rows, zero beyond `end` and `width`.

    base: the head's first column in row 0; rows: [R]; row_stride: in elements.
    """
    here = base + rows[:, None] * row_stride
    column = tl.arange(0, MAIN)[None, :]
    inside = rows[:, None] < end
    tiles = (tl.load(here + column, mask=inside & (column < width), other=0.0),)  # [R, MAIN]
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)[None, :]
        tail = tl.load(here + column, mask=inside & (column < width), other=0.0)  # [R, TAIL]
        tiles = tiles + (tail,)
    return tiles


@triton.jit
def store_head(base, rows, row_stride, end, width, tiles, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Stores what `load_head` would load, rounded to the tensor's dtype."""
    here = base + rows[:, None] * row_stride
    column = tl.arange(0, MAIN)[None, :]
    inside = rows[:, None] < end
    dtype = base.dtype.element_ty
    tl.store(here + column, round_to(tiles[0], dtype), mask=inside & (column < width))
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(here + column, round_to(tiles[1], dtype), mask=inside & (column < width))


@triton.jit
def load_mask(mask, offset, width, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Loads a head's part of the mask, float32 [D], as a tuple of rows [MAIN] and [TAIL]."""
    column = tl.arange(0, MAIN)
    tiles = (tl.load(mask + offset + column, mask=column < width, other=0.0),)
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)
        tiles = tiles + (tl.load(mask + offset + column, mask=column < width, other=0.0),)
    return tiles


@triton.jit
def multiple_of_8(x, ALIGNED: tl.constexpr):
    """Returns x, if ALIGNED in a way that shows the compiler that it is a multiple of 8."""
    if ALIGNED:
        x = x // 8 * 8
    return x
