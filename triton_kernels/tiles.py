"""What attention's backward does with a head's tiles: tuples of [rows, columns], as heads.py loads.

z is the mask. Sums and products are float32; what a product reads is rounded to the tiles' dtype.
"""

import triton
import triton.language as tl

from . import heads
from .common import dot, round_to


@triton.jit
def zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Returns float32 tiles for a head's columns of ROWS rows."""
    tiles = (tl.zeros([ROWS, MAIN], tl.float32),)
    if TAIL > 0:
        tiles = tiles + (tl.zeros([ROWS, TAIL], tl.float32),)
    return tiles


@triton.jit
def times(tiles, z, POWER: tl.constexpr):
    """Returns the tiles with their columns multiplied by z or z^2, rounded once."""
    products = ()
    for i in tl.static_range(len(tiles)):
        factor = z[i]
        if POWER == 2:
            factor = z[i] * z[i]
        wide = tiles[i].to(tl.float32) * factor[None, :]
        products = products + (round_to(wide, tiles[i].dtype),)
    return products


@triton.jit
def masked(tiles, mask, offset, width, POWER: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Returns the tiles times z^POWER; as they are without a mask."""
    if mask is not None:
        tiles = times(tiles, heads.load_mask(mask, offset, width, MAIN, TAIL), POWER)
    return tiles


@triton.jit
def row_dots(a, b):
    """Returns sum(a * b) of every row, float32 [rows]."""
    sums = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        sums += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return sums


@triton.jit
def column_dots(a, b):
    """Returns sum(a * b) of every column, a tuple of float32 rows."""
    sums = ()
    for i in tl.static_range(len(a)):
        sums = sums + (tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 0),)
    return sums


@triton.jit
def outer(a, b, PRECISION: tl.constexpr):
    """Returns a b^T in float32 [rows of a, rows of b]."""
    product = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for i in tl.static_range(len(a)):
        product = dot(a[i], tl.trans(b[i]), product, PRECISION)
    return product


@triton.jit
def accumulate(weights, tiles, acc, PRECISION: tl.constexpr):
    """Returns acc + weights tiles, a tuple as tiles is."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        sums = sums + (dot(weights, tiles[i], acc[i], PRECISION),)
    return sums


@triton.jit
def store_gradient(
    base, rows, row_stride, end, acc, scale, mask, offset, width,
    POWER: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Stores scale z^POWER acc."""
    tiles = ()
    for i in tl.static_range(len(acc)):
        tiles = tiles + (acc[i] * scale,)
    tiles = masked(tiles, mask, offset, width, POWER, MAIN, TAIL)
    heads.store_head(base, rows, row_stride, end, width, tiles, MAIN, TAIL)


@triton.jit
def store_mask_gradient(
    base, q_sums, v_sums, scale, mask, offset, width, MAIN: tl.constexpr, TAIL: tl.constexpr
):
    """Stores 2 scale z q_sums + v_sums."""
    z = heads.load_mask(mask, offset, width, MAIN, TAIL)
    column = tl.arange(0, MAIN)
    grad_z = 2.0 * scale * z[0] * q_sums[0] + v_sums[0]
    tl.store(base + offset + column, grad_z, mask=column < width)
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)
        grad_z = 2.0 * scale * z[1] * q_sums[1] + v_sums[1]
        tl.store(base + offset + column, grad_z, mask=column < width)
