"""`ragged_attention`, backward, for up to 256 tokens; the streaming kernel takes the rest.

With z the mask, G the gradient of out, and q, k, v as they lie in memory:

    S = scale q (k z^2)^T     P = exp(S - lse)           delta = rowsum(G * out)
    dP = G (v z)^T            dS = P * (dP - delta)
    A_q = dS k                A_k = dS^T q               A_v = P^T G

The gradient of the masked q' = q z is scale dS k' = scale z A_q, so that of q is scale z^2 A_q, and
likewise that of k is scale z^2 A_k; that of v is z A_v. z itself receives, summed over images and
tokens, scale z q A_q + scale z k A_k + v A_v. Its first two terms are equal, both being
scale z sum_ij q_i dS_ij k_j in every dimension, which leaves

    grad_z = sum of 2 scale z k A_k + v A_v        (or q A_q in the place of k A_k)

So a program forms k z^2 and v z once, and everything else falls out of its accumulators. It writes
its part of grad_z in a row of its own, and the rows are summed afterwards: the bits do not depend
on who finishes first.

qkv and grad_qkv are [B, N, 3 D], all heads of q, then of k, then of v; out and grad_out are
[B, N, D]; lse is [B, H, N]. One program does one head of one image in five products. It keeps all
keys and values and A_k and A_v while it goes through blocks of queries, each of which leaves with
its grad_q. Scores are computed transposed, [keys, queries], so that P^T and dS^T are the left
operands of A_v and A_k and go there from registers.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, heads
from .common import launch, precision, round_to
from .configs import Config, Table
from .ragged_attention_backward_streaming import (
    LOG2_E,
    _ragged_attention_backward_streaming_kernel,
)
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

# The most keys that a program keeps, by the widest tile on GPUs with mma, and with wgmma: beyond
# them registers spill.
MMA_TOKENS = {16: 256, 32: 256, 64: 192}
WGMMA_TOKENS = 256
# (wider than, at most): powers of two, for two narrow products take longer than a wider one here.
TILES = tl.constexpr(((0, 16), (16, 32), (32, 64)))
TILE_COUNT = tl.constexpr(3)


@triton.jit
def _own_rows(T: tl.constexpr, KEY_TILES: tl.constexpr):
    """Returns which keys the T-th tile holds; KEY_TILES has the sizes of all."""
    first = 0
    for t in tl.static_range(T):
        first += KEY_TILES[t]
    return first + tl.arange(0, KEY_TILES[T])


@triton.jit
def _resident(
    args, image, row, MAIN: tl.constexpr, TAIL: tl.constexpr, ALIGNED: tl.constexpr,
    KEY_TILES: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    grad_out, qkv, out, lse, grad_qkv, partial, mask, all_heads, D, tokens, scale = args[:11]
    g_b, g_n, q_b, q_n, o_b, o_n = args[11:]
    offset = heads.multiple_of_8(tl.load(row + 1), ALIGNED)
    width = heads.multiple_of_8(tl.load(row + 2), ALIGNED)
    D = heads.multiple_of_8(D, ALIGNED)
    g_n, q_n, o_n = (
        heads.multiple_of_8(g_n, ALIGNED),
        heads.multiple_of_8(q_n, ALIGNED),
        heads.multiple_of_8(o_n, ALIGNED),
    )
    grad_out += image * heads.multiple_of_8(g_b, ALIGNED)
    qkv += image * heads.multiple_of_8(q_b, ALIGNED)
    out += image * heads.multiple_of_8(o_b, ALIGNED)
    grad_qkv += image * tokens * (3 * D)
    lse += (image * all_heads + tl.load(row)) * tokens
    # The mask goes to keys and values, once: q and grad_out are then read by the tensor cores from
    # where they were loaded to.
    keys, masked_keys, masked_values, acc_k, acc_v = (), (), (), (), ()
    for t in tl.static_range(len(KEY_TILES)):
        own = _own_rows(t, KEY_TILES)
        k = heads.load_head(qkv + offset + D, own, q_n, tokens, width, MAIN, TAIL)
        v = heads.load_head(qkv + offset + 2 * D, own, q_n, tokens, width, MAIN, TAIL)
        keys = keys + (k,)
        masked_keys = masked_keys + (masked(k, mask, offset, width, 2, MAIN, TAIL),)
        masked_values = masked_values + (masked(v, mask, offset, width, 1, MAIN, TAIL),)
        acc_k = acc_k + (zeros(KEY_TILES[t], MAIN, TAIL),)
        acc_v = acc_v + (zeros(KEY_TILES[t], MAIN, TAIL),)
    q_sums = (tl.zeros([MAIN], tl.float32),)
    if TAIL > 0:
        q_sums = q_sums + (tl.zeros([TAIL], tl.float32),)

    for start in range(0, tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = heads.load_head(qkv + offset, rows, q_n, tokens, width, MAIN, TAIL)
        grad = heads.load_head(grad_out + offset, rows, g_n, tokens, width, MAIN, TAIL)
        o = heads.load_head(out + offset, rows, o_n, tokens, width, MAIN, TAIL)
        lse_2 = tl.load(lse + rows, mask=rows < tokens, other=0.0) * LOG2_E
        delta = row_dots(grad, o)
        acc_q, next_k, next_v = zeros(BLOCK_M, MAIN, TAIL), (), ()
        for t in tl.static_range(len(KEY_TILES)):
            scores = outer(masked_keys[t], q, PRECISION)
            weights = tl.exp2(scores * (scale * LOG2_E) - lse_2[None, :])
            if t == len(KEY_TILES) - 1:
                # A key beyond the last has score 0, and 2^(0 - lse) may be infinite.
                inside = _own_rows(t, KEY_TILES) < tokens
                weights = tl.where(inside[:, None], weights, 0.0)
            rounded = round_to(weights, grad[0].dtype)
            next_v = next_v + (accumulate(rounded, grad, acc_v[t], PRECISION),)
            grad_scores = weights * (outer(masked_values[t], grad, PRECISION) - delta[None, :])
            grad_scores = round_to(grad_scores, q[0].dtype)
            next_k = next_k + (accumulate(grad_scores, q, acc_k[t], PRECISION),)
            acc_q = accumulate(tl.trans(grad_scores), keys[t], acc_q, PRECISION)
        acc_k, acc_v = next_k, next_v
        if mask is not None:
            # Here and not from k A_k in the end, where no register is left to read k into.
            more, sums = column_dots(q, acc_q), ()
            for i in tl.static_range(len(more)):
                sums = sums + (q_sums[i] + more[i],)
            q_sums = sums
        store_gradient(
            grad_qkv + offset, rows, 3 * D, tokens, acc_q, scale, mask, offset, width, 2, MAIN, TAIL
        )

    # Read anew, so that the compiler holds no addresses in registers during the loop.
    offset = heads.multiple_of_8(tl.load(row + 1), ALIGNED)
    qkv += offset + 2 * D
    grad_qkv += offset + D
    for t in tl.static_range(len(KEY_TILES)):
        own = _own_rows(t, KEY_TILES)
        store_gradient(
            grad_qkv, own, 3 * D, tokens, acc_k[t], scale, mask, offset, width, 2, MAIN, TAIL
        )
    if mask is not None:
        tl.debug_barrier()  # A_k goes before v comes.
        v_sums = (tl.zeros([MAIN], tl.float32),)
        if TAIL > 0:
            v_sums = v_sums + (tl.zeros([TAIL], tl.float32),)
    for t in tl.static_range(len(KEY_TILES)):
        own = _own_rows(t, KEY_TILES)
        if mask is not None:
            v = heads.load_head(qkv, own, q_n, tokens, width, MAIN, TAIL)
            more, sums = column_dots(v, acc_v[t]), ()
            for i in tl.static_range(len(more)):
                sums = sums + (v_sums[i] + more[i],)
            v_sums = sums
        store_gradient(
            grad_qkv + D, own, 3 * D, tokens, acc_v[t], 1.0, mask, offset, width, 1, MAIN, TAIL
        )
    if mask is not None:
        store_mask_gradient(
            partial + image * D, q_sums, v_sums, scale, mask, offset, width, MAIN, TAIL
        )


@triton.jit(
    do_not_specialize=[
        "live_heads", "all_heads", "D", "tokens", "g_b", "g_n", "q_b", "q_n", "o_b", "o_n", "scale",
    ]
)  # fmt: skip
def _ragged_attention_backward_resident_kernel(
    grad_out,  # [B, N, D]
    qkv,  # [B, N, 3 D]
    out,  # [B, N, D]
    lse,  # float32 [B, H, N]
    mask,  # float32 [D] or None
    table,  # int32 [H, 3]: number, offset and width of each head, widest first
    grad_qkv,  # [B, N, 3 D]
    partial,  # float32 [B, D] or None
    live_heads, all_heads, D, tokens, g_b, g_n, q_b, q_n, o_b, o_n, scale,
    ALIGNED: tl.constexpr, NARROWEST: tl.constexpr, WIDEST: tl.constexpr,
    PRECISION: tl.constexpr, KEY_TILES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // live_heads).to(tl.int64)
    row = table + 3 * (tl.program_id(0) % live_heads)
    # Raw, since what is computed before the branch is held in registers by every body.
    args = (
        grad_out, qkv, out, lse, grad_qkv, partial, mask, all_heads, D, tokens, scale,
        g_b, g_n, q_b, q_n, o_b, o_n,
    )  # fmt: skip
    width = tl.load(row + 2)
    for i in tl.static_range(TILE_COUNT):
        # The first condition is the compiler's, the second the program's.
        if TILES[i][1] >= NARROWEST and TILES[i][1] <= WIDEST:  # noqa: SIM102
            if TILES[i][0] < width and width <= TILES[i][1]:
                _resident(args, image, row, TILES[i][1], 0, ALIGNED, KEY_TILES, BLOCK_M, PRECISION)


_RESIDENT = "ragged_attention_backward_resident"
_STREAMING = "ragged_attention_backward_streaming"
# What fits is decided by registers: A_k and A_v alone take half of them. wgmma does well with one
# large tile of keys, and reads all of it from shared memory for every block of queries, so that the
# larger block is the better where it fits. mma wastes nothing on keys that are not there if the
# tiles are small. KEYS is the most rows of a tile. Heads that do not start at multiples of 16
# bytes, the odd ones, leave too few registers and stream.
_WGMMA: Config = {"KEYS": 256, "BLOCK_M": 32, "num_warps": 8, "num_stages": 2}
_MMA: Config = {"KEYS": 64, "BLOCK_M": 16, "num_warps": 8, "num_stages": 2}
_SM80 = {f"16-bit {tile}{case}": _MMA for tile in (16, 32, 64) for case in ("", " masked")}
_SM90 = {key: _WGMMA | {"BLOCK_M": 16 if "masked" in key else 32} for key in _SM80}
RESIDENT: Table = {"sm80": _SM80, "sm86": {}, "sm90": _SM90, "gfx942": {}}


def _streaming(tile: int, bits: int, case: str, wgmma: bool) -> Config:
    """Returns what a program holds without spilling; BLOCK_M rows are its own, BLOCK_N pass by.

    Where heads do not start at multiples of 16 bytes, every element has an address of its own.
    """
    if bits == 16 and tile <= 64:
        block_m = 32 if "odd" in case or ("masked" in case and not wgmma) else 64
        return {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if bits == 16:
        block_n = 32 if tile <= 128 else 16
        return {"BLOCK_M": 32, "BLOCK_N": block_n, "num_warps": 8, "num_stages": 2}
    if tile <= 64:
        return {"BLOCK_M": 16 if case else 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}


CONFIGS: Table = {
    generation: {
        f"{bits}-bit {tile}{case}": _streaming(tile, bits, case, generation == "sm90")
        for bits, tiles in ((16, (16, 32, 64, 128, 256)), (32, (16, 32, 64, 128)))
        for tile in tiles
        for case in ("", " masked", " odd", " masked odd")
    }
    for generation in configs.SHARED_MEMORY
}
CANDIDATES: dict[str, tuple[Config, ...]] = {
    _RESIDENT: (
        _MMA,
        _MMA | {"BLOCK_M": 32},
        _WGMMA,
        _WGMMA | {"BLOCK_M": 16},
        _WGMMA | {"KEYS": 128},
    ),
    _STREAMING: (
        {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    ),
}


@lru_cache(maxsize=1024)
def _widths(head_dims: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Returns the powers of two between which the heads that have columns choose."""
    tiles = {max(16, triton.next_power_of_2(width)) for width in head_dims if width > 0}
    heads.tile_width(max(head_dims), itemsize)  # complains of what nothing holds
    return max(tiles) if len(tiles) == 1 else 16, max(tiles)


