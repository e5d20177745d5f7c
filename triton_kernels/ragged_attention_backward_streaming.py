"""`ragged_attention`, backward, for any number of tokens.

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
from .common import round_to
from .tiles import (
    accumulate,
    column_dots,
    masked,
    outer,
    row_dots,
    store_gradient,
    store_mask_gradient,
    zeros,
)

LOG2_E = tl.constexpr(1.4426950408889634)
# (wider than, at most): powers of two. Two narrow tiles instead of a wider one hold more addresses,
# for which there are no registers in any of the bodies below.
TILES = tl.constexpr(((0, 16), (16, 32), (32, 64), (64, 128), (128, 256)))
TILE_COUNT = tl.constexpr(5)


@triton.jit
def _place(args, image, row, ALIGNED: tl.constexpr):
    """Returns a head's addresses, strides and numbers from the kernel's arguments.

    But for mask and partial, which may be None, and a helper cannot return None in every Triton.
    """
    grad_out, qkv, out, lse, grad_qkv = args[:5]
    all_heads, D, tokens, scale, g_b, g_n, q_b, q_n, o_b, o_n = args[8:]
    offset = heads.multiple_of_8(tl.load(row + 1), ALIGNED)
    width = heads.multiple_of_8(tl.load(row + 2), ALIGNED)
    D = heads.multiple_of_8(D, ALIGNED)
    return (
        grad_out + image * heads.multiple_of_8(g_b, ALIGNED) + offset,
        heads.multiple_of_8(g_n, ALIGNED),
        qkv + image * heads.multiple_of_8(q_b, ALIGNED) + offset,
        heads.multiple_of_8(q_n, ALIGNED),
        out + image * heads.multiple_of_8(o_b, ALIGNED) + offset,
        heads.multiple_of_8(o_n, ALIGNED),
        lse + (image * all_heads + tl.load(row)) * tokens,
        grad_qkv + image * tokens * (3 * D) + offset,
        D, tokens, offset, width, scale,
    )  # fmt: skip


@triton.jit
def _own_keys(
    args, image, row, block, ALIGNED: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores grad_k and grad_v of BLOCK_M rows."""
    partial, mask, blocks = args[5], args[6], args[7]
    head = _place(args, image, row, ALIGNED)
    grad_out, g_n, qkv, q_n, out, o_n, lse, grad_qkv = head[:8]
    D, tokens, offset, width, scale = head[8:]
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
        partial += (image * blocks + block) * D
        store_mask_gradient(partial, k_sums, v_sums, scale, mask, offset, width, MAIN, TAIL)
    store_gradient(
        grad_qkv + D, own, 3 * D, tokens, acc_k, scale, mask, offset, width, 2, MAIN, TAIL
    )
    store_gradient(
        grad_qkv + 2 * D, own, 3 * D, tokens, acc_v, 1.0, mask, offset, width, 1, MAIN, TAIL
    )


@triton.jit
def _own_queries(
    args, image, row, block, ALIGNED: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores grad_q of BLOCK_M rows."""
    mask = args[6]
    head = _place(args, image, row, ALIGNED)
    grad_out, g_n, qkv, q_n, out, o_n, lse, grad_qkv = head[:8]
    D, tokens, offset, width, scale = head[8:]
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
    # Raw, since what is computed before the branch is held in registers by every body.
    args = (
        grad_out, qkv, out, lse, grad_qkv, partial, mask, blocks, all_heads, D, tokens, scale,
        g_b, g_n, q_b, q_n, o_b, o_n,
    )  # fmt: skip
    width = tl.load(row + 2)
    for i in tl.static_range(TILE_COUNT):
        # The first condition is the compiler's, the second the program's.
        if TILES[i][1] >= NARROWEST and TILES[i][1] <= WIDEST:  # noqa: SIM102
            if TILES[i][0] < width and width <= TILES[i][1]:
                # The owners of keys have more to do and come first.
                if part < blocks:
                    _own_keys(
                        args, image, row, part, ALIGNED,
                        TILES[i][1], 0, BLOCK_M, BLOCK_N, PRECISION,
                    )  # fmt: skip
                else:
                    _own_queries(
                        args, image, row, part - blocks, ALIGNED,
                        TILES[i][1], 0, BLOCK_M, BLOCK_N, PRECISION,
                    )  # fmt: skip
