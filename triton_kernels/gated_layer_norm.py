"""Layer norm whose rows are scaled by a gate per token; memory is touched once.

    n = (x - mean) rstd        y = n w + b        out = y gate[token]

Backward, with G the gradient of out, s1 = sum of G w, s2 = sum of G w n over a row's C columns:

    grad_w = sum of G gate n     grad_b = sum of G gate     grad_gate = sum of s2 + (sum of G b)
    grad_x = rstd gate (G w - s1 / C - n s2 / C)

x [B, N, C] may have any strides between rows; everything else is contiguous. A program holds ROWS
whole rows in registers, as a tuple of equal strips [ROWS, WIDTH]: 384 columns are three strips of
128, so that no lane idles, and equal strips share one layout, so that they are added up before
lanes exchange a row's sums. Backward's programs stay, walk over the rows,
and keep their sums of the parameters' gradients in registers until the end.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import launch
from .configs import Config, Table

_MAX_COLUMNS = 4096
_LANES = 32  # of a warp
_WIDTHS = tuple(1 << power for power in range(4, 13))  # of strips
# How many elements of a row one lane may hold. Backward keeps about six registers for each, so that
# three programs of four warps stay on a multiprocessor.
_PER_LANE = 24


@triton.jit
def _load_rows(base, offset, inside, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Loads rows in float32 as strips [ROWS, WIDTH], zero beyond the columns and where not inside.

    offset, inside: [ROWS].
    """
    strips = ()
    for start in tl.static_range(0, COLUMNS, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        mask = inside[:, None] & (column < COLUMNS)
        strips = strips + (tl.load(base + offset[:, None] + column, mask=mask, other=0.0),)
    wide = ()
    for i in tl.static_range(len(strips)):
        wide = wide + (strips[i].to(tl.float32),)
    return wide


@triton.jit
def _load_parameter(base, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Loads a vector over the columns for every row, in the layout that the rows have.

    Every lane so reads the 16 bytes that it needs; a vector's own layout would be one element a
    lane, and an exchange through shared memory.
    """
    none = tl.zeros([ROWS], tl.int32)
    return _load_rows(base, none, none == 0, COLUMNS, WIDTH)


@triton.jit
def _store_rows(base, offset, inside, strips, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Stores what `_load_rows` would load, rounded to the tensor's dtype."""
    for i in tl.static_range(len(strips)):
        column = i * WIDTH + tl.arange(0, WIDTH)[None, :]
        mask = inside[:, None] & (column < COLUMNS)
        tl.store(base + offset[:, None] + column, strips[i].to(base.dtype.element_ty), mask=mask)


@triton.jit
def _row_offset(row, tokens, batch_stride, token_stride, UNIT: tl.constexpr):
    """Returns where rows of a strided tensor begin, and which tokens they are; strides in UNITs."""
    sample = row // tokens
    token = row - sample * tokens
    # UNIT tells the compiler what the rows' starts are multiples of: 16 bytes, or one element.
    units = sample.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    return units * UNIT, token


@triton.jit
def _row_sum(strips):
    total = strips[0]
    for i in tl.static_range(1, len(strips)):
        total += strips[i]
    return tl.sum(total, 1)


# Sizes and strides stay unspecialised: the code would not be better, and compiled more often.
@triton.jit(do_not_specialize=["rows", "tokens", "x_batch_stride", "x_token_stride"])
def _gated_layer_norm_forward_kernel(
    x,  # [B, N, C]
    weight,  # [C]
    bias,  # [C]
    gate,  # [N] float32 or None
    out,  # [B, N, C]
    mean,  # [B N] float32
    rstd,  # [B N] float32
    rows,  # B N
    tokens,  # N
    x_batch_stride,  # in UNITs
    x_token_stride,  # in UNITs
    eps,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    offset, token = _row_offset(row, tokens, x_batch_stride, x_token_stride, UNIT)
    strips = _load_rows(x, offset, inside, COLUMNS, WIDTH)
    row_mean = _row_sum(strips) / COLUMNS
    # The squares are taken of the centred rows: E[x^2] - E[x]^2 would lose a small variance beside
    # a large mean.
    centred = ()
    squares = ()
    for i in tl.static_range(len(strips)):
        column = i * WIDTH + tl.arange(0, WIDTH)[None, :]
        strip = tl.where(column < COLUMNS, strips[i] - row_mean[:, None], 0.0)
        centred = centred + (strip,)
        squares = squares + (strip * strip,)
    row_rstd = tl.rsqrt(_row_sum(squares) / COLUMNS + eps)
    tl.store(mean + row, row_mean, mask=inside)
    tl.store(rstd + row, row_rstd, mask=inside)
    if gate is not None:
        scale = tl.load(gate + token, mask=inside, other=0.0)
    weights = _load_parameter(weight, ROWS, COLUMNS, WIDTH)
    biases = _load_parameter(bias, ROWS, COLUMNS, WIDTH)
    normed = ()
    for i in tl.static_range(len(strips)):
        y = centred[i] * row_rstd[:, None] * weights[i] + biases[i]
        if gate is not None:
            y *= scale[:, None]
        normed = normed + (y,)
    _store_rows(out, row.to(tl.int64) * COLUMNS, inside, normed, COLUMNS, WIDTH)


@triton.jit(
    do_not_specialize=[
        "rows",
        "tokens",
        "grad_batch_stride",
        "grad_token_stride",
        "x_batch_stride",
        "x_token_stride",
    ]
)
def _gated_layer_norm_backward_kernel(
    grad_out,  # [B, N, C]
    x,  # [B, N, C]
    weight,  # [C]
    bias,  # [C] or None without a gate
    gate,  # [N] float32 or None
    mean,  # [B N] float32
    rstd,  # [B N] float32
    grad_x,  # [B, N, C]
    weight_partials,  # [programs, C] float32
    bias_partials,  # [programs, C] float32
    gate_partials,  # [B N] float32 or None
    rows,  # B N
    tokens,  # N
    grad_batch_stride,  # in UNITs
    grad_token_stride,  # in UNITs
    x_batch_stride,  # in UNITs
    x_token_stride,  # in UNITs
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Each lane adds up its own rows; lanes and warps meet once, after the loop.
    weight_sums = ()
    bias_sums = ()
    for _ in tl.static_range(0, COLUMNS, WIDTH):
        weight_sums = weight_sums + (tl.zeros([ROWS, WIDTH], tl.float32),)
        bias_sums = bias_sums + (tl.zeros([ROWS, WIDTH], tl.float32),)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        offset, token = _row_offset(row, tokens, x_batch_stride, x_token_stride, UNIT)
        xs = _load_rows(x, offset, inside, COLUMNS, WIDTH)
        offset, token = _row_offset(row, tokens, grad_batch_stride, grad_token_stride, UNIT)
        grads = _load_rows(grad_out, offset, inside, COLUMNS, WIDTH)
        row_mean = tl.load(mean + row, mask=inside, other=0.0)
        row_rstd = tl.load(rstd + row, mask=inside, other=0.0)
        # The parameters come out of the cache for every tile: held, they cost a resident program.
        weights = _load_parameter(weight, ROWS, COLUMNS, WIDTH)
        normed = ()
        weighted = ()
        products = ()
        for i in tl.static_range(len(xs)):
            # Beyond the columns this is no norm, but grads and weights are zero there.
            n = (xs[i] - row_mean[:, None]) * row_rstd[:, None]
            gw = grads[i] * weights[i]
            normed = normed + (n,)
            weighted = weighted + (gw,)
            products = products + (gw * n,)
        sum_gw = _row_sum(weighted) / COLUMNS
        sum_gwn = _row_sum(products)
        if gate is not None:
            biases = _load_parameter(bias, ROWS, COLUMNS, WIDTH)
            shifts = ()
            for i in tl.static_range(len(xs)):
                shifts = shifts + (grads[i] * biases[i],)
            tl.store(gate_partials + row, sum_gwn + _row_sum(shifts), mask=inside)
            scale = tl.load(gate + token, mask=inside, other=0.0)
            row_rstd *= scale
        sum_gwn = sum_gwn / COLUMNS
        grad_xs = ()
        new_weight_sums = ()
        new_bias_sums = ()
        for i in tl.static_range(len(xs)):
            gx = weighted[i] - sum_gw[:, None] - normed[i] * sum_gwn[:, None]
            grad_xs = grad_xs + (row_rstd[:, None] * gx,)
            gated = grads[i]
            if gate is not None:
                gated *= scale[:, None]
            new_weight_sums = new_weight_sums + (weight_sums[i] + gated * normed[i],)
            new_bias_sums = new_bias_sums + (bias_sums[i] + gated,)
        weight_sums = new_weight_sums
        bias_sums = new_bias_sums
        _store_rows(grad_x, row.to(tl.int64) * COLUMNS, inside, grad_xs, COLUMNS, WIDTH)
    begin = tl.program_id(0) * COLUMNS
    for i in tl.static_range(len(weight_sums)):
        column = i * WIDTH + tl.arange(0, WIDTH)
        mask = column < COLUMNS
        tl.store(weight_partials + begin + column, tl.sum(weight_sums[i], 0), mask=mask)
        tl.store(bias_partials + begin + column, tl.sum(bias_sums[i], 0), mask=mask)


# VECTORS of 16 bytes are what a lane holds of each strip, and so set how many rows a tile has: with
# one, registers are left for several resident programs, whose loads overlap with others' sums; a
# wavefront of gfx942 is twice as wide as a warp. PROGRAMS is how many of backward's stay on a
# multiprocessor: as many as the registers of so many elements a lane allow.
CONFIGS: Table = {
    generation: {
        f"{bits}-bit {elements}": {
            "VECTORS": 2 if generation == "gfx942" else 1,
            "PROGRAMS": 2 if generation == "gfx942" else min(5, 72 // elements),
            "num_warps": 4,
            "num_stages": 1,
        }
        for bits in (16, 32)
        for elements in range(4, _PER_LANE + 1, 4)
    }
    for generation in configs.SHARED_MEMORY
}
_TRIED: tuple[Config, ...] = tuple(
    {"VECTORS": vectors, "PROGRAMS": programs, "num_warps": warps, "num_stages": 1}
    for vectors, programs, warps in (
        *((1, programs, 4) for programs in (2, 3, 4, 5)),
        *((1, 6, 2), (1, 1, 8), (1, 2, 8), (2, 2, 4), (2, 3, 2)),
    )
)
CANDIDATES = {"gated_layer_norm_forward": _TRIED, "gated_layer_norm_backward": _TRIED}


@cache
def _strips(columns: int, vector: int) -> tuple[int, int]:
    """Returns how many strips hold a row, and how wide; a lane holds a vector of each.

    One warp holds a whole row where it can, its lanes side by side. Leaving lanes idle is worse,
    from an eighth of them on, and worst is what a lane could not hold.
    """
    best = None
    for width in _WIDTHS:
        strips = -(-columns // width)
        if width < min(columns, 64) or strips * vector > _PER_LANE:
            continue
        cost = max(8 * strips * width, 9 * columns), max(width, _LANES * vector), -width
        best = min(best or (cost, strips, width), (cost, strips, width))
    if best is None or columns > _MAX_COLUMNS:
        raise ValueError(
            f"gated_layer_norm: x has {columns} channels and Triton's kernels hold {_MAX_COLUMNS} "
            'at most; use another backend, vitslim.use_backend("reference", "gated_layer_norm")'
        )
    return best[1:]


def _plan(kernel: str, x: Tensor) -> tuple[dict[str, int], int]:
    """Returns what a kernel is compiled with, and how many programs stay on a multiprocessor."""
    vector = 16 // x.element_size()
    strips, width = _strips(x.shape[2], vector)
    config = configs.choose(kernel, CONFIGS, f"{128 // vector}-bit {strips * vector}", x.device)
    lanes = config["VECTORS"] * config["num_warps"] * _LANES
    tile = {"COLUMNS": x.shape[2], "WIDTH": width, "ROWS": max(1, lanes * vector // width)}
    options = {option: config[option] for option in ("num_warps", "num_stages")}
    return tile | options, config["PROGRAMS"]


def _unit(*tensors: Tensor) -> int:
    """Returns what the starts of all tensors' rows are multiples of: 16 bytes or one element."""
    unit = 16 // tensors[0].element_size()
    aligned = all(t.stride(0) % unit == 0 and t.stride(1) % unit == 0 for t in tensors)
    return unit if aligned else 1


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def gated_layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [B, N, C] in x's dtype, and mean and rstd [B, N, 1] in float32."""
    batch, tokens, _ = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(batch, tokens, 1, dtype=torch.float32) for _ in range(2))
    if out.numel() == 0:
        return out, mean.zero_(), rstd.zero_()
    x = _rowwise(x)
    tile, _ = _plan("gated_layer_norm_forward", x)
    unit = _unit(x)
    launch(
        _gated_layer_norm_forward_kernel,
        (triton.cdiv(batch * tokens, tile["ROWS"]),),
        x,
        weight.contiguous(),
        bias.contiguous(),
        None if gate is None else gate.contiguous(),
        out,
        mean,
        rstd,
        batch * tokens,
        tokens,
        x.stride(0) // unit,
        x.stride(1) // unit,
        eps,
        UNIT=unit,
        **tile,
    )
    return out, mean, rstd


def gated_layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight, bias and of the gate [N] float32, empty without one."""
    batch, tokens, columns = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if grad_x.numel() == 0:
        grad_gate = mean.new_zeros(0 if gate is None else tokens)
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias), grad_gate
    x, grad_out = _rowwise(x), _rowwise(grad_out)
    tile, resident = _plan("gated_layer_norm_backward", x)
    unit = _unit(grad_out, x)
    tiles = triton.cdiv(batch * tokens, tile["ROWS"])
    programs = min(tiles, resident * configs.processors(x.device))
    weight_partials, bias_partials = (mean.new_empty(programs, columns) for _ in range(2))
    gate_partials = None if gate is None else mean.new_empty(batch, tokens)
    launch(
        _gated_layer_norm_backward_kernel,
        (programs,),
        grad_out,
        x,
        weight.contiguous(),
        None if gate is None else bias.contiguous(),
        None if gate is None else gate.contiguous(),
        mean,
        rstd,
        grad_x,
        weight_partials,
        bias_partials,
        gate_partials,
        batch * tokens,
        tokens,
        grad_out.stride(0) // unit,
        grad_out.stride(1) // unit,
        x.stride(0) // unit,
        x.stride(1) // unit,
        UNIT=unit,
        **tile,
    )
    grad_weight, grad_bias = weight_partials.sum(0), bias_partials.sum(0)
    grad_gate = mean.new_empty(0) if gate_partials is None else gate_partials.sum(0)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_gate
