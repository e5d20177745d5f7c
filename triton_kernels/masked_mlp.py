"""A two-layer perceptron whose hidden units carry a mask z, in its products' epilogues.

    u = x W1^T + b1        h = act(u) z        out = h W2^T + b2

Forward's kernel makes u and h of one product. Backward's, with G the gradient of out, makes of the
product E = G W2 all that is left to do element by element, and the sums over the tokens:

    grad_u = E z act'(u)    h = act(u) z    grad_z = sum of E act(u)    grad_b1 = sum of grad_u
    grad_b2 = sum of G

The products without anything around them, out, grad_x = grad_u W1, grad_W1 = grad_u^T x and
grad_W2 = G^T h, are torch's. x and G are [T, C] with any distance between rows, u, h and grad_u
[T, M]. A program makes a tile of BLOCK_M rows by BLOCK_N hidden units; its sums over rows go to
[row blocks, columns] in float32, which torch adds up in a fixed order.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activations import activate
from .common import dot, launch, precision, round_to
from .configs import Config, Table


@triton.jit
def _tile(rows, units, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Returns which block of rows and which block of hidden units are this program's.

    GROUP blocks of rows walk over the hidden units together: programs that run at the same time
    share their rows and their weights in the L2 cache, and the rows come from memory once.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    per_group = GROUP * tl.cdiv(units, BLOCK_N)
    group = tl.program_id(0) // per_group
    place = tl.program_id(0) % per_group
    first = group * GROUP
    size = min(row_blocks - first, GROUP)
    return first + place % size, place // size


@triton.jit
def _halve(tiles):
    """Returns tiles [R, N] as twice as many of half the columns, in their order."""
    halves = ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i]
        both = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
        left, right = tl.split(tl.permute(both, [0, 2, 1]))
        halves = halves + (left, right)
    return halves


@triton.jit
def _pieces(tile, PIECES: tl.constexpr):
    """Returns a product as tiles of fewer columns, 1, 2 or 4 of them.

    An epilogue holds several values for each element, and would hold them for the whole tile.
    """
    tiles = (tile,)
    if PIECES > 1:
        tiles = _halve(tiles)
    if PIECES > 2:
        tiles = _halve(tiles)
    return tiles


@triton.jit(do_not_specialize=["rows", "x_stride", "weight_stride", "channels", "units"])
def _masked_mlp_forward_kernel(
    x,  # [T, C]
    weight,  # [M, C]
    bias,  # [M] or None
    mask,  # [M] float32 or None
    pre_act,  # [T, M]
    hidden,  # [T, M]
    rows,  # T
    x_stride,  # between rows, in UNITs as all that follow
    weight_stride,
    channels,  # C
    units,  # M
    UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides C
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
):
    # The product tells the compiler what sizes and strides are multiples of.
    channels, units = channels * UNIT, units * UNIT
    row_block, unit_block = _tile(rows, units, BLOCK_M, BLOCK_N, GROUP)
    start = row_block.to(tl.int64) * BLOCK_M
    row, unit, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    left, unit_start = rows - row_block * BLOCK_M, unit_block * BLOCK_N
    # Rows and units beyond the last read the last again, and are not stored: no mask in the loop.
    a = x + start * (x_stride * UNIT)
    a += tl.minimum(row, left - 1)[:, None] * (x_stride * UNIT) + k[None, :]
    b = weight + unit_start.to(tl.int64) * (weight_stride * UNIT)
    b += tl.minimum(unit, units - unit_start - 1)[:, None] * (weight_stride * UNIT) + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, channels, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(a)  # [BLOCK_M, BLOCK_K]
            weight_tile = tl.load(b)  # [BLOCK_N, BLOCK_K]
        else:
            inside = k[None, :] < channels - done
            x_tile = tl.load(a, mask=inside, other=0.0)
            weight_tile = tl.load(b, mask=inside, other=0.0)
        acc = dot(x_tile, tl.trans(weight_tile), acc, PRECISION)
        a += BLOCK_K
        b += BLOCK_K
    tiles = _pieces(acc, PIECES)
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    for i in tl.static_range(PIECES):
        unit = unit_start + i * WIDTH + tl.arange(0, WIDTH)
        known = unit < units
        offset = row[:, None] * units + unit[None, :]
        inside = (row[:, None] < left) & known[None, :]
        u = tiles[i]
        if bias is not None:
            u += tl.load(bias + unit, mask=known, other=0.0).to(tl.float32)[None, :]
        u = round_to(u, pre_act.dtype.element_ty)
        tl.store(pre_act + start * units + offset, u, mask=inside)
        # Of the rounded value, for backward reads no other.
        h, _ = activate(u.to(tl.float32), ACT)
        if mask is not None:
            h *= tl.load(mask + unit, mask=known, other=0.0)[None, :]
        h = round_to(h, hidden.dtype.element_ty)
        tl.store(hidden + start * units + offset, h, mask=inside)


@triton.jit(do_not_specialize=["rows", "grad_stride", "weight_stride", "channels", "units"])
def _masked_mlp_backward_kernel(
    grad_out,  # [T, C]
    weight,  # [C, M]
    pre_act,  # [T, M]
    mask,  # [M] float32 or None
    grad_pre,  # [T, M]
    hidden,  # [T, M]
    partials,  # [row blocks, M if there is a mask, M, C] float32: sums for mask, b1 and b2
    rows,  # T
    grad_stride,  # between rows, in UNITs as all that follow
    weight_stride,
    channels,  # C
    units,  # M
    UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides C
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,  # columns of G
):
    channels, units = channels * UNIT, units * UNIT
    row_block, unit_block = _tile(rows, units, BLOCK_M, BLOCK_N, GROUP)
    start = row_block.to(tl.int64) * BLOCK_M
    row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    left = rows - row_block * BLOCK_M
    # Units beyond the last read the first, and are not stored: no mask for them in the loop.
    unit = (unit_block * BLOCK_N + tl.arange(0, BLOCK_N)) % units
    unit = tl.max_contiguous(tl.multiple_of(unit, UNIT), UNIT)
    grad_rows = grad_out + start * (grad_stride * UNIT)
    columns = units + channels
    if mask is not None:
        columns += units
    sums = partials + row_block.to(tl.int64) * columns
    # Every program of these rows adds up its share of G's columns, which the product reads again
    # out of the cache. Before the product, for afterwards registers are short.
    for first in range(unit_block * SHARE, channels, tl.cdiv(units, BLOCK_N) * SHARE):
        column = first + tl.arange(0, SHARE)
        g = grad_rows + row[:, None] * (grad_stride * UNIT) + column[None, :]
        ours = (row[:, None] < left) & (column[None, :] < channels)
        g = tl.load(g, mask=ours, other=0.0).to(tl.float32)  # [BLOCK_M, SHARE]
        tl.store(sums + (columns - channels) + column, tl.sum(g, 0), mask=column < channels)
    a = grad_rows + row[:, None] * (grad_stride * UNIT) + k[None, :]
    b = weight + k[:, None] * (weight_stride * UNIT) + unit[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, channels, BLOCK_K):
        # Rows beyond the last are zero, to add nothing to the sums.
        present = row[:, None] < left
        if not EVEN_K:
            present = present & (k[None, :] < channels - done)
        grad_tile = tl.load(a, mask=present, other=0.0)  # [BLOCK_M, BLOCK_K]
        if EVEN_K:
            weight_tile = tl.load(b)  # [BLOCK_K, BLOCK_N]
        else:
            weight_tile = tl.load(b, mask=k[:, None] < channels - done, other=0.0)
        acc = dot(grad_tile, weight_tile, acc, PRECISION)
        a += BLOCK_K
        b += BLOCK_K * (weight_stride * UNIT)
    tiles = _pieces(acc, PIECES)
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    for i in tl.static_range(PIECES):
        unit = unit_block * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)
        known = unit < units
        offset = row[:, None] * units + unit[None, :]
        inside = (row[:, None] < left) & known[None, :]
        u = tl.load(pre_act + start * units + offset, mask=inside, other=0.0)
        h, slope = activate(u.to(tl.float32), ACT)
        grad = tiles[i]
        if mask is not None:
            tl.store(sums + unit, tl.sum(grad * h, 0), mask=known)
            z = tl.load(mask + unit, mask=known, other=0.0)[None, :]
            grad *= z
            h *= z
        h = round_to(h, hidden.dtype.element_ty)
        tl.store(hidden + start * units + offset, h, mask=inside)
        grad *= slope
        tl.store(sums + (columns - channels - units) + unit, tl.sum(grad, 0), mask=known)
        grad = round_to(grad, grad_pre.dtype.element_ty)
        tl.store(grad_pre + start * units + offset, grad, mask=inside)


def _config(
    rows: int, units: int, channels: int, pieces: int, warps: int, stages: int, **more: int
) -> Config:
    return {
        "BLOCK_M": rows,
        "BLOCK_N": units,
        "BLOCK_K": channels,
        "PIECES": pieces,
        "GROUP": 8,
        "num_warps": warps,
        "num_stages": stages,
    } | more


def _table(large: dict[str, Config]) -> Table:
    keys = {"16-bit small": _SMALL, "32-bit small": _WIDE, "32-bit large": _WIDE}
    keys |= {"16-bit odd": _ODD, "32-bit odd": _ODD}
    return {generation: keys | {"16-bit large": config} for generation, config in large.items()}


# A multiprocessor holds two or three programs, so that one's epilogue, as long as its product,
# hides behind another's product: that leaves 128 registers a lane with eight warps, 168 with four.
# A tile of 128 x 128 reads two thirds of what 64 x 128 reads from the L2 cache; forward has the
# registers for it, backward only with Triton 3.9 and wgmma, so that tuning has to ask for it.
# Small: so few rows that larger tiles would leave processors idle. Odd: elements are loaded one by
# one, and each has an address in registers.
_SMALL, _WIDE = _config(64, 64, 64, 2, 4, 3), _config(64, 64, 32, 2, 4, 2)
_TALL, _SQUARE = _config(64, 128, 64, 4, 4, 3), _config(128, 128, 64, 4, 8, 3, maxnreg=128)
_ODD = _config(64, 64, 32, 2, 8, 2)
_FLAT = _config(128, 128, 32, 4, 8, 4, maxnreg=128)
_LDS = _config(128, 128, 32, 4, 4, 2)
_FORWARD, _BACKWARD = "masked_mlp_forward", "masked_mlp_backward"
_FORWARD_CONFIGS = _table({"sm80": _SQUARE, "sm86": _FLAT, "sm90": _SQUARE, "gfx942": _LDS})
_BACKWARD_CONFIGS = _table({"sm80": _TALL, "sm86": _TALL, "sm90": _TALL, "gfx942": _LDS})
CANDIDATES: dict[str, tuple[Config, ...]] = dict.fromkeys(
    (_FORWARD, _BACKWARD),
    (
        _SMALL,
        _WIDE,
        _TALL,
        _SQUARE,
        _FLAT,
        _config(64, 128, 32, 4, 4, 4),
        _config(128, 64, 32, 2, 8, 2),
        _config(128, 64, 64, 2, 8, 3),
        _config(128, 128, 64, 4, 8, 3),
        _config(128, 256, 64, 4, 8, 3),
    ),
)


def _rows(x: Tensor) -> Tensor:
    """Returns x as a matrix [T, C] whose rows are contiguous, x itself where that is possible."""
    flat = x.flatten(0, -2)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _tiling(
    kernel: str, table: Table, x: Tensor, weight: Tensor, channels: int, units: int
) -> tuple[Config, int, int]:
    """Returns the configuration, the number of programs and the UNIT of a product."""
    rows, size = x.shape[0], x.element_size()
    unit = math.gcd(16 // size, channels, units, x.stride(0), weight.stride(0))
    # Large: every multiprocessor has its two tiles.
    large = rows * units >= 2 * 128 * 128 * configs.processors(x.device)
    kind = "odd" if unit * size < 16 else "large" if large else "small"
    config = configs.choose(kernel, table, f"{8 * size}-bit {kind}", x.device)
    programs = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(units, config["BLOCK_N"])
    return config, programs, unit


def masked_mlp_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    mask: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    """Returns out [..., C] and the saved pre-activation u [..., M], both in x's dtype."""
    flat, fc1_weight = _rows(x), _rows(fc1_weight)
    (rows, channels), units = flat.shape, fc1_weight.shape[0]
    pre_act = x.new_empty(*x.shape[:-1], units)
    hidden = x.new_empty(*x.shape[:-1], units)
    if hidden.numel() > 0:
        config, programs, unit = _tiling(
            _FORWARD, _FORWARD_CONFIGS, flat, fc1_weight, channels, units
        )
        launch(
            _masked_mlp_forward_kernel,
            (programs,),
            flat,
            fc1_weight,
            None if fc1_bias is None else fc1_bias.contiguous(),
            None if mask is None else mask.contiguous(),
            pre_act,
            hidden,
            rows,
            flat.stride(0) // unit,
            fc1_weight.stride(0) // unit,
            channels // unit,
            units // unit,
            UNIT=unit,
            EVEN_K=channels % config["BLOCK_K"] == 0,
            ACT=act,
            PRECISION=precision(x),
            **config,
        )
    return F.linear(hidden, fc2_weight, fc2_bias), pre_act


