"""`ragged_attention`, backward, for any number of tokens, and the helpers of both its kernels.

The formulas and the layout stand in ragged_attention_backward.py. Here half of the programs own a
block of keys of one head of one image, go through the queries, and leave with grad_k, grad_v and
their part of grad_z; the other half own a block of queries, go through the keys, and leave with
grad_q. That takes seven products instead of five, since both compute the weights, but nobody adds
to another's numbers, and there is work for a whole GPU even with one image.

delta is computed where it is needed rather than by a kernel before: its rows of grad_out are there
anyway, those of out come from the L2 cache, and a launch less counts where batches are small.
"""

import triton
import triton.language as tl

from . import heads
from .common import dot, round_to

LOG2_E = tl.constexpr(1.4426950408889634)
# (wider than, at most, main, tail) of every tile.
TILES = tl.constexpr(
    tuple((below, at_most, *heads.TILES[at_most])
          for below, at_most in zip((0, *heads.TILES), heads.TILES, strict=False))
)  # fmt: skip
TILE_COUNT = tl.constexpr(len(heads.TILES))


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


@triton.jit
def multiple_of_8(x, ALIGNED: tl.constexpr):
    """Returns x, if ALIGNED in a way that shows the compiler that it is a multiple of 8."""
    if ALIGNED:
        x = x // 8 * 8
    return x