def _resident_tokens(widest: int, generation: str) -> int:
    """Returns for how many tokens the resident kernel is."""
    return WGMMA_TOKENS if generation == "sm90" else MMA_TOKENS[widest]


@lru_cache(maxsize=1024)
def _key_tiles(tokens: int, most: int) -> tuple[int, ...]:
    """Returns the sizes of tiles of at most `most` rows for all keys, e.g. (64, 64, 64, 16)."""
    full, rest = divmod(tokens, most)
    last = (max(16, triton.next_power_of_2(rest)),) if rest else ()
    return (most,) * full + last


def _readable(x: Tensor) -> Tensor:
    """Returns x, copied if a kernel's 32-bit offsets inside an image do not reach it."""
    in_place = x.stride(2) == 1 and x.shape[1] * x.stride(1) < 2**31
    return x if in_place else x.contiguous()


def ragged_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    head_dims: Sequence[int],
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns grad_qkv [B, N, 3 D] and grad_mask [D], which is empty without a mask."""
    batch, tokens, columns = qkv.shape
    dims, device, D = tuple(head_dims), qkv.device, columns // 3
    grad_qkv = torch.empty((batch, tokens, columns), dtype=qkv.dtype, device=device)
    if grad_qkv.numel() == 0:
        return grad_qkv, lse.new_zeros(0 if mask is None else D)
    grad_out, qkv, out, lse = _readable(grad_out), _readable(qkv), _readable(out), lse.contiguous()
    mask = None if mask is None else mask.contiguous()
    live_heads = len(dims) - dims.count(0)
    pairs = batch * live_heads
    bits = f"{8 * qkv.element_size()}-bit"
    narrowest, widest = _widths(dims, qkv.element_size())
    aligned = heads.vectorises(dims, grad_out, qkv, out)
    key = f"{bits} {widest}{'' if mask is None else ' masked'}{'' if aligned else ' odd'}"
    first: tuple[int, ...] = ()
    # Where half of the multiprocessors would stand idle, more and shorter programs are faster.
    if (
        key in RESIDENT[configs.generation(device)]
        and tokens <= _resident_tokens(widest, configs.generation(device))
        and 2 * pairs >= configs.processors(device)
    ):
        kernel, programs, parts = _ragged_attention_backward_resident_kernel, pairs, batch
        meta: dict[str, Any] = dict(configs.choose(_RESIDENT, RESIDENT, key, device))
        meta["KEY_TILES"] = _key_tiles(tokens, meta.pop("KEYS"))
    else:
        kernel = _ragged_attention_backward_streaming_kernel
        meta = dict(configs.choose(_STREAMING, CONFIGS, key, device))
        blocks = triton.cdiv(tokens, meta["BLOCK_M"])
        programs, parts, first = 2 * pairs * blocks, batch * blocks, (blocks,)
    # Every program's part of the mask's gradient; those of all heads fill a row.
    partial = None if mask is None else lse.new_empty((parts, D))
    launch(
        kernel,
        (programs,),
        grad_out,
        qkv,
        out,
        lse,
        mask,
        heads.head_table(dims, device),
        grad_qkv,
        partial,
        *first,
        live_heads,
        len(dims),
        D,
        tokens,
        *grad_out.stride()[:2],
        *qkv.stride()[:2],
        *out.stride()[:2],
        scale,
        ALIGNED=aligned,
        NARROWEST=narrowest,
        WIDEST=widest,
        PRECISION=precision(qkv),
        **meta,
    )
    return grad_qkv, lse.new_empty(0) if partial is None else partial.sum(0)