def masked_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    pre_act: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    mask: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, W1, b1, W2, b2 and of the mask, empty without a mask."""
    grad, flat, weight = _rows(grad_out), _rows(x), _rows(fc2_weight)
    (rows, channels), units = grad.shape, weight.shape[1]
    grad_pre, hidden = x.new_empty(rows, units), x.new_empty(rows, units)
    widths = [0 if mask is None else units, units, channels]
    if hidden.numel() > 0:
        config, programs, unit = _tiling(
            _BACKWARD, _BACKWARD_CONFIGS, grad, weight, channels, units
        )
        row_blocks = triton.cdiv(rows, config["BLOCK_M"])
        partials = x.new_empty(row_blocks, sum(widths), dtype=torch.float32)
        launch(
            _masked_mlp_backward_kernel,
            (programs,),
            grad,
            weight,
            pre_act.contiguous(),
            None if mask is None else mask.contiguous(),
            grad_pre,
            hidden,
            partials,
            rows,
            grad.stride(0) // unit,
            weight.stride(0) // unit,
            channels // unit,
            units // unit,
            UNIT=unit,
            EVEN_K=channels % config["BLOCK_K"] == 0,
            ACT=act,
            PRECISION=precision(x),
            SHARE=32,
            **config,
        )
    else:
        partials = F.pad(grad.float(), (sum(widths) - channels, 0))
    grad_mask, grad_bias1, grad_bias2 = partials.sum(0).split(widths)
    return (
        (grad_pre @ fc1_weight).view(x.shape),
        grad_pre.mT @ flat,
        grad_bias1.to(x.dtype, copy=True),
        grad.mT @ hidden,
        # Outputs of an op share no memory.
        grad_bias2.to(x.dtype, copy=True),
        grad_mask,
    )