@triton.jit
def _own_keys(
    head, block, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores grad_k and grad_v of BLOCK_M rows."""
    grad_out, g_n, qkv, q_n, out, o_n, lse, grad_qkv, partial, mask = head[:10]
    D, tokens, offset, width, scale = head[10:]
    own = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = heads.load_head(qkv + D, own, q_n, tokens, width, MAIN, TAIL)
    v = heads.load_head(qkv + 2 * D, own, q_n, tokens, width, MAIN, TAIL)
    k = masked(k, mask, offset, width, 2, MAIN, TAIL)
    v = masked(v, mask, offset, width, 1, MAIN, TAIL)
    acc_k, acc_v = zeros(BLOCK_M, MAIN, TAIL), zeros(BLOCK_M, MAIN, TAIL)
    for start in range(0, tokens, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        q = heads.load_head(qkv, rows, q_n, tokens, width, MAIN, TAIL)
        grad = heads.load_head(grad_out, rows, g_n, tokens, width, MAIN, TAIL)
        delta = row_dots(grad, heads.load_head(out, rows, o_n, tokens, width, MAIN, TAIL))
        # Queries beyond the last add nothing: their rows of q, G and delta are zero. Keys beyond
        # the last add to rows that are not stored.
        lse_2 = tl.load(lse + rows, mask=rows < tokens, other=0.0) * LOG2_E
        weights = tl.exp2(outer(k, q, PRECISION) * (scale * LOG2_E) - lse_2[None, :])
        acc_v = accumulate(round_to(weights, grad[0].dtype), grad, acc_v, PRECISION)
        grad_scores = weights * (outer(v, grad, PRECISION) - delta[None, :])
        acc_k = accumulate(round_to(grad_scores, q[0].dtype), q, acc_k, PRECISION)
    if mask is not None:
        inside = (own < tokens)[:, None]
        k_rows, v_rows = (), ()
        for i in tl.static_range(len(acc_k)):
            k_rows = k_rows + (tl.where(inside, acc_k[i], 0.0),)
            v_rows = v_rows + (tl.where(inside, acc_v[i], 0.0),)
        raw = heads.load_head(qkv + D, own, q_n, tokens, width, MAIN, TAIL)
        k_sums = column_dots(raw, k_rows)
        raw = heads.load_head(qkv + 2 * D, own, q_n, tokens, width, MAIN, TAIL)
        v_sums = column_dots(raw, v_rows)
        store_mask_gradient(
            partial + block * D, k_sums, v_sums, scale, mask, offset, width, MAIN, TAIL
        )
    store_gradient(
        grad_qkv + D, own, 3 * D, tokens, acc_k, scale, mask, offset, width, 2, MAIN, TAIL
    )
    store_gradient(
        grad_qkv + 2 * D, own, 3 * D, tokens, acc_v, 1.0, mask, offset, width, 1, MAIN, TAIL
    )


@triton.jit
def _own_queries(
    head, block, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores grad_q of BLOCK_M rows."""
    grad_out, g_n, qkv, q_n, out, o_n, lse, grad_qkv, _partial, mask = head[:10]
    D, tokens, offset, width, scale = head[10:]
    own = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = heads.load_head(qkv, own, q_n, tokens, width, MAIN, TAIL)
    grad = heads.load_head(grad_out, own, g_n, tokens, width, MAIN, TAIL)
    delta = row_dots(grad, heads.load_head(out, own, o_n, tokens, width, MAIN, TAIL))
    lse_2 = tl.load(lse + own, mask=own < tokens, other=0.0) * LOG2_E
    q = masked(q, mask, offset, width, 2, MAIN, TAIL)
    grad = masked(grad, mask, offset, width, 1, MAIN, TAIL)
    acc_q = zeros(BLOCK_M, MAIN, TAIL)
    for start in range(0, tokens, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        k = heads.load_head(qkv + D, rows, q_n, tokens, width, MAIN, TAIL)
        v = heads.load_head(qkv + 2 * D, rows, q_n, tokens, width, MAIN, TAIL)
        weights = tl.exp2(outer(q, k, PRECISION) * (scale * LOG2_E) - lse_2[:, None])
        # A key beyond the last has score 0, and 2^(0 - lse) may be infinite.
        weights = tl.where((rows < tokens)[None, :], weights, 0.0)
        grad_scores = weights * (outer(grad, v, PRECISION) - delta[:, None])
        acc_q = accumulate(round_to(grad_scores, k[0].dtype), k, acc_q, PRECISION)
    store_gradient(grad_qkv, own, 3 * D, tokens, acc_q, scale, mask, offset, width, 2, MAIN, TAIL)


@triton.jit(
    do_not_specialize=[
        "blocks", "live_heads", "all_heads", "D", "tokens", "g_b", "g_n", "q_b", "q_n", "o_b",
        "o_n", "scale",
    ]
)  # fmt: skip
def _ragged_attention_backward_streaming_kernel(
    grad_out,  # [B, N, D]
    qkv,  # [B, N, 3 D]
    out,  # [B, N, D]
    lse,  # float32 [B, H, N]
    mask,  # float32 [D] or None
    table,  # int32 [H, 3]: number, offset and width of each head, widest first
    grad_qkv,  # [B, N, 3 D]
    partial,  # float32 [B, blocks, D] or None
    blocks, live_heads, all_heads, D, tokens, g_b, g_n, q_b, q_n, o_b, o_n, scale,
    ALIGNED: tl.constexpr, NARROWEST: tl.constexpr, WIDEST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % (2 * blocks)
    pair = tl.program_id(0) // (2 * blocks)
    image = (pair // live_heads).to(tl.int64)
    row = table + 3 * (pair % live_heads)
    offset = multiple_of_8(tl.load(row + 1), ALIGNED)
    width = multiple_of_8(tl.load(row + 2), ALIGNED)
    D = multiple_of_8(D, ALIGNED)
    if mask is not None:
        partial += image * blocks * D
    head = (
        grad_out + image * multiple_of_8(g_b, ALIGNED) + offset,
        multiple_of_8(g_n, ALIGNED),
        qkv + image * multiple_of_8(q_b, ALIGNED) + offset,
        multiple_of_8(q_n, ALIGNED),
        out + image * multiple_of_8(o_b, ALIGNED) + offset,
        multiple_of_8(o_n, ALIGNED),
        lse + (image * all_heads + tl.load(row)) * tokens,
        grad_qkv + image * tokens * (3 * D) + offset,
        partial, mask, D, tokens, offset, width, scale,
    )  # fmt: skip
    for i in tl.static_range(TILE_COUNT):
        # The first condition is the compiler's, the second the program's.
        if TILES[i][1] >= NARROWEST and TILES[i][1] <= WIDEST:  # noqa: SIM102
            if TILES[i][0] < width and width <= TILES[i][1]:
                # The owners of keys have more to do and come first.
                if part < blocks:
                    _own_keys(head, part, TILES[i][2], TILES[i][3], BLOCK_M, BLOCK_N, PRECISION)
                else:
                    _own_queries(
                        head, part - blocks, TILES[i][2], TILES[i][3], BLOCK_M, BLOCK_N, PRECISION
                    )
