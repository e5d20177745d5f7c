"""`ragged_attention`, forward: O = softmax(scale (q z)(k z)^T) (v z), each head with its own width.

qkv [B, N, 3 D] holds all heads of q, then of k, then of v; D = sum(head_dims); out is [B, N, D].
One launch does all heads of all images. A program reads its head's place from a table and takes the
body compiled for the narrowest tile that holds it. Neighbouring programs work on one image: its
rows' lines of memory, which the heads share, are then found in the L2 cache.

The mask z costs next to nothing: (q z)(k z)^T = q (k z^2)^T = (q z^2) k^T, so that only k or only q
is multiplied, once, and A (v z) = (A v) z, so that out is and not v.

Up to 256 tokens all keys and values of a head stay on chip, loaded once ("resident"), while the
program goes through blocks of queries. Beyond that, or where two such programs do not fit on a
multiprocessor, a program has one block of queries, and keys and values pass by ("streaming").

Either way keys are taken a tile at a time, and what the tiles before gave shrinks where a tile
raises a row's maximum. Scores of whole rows would spare that but fill the registers: two programs
on a multiprocessor of an H100 instead of three.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, heads
from .common import dot, launch, precision
from .configs import Config, Table

_LOG2_E = 1 / math.log(2)
_LN_2 = tl.constexpr(math.log(2))
# Of each tile: the widest head that a narrower one holds, the widest it holds, MAIN and TAIL.
_BELOW = zip((0, *heads.TILES), heads.TILES.items(), strict=False)
_TILES = tl.constexpr(tuple((below, widest, *tile) for below, (widest, tile) in _BELOW))
_TILE_COUNT = tl.constexpr(len(heads.TILES))


@triton.jit
def _attend(
    q, k, v, keys, scale, state,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the state after one more tile of keys: (peak [ROWS], total [ROWS], out's tiles).

    q [ROWS, d], k and v [KEYS, d] are tuples of tiles. peak is the maximum of a row's scores, total
    the sum of their exponentials over that of peak, out [ROWS, d] the sum of those times v.
    state: What it was before, () at the first tile. keys: How many there are, looked at if CUT.
    """
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    for i in tl.static_range(len(q)):
        scores = dot(q[i], tl.trans(k[i]), scores, PRECISION)
    if CUT:
        scores = tl.where((tl.arange(0, KEYS) < keys)[None, :], scores, float("-inf"))
    peak = tl.max(scores, 1)
    if len(state) > 0:
        peak = tl.maximum(state[0], peak)
    if q[0].dtype == tl.float32:
        p = tl.exp2((scores - peak[:, None]) * scale)
    else:
        # One fused operation, which loses digits that 16 bits do not have where scores are large.
        p = tl.exp2(scores * scale - (peak * scale)[:, None])
    total = tl.sum(p, 1)
    out = ()
    if len(state) > 0:
        shrink = tl.exp2((state[0] - peak) * scale)
        total += state[1] * shrink
        for i in tl.static_range(len(v)):
            before = state[2][i] * shrink[:, None]
            out = out + (dot(p.to(v[i].dtype), v[i], before, PRECISION),)
    else:
        for i in tl.static_range(len(v)):
            before = tl.zeros([ROWS, v[i].shape[1]], tl.float32)
            out = out + (dot(p.to(v[i].dtype), v[i], before, PRECISION),)
    return (peak, total, out)


@triton.jit
def _times_mask_squared(tiles, place, mask):
    """Returns tiles of q or k times z^2, rounded once; as they are without a mask."""
    _tokens, offset, width = place
    masked = tiles
    if mask is not None:
        masked = ()
        column = 0
        for i in tl.static_range(len(tiles)):
            z = heads.load_mask(mask, offset + column, width - column, tiles[i].shape[1], 0)[0]
            product = tiles[i].to(tl.float32) * (z * z)[None, :]
            masked = masked + (product.to(tiles[i].dtype),)
            column += tiles[i].shape[1]
    return masked


@triton.jit
def _load(
    base, stride, rows, place, mask, MAIN: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr
):
    """Returns some rows times z^2, in heads.load_head's tiles, none of them wider than CHUNK."""
    tokens, _offset, width = place
    tiles = ()
    WIDTH: tl.constexpr = min(MAIN, CHUNK)
    for column in tl.static_range(0, MAIN, CHUNK):
        tiles += heads.load_head(base + column, rows, stride, tokens, width - column, WIDTH, 0)
    if TAIL > 0:
        tiles += heads.load_head(base + MAIN, rows, stride, tokens, width - MAIN, TAIL, 0)
    return _times_mask_squared(tiles, place, mask)


@triton.jit
def _store(state, rows, out, lse, D, place, scale, mask):
    """Stores some rows of out, divided by the softmax's sum and masked, and of lse."""
    tokens, offset, width = place
    peak, total, tiles = state
    share = 1.0 / total
    column = 0
    for i in tl.static_range(len(tiles)):
        tile = tiles[i] * share[:, None]
        if mask is not None:
            # Loaded here, not once before the loop over queries, where it would hold registers.
            z = heads.load_mask(mask, offset + column, width - column, tile.shape[1], 0)[0]
            tile = tile * z[None, :]
        heads.store_head(out + column, rows, D, tokens, width - column, (tile,), tile.shape[1], 0)
        column += tile.shape[1]
    tl.store(lse + rows, (peak * scale + tl.log2(total)) * _LN_2, mask=rows < tokens)


@triton.jit
def _load_all(
    base, stride, place, mask, FULL: tl.constexpr, REST: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns what _load does, of all rows: FULL times BLOCK_N of them, and REST."""
    tiles = ()
    for i in tl.static_range(FULL):
        rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
        tiles = tiles + (_load(base, stride, rows, place, mask, MAIN, TAIL, MAIN),)
    if REST > 0:
        rows = FULL * BLOCK_N + tl.arange(0, REST)
        tiles = tiles + (_load(base, stride, rows, place, mask, MAIN, TAIL, MAIN),)
    return tiles


@triton.jit
def _resident(
    qkv, stride, out, lse, D, place, mask, scale, split, splits,
    FULL: tl.constexpr, REST: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Does every splits-th block of queries with FULL tiles of BLOCK_N keys and one of REST."""
    # The mask goes to k, which passes through registers anyway and only once; the tensor cores then
    # read q from where it was loaded to.
    k = _load_all(qkv + D, stride, place, mask, FULL, REST, MAIN, TAIL, BLOCK_N)
    v = _load_all(qkv + 2 * D, stride, place, None, FULL, REST, MAIN, TAIL, BLOCK_N)
    tokens = place[0]
    left = tokens - FULL * BLOCK_N
    # A pipelined loop would have the keys stored to shared memory again for every block of queries.
    for start in tl.range(split * BLOCK_M, tokens, splits * BLOCK_M, num_stages=1):
        rows = start + tl.arange(0, BLOCK_M)
        q = _load(qkv, stride, rows, place, None, MAIN, TAIL, MAIN)
        state = ()
        for i in tl.static_range(FULL):
            state = _attend(q, k[i], v[i], 0, scale, state, BLOCK_M, BLOCK_N, False, PRECISION)
        if REST > 0:
            k_rest, v_rest = k[FULL], v[FULL]
            state = _attend(q, k_rest, v_rest, left, scale, state, BLOCK_M, REST, True, PRECISION)
        _store(state, rows, out, lse, D, place, scale, mask)


@triton.jit
def _stream(
    q, rows, start, qkv, stride, D, place, mask, scale, state, CUT: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loads BLOCK_N keys and values, and q if it is (), and returns the state after them."""
    if len(q) == 0:
        q = _load(qkv, stride, rows, place, mask, MAIN, TAIL, CHUNK)
    keys = start + tl.arange(0, BLOCK_N)
    k = _load(qkv + D, stride, keys, place, None, MAIN, TAIL, CHUNK)
    v = _load(qkv + 2 * D, stride, keys, place, None, MAIN, TAIL, CHUNK)
    return _attend(q, k, v, place[0] - start, scale, state, BLOCK_M, BLOCK_N, CUT, PRECISION)


@triton.jit
def _streaming(
    qkv, stride, out, lse, D, place, mask, scale, split, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Does one block of queries."""
    # A product of float32 is three of parts of both factors, and the parts of q would stay in
    # registers throughout the loop; as would all of a wide q, for tensor cores that take it from
    # there. So it is loaded again for every tile of keys, from the nearest cache.
    AGAIN: tl.constexpr = MAIN > CHUNK or qkv.dtype.element_ty == tl.float32
    tokens = place[0]
    rows = split * BLOCK_M + tl.arange(0, BLOCK_M)
    q = ()
    if not AGAIN:
        q = _load(qkv, stride, rows, place, None, MAIN, TAIL, CHUNK)
        if tokens > 0:
            # Always so, but the compiler would otherwise keep z in registers throughout the loop,
            # to multiply q where the tensor cores take it from.
            q = _times_mask_squared(q, place, mask)
    acc = ()
    for _ in tl.static_range(0, MAIN, CHUNK):
        acc = acc + (tl.zeros([BLOCK_M, min(MAIN, CHUNK)], tl.float32),)
    if TAIL > 0:
        acc = acc + (tl.zeros([BLOCK_M, TAIL], tl.float32),)
    # The peak is finite: before tiles whose scores are all -inf, nothing has been summed.
    state = (tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32), acc)
    full = tokens // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        state = _stream(
            q, rows, start, qkv, stride, D, place, mask, scale, state, False,
            MAIN, TAIL, BLOCK_M, BLOCK_N, CHUNK, PRECISION,
        )  # fmt: skip
    if full < tokens:
        state = _stream(
            q, rows, full, qkv, stride, D, place, mask, scale, state, True,
            MAIN, TAIL, BLOCK_M, BLOCK_N, CHUNK, PRECISION,
        )  # fmt: skip
    _store(state, rows, out, lse, D, place, scale, mask)


@triton.jit(
    do_not_specialize=[
        "tokens", "D", "all_heads", "worked_heads", "splits", "stride_b", "stride_n", "scale",
    ]
)  # fmt: skip
def _ragged_attention_forward_kernel(
    qkv,  # [B, N, 3 D]
    mask,  # float32 [D] or None
    out,  # [B, N, D]
    lse,  # float32 [B, H, N]
    table,  # int32 [H, 3]: number, offset and width of each head, widest first
    tokens, D, all_heads, worked_heads, splits, stride_b, stride_n, scale,
    FULL: tl.constexpr, REST: tl.constexpr, ALIGNED: tl.constexpr, NARROWEST: tl.constexpr,
    WIDEST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % splits
    entry = table + 3 * (program // splits % worked_heads)
    image = (program // splits // worked_heads).to(tl.int64)
    number = tl.load(entry)
    offset = heads.multiple_of_8(tl.load(entry + 1), ALIGNED)
    width = heads.multiple_of_8(tl.load(entry + 2), ALIGNED)
    D = heads.multiple_of_8(D, ALIGNED)
    stride_b = heads.multiple_of_8(stride_b, ALIGNED)
    stride_n = heads.multiple_of_8(stride_n, ALIGNED)
    qkv += image * stride_b + offset
    out += image * tokens * D + offset
    lse += (image * all_heads + number) * tokens
    place = (tokens, offset, width)
    for i in tl.static_range(_TILE_COUNT):
        # Only the outer condition is known to the compiler.
        if _TILES[i][1] >= NARROWEST and _TILES[i][1] <= WIDEST:  # noqa: SIM102
            if _TILES[i][0] < width and width <= _TILES[i][1]:
                if FULL + REST > 0:
                    _resident(
                        qkv, stride_n, out, lse, D, place, mask, scale, split, splits, FULL, REST,
                        _TILES[i][2], _TILES[i][3], BLOCK_M, BLOCK_N, PRECISION,
                    )  # fmt: skip
                else:
                    _streaming(
                        qkv, stride_n, out, lse, D, place, mask, scale, split,
                        _TILES[i][2], _TILES[i][3], BLOCK_M, BLOCK_N, CHUNK, PRECISION,
                    )  # fmt: skip


_KERNEL = "ragged_attention_forward"


def _config(rows: int, keys: int, chunk: int, warps: int) -> Config:
    return {"BLOCK_M": rows, "BLOCK_N": keys, "CHUNK": chunk, "num_warps": warps, "num_stages": 2}


def _keys(
    wide: dict[int, Config], float32: dict[int, Config], odd: dict[str, Config]
) -> dict[str, Config]:
    """Returns a generation's table; the first two arguments' keys are the widest tile they serve.

    odd: For heads off multiples of 16 bytes, where every element has an address in registers.
    """
    table = {}
    for tile in heads.TILES:
        table[f"16-bit {tile} resident"] = _config(64, 64, 256, 4)
        table[f"16-bit {tile} streaming"] = next(c for w, c in wide.items() if tile <= w)
        if tile <= max(float32):
            table[f"32-bit {tile} streaming"] = next(c for w, c in float32.items() if tile <= w)
    return table | {f"{key} odd": odd.get(key, config) for key, config in table.items()}


# The largest tiles that spill no registers. wgmma, on an H100, wants 64 rows.
_MMA = _keys(
    {
        32: _config(128, 32, 256, 8),
        64: _config(128, 64, 256, 8),
        128: _config(128, 32, 256, 8),
        192: _config(32, 32, 256, 8),
        256: _config(32, 32, 256, 8),
    },
    {
        16: _config(64, 64, 64, 4),
        64: _config(32, 16, 64, 4),
        128: _config(16, 16, 64, 4),
    },
    {f"16-bit {tile} resident": _config(32, 64, 256, 8) for tile in heads.TILES}
    | {
        "16-bit 128 streaming": _config(32, 32, 256, 8),
        "32-bit 128 streaming": _config(16, 16, 64, 8),
    },
)
_WGMMA = _keys(
    {128: _config(128, 64, 256, 8), 192: _config(64, 64, 256, 8), 256: _config(64, 32, 256, 8)},
    {
        64: _config(64, 32, 64, 4),
        96: _config(64, 16, 64, 4),
        128: _config(16, 16, 64, 8),
    },
    {f"32-bit {tile} streaming": _config(32, 16, 64, 8) for tile in heads.TILES if tile <= 96},
)
CONFIGS: Table = {"sm80": _MMA, "sm86": _MMA, "sm90": _WGMMA, "gfx942": _MMA}
_TRIED = ((64, 64, 256, 4), (128, 64, 256, 8), (64, 32, 64, 4), (32, 16, 64, 4))
CANDIDATES: dict[str, tuple[Config, ...]] = {_KERNEL: tuple(_config(*each) for each in _TRIED)}

_cached_widths = lru_cache(maxsize=1024)(heads.narrowest_and_widest)


@lru_cache(maxsize=1024)
def _splits(pairs: int, blocks: int, processors: int) -> int:
    """Returns among how many programs the blocks of queries of a head of an image are shared.

    With one, keys and values are loaded once. With more, a small batch has work for all
    multiprocessors. Loading takes about as long as a block does; two programs run beside each other
    on a multiprocessor.
    """

    def time(splits: int) -> int:
        return -(-pairs * splits // (2 * processors)) * (1 + -(-blocks // splits))

    return min(range(1, blocks + 1), key=time)


def _fits(tokens: int, width: int, itemsize: int, device: torch.device) -> bool:
    """Returns whether two resident programs have room on a multiprocessor."""
    rows = -(-tokens // 16) * 16
    room = configs.SHARED_MEMORY[configs.generation(device)] // 2
    return (
        tokens <= 256
        and width <= 96
        and itemsize == 2
        and (2 * rows + 64) * width * itemsize <= room
    )


def ragged_attention_forward(
    qkv: Tensor, head_dims: Sequence[int], scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns out [B, N, D] in qkv's dtype and lse [B, H, N], the log of each softmax's sum."""
    batch, tokens, columns = qkv.shape
    dims, device, D = tuple(head_dims), qkv.device, columns // 3
    worked_heads = len(dims) - dims.count(0)
    out = torch.empty((batch, tokens, D), dtype=qkv.dtype, device=device)
    lse = torch.empty((batch, len(dims), tokens), dtype=torch.float32, device=device)
    if worked_heads < len(dims):
        lse.fill_(math.log(max(tokens, 1)))  # Without columns all scores are zero.
    if out.numel() == 0:
        return out, lse
    if qkv.stride(2) != 1 or tokens * qkv.stride(1) >= 2**31:
        qkv = qkv.contiguous()
    if scale < 0:
        # The peak of the scores is looked for before they are scaled.
        scale = -scale
        qkv = torch.cat((-qkv[..., :D], qkv[..., D:]), 2)
    narrowest, widest = _cached_widths(dims, qkv.element_size())
    resident = _fits(tokens, sum(heads.TILES[widest]), qkv.element_size(), device)
    bits, path = 8 * qkv.element_size(), "resident" if resident else "streaming"
    aligned = heads.vectorises(dims, qkv, out)
    key = f"{bits}-bit {widest} {path}{'' if aligned else ' odd'}"
    config = configs.choose(_KERNEL, CONFIGS, key, device)
    full = rest = 0
    splits = triton.cdiv(tokens, config["BLOCK_M"])
    if resident:
        full, rest = divmod(tokens, config["BLOCK_N"])
        rest = rest and max(16, triton.next_power_of_2(rest))
        splits = _splits(batch * worked_heads, splits, configs.processors(device))
    launch(
        _ragged_attention_forward_kernel, (batch * worked_heads * splits,),
        qkv, None if mask is None else mask.contiguous(), out, lse, heads.head_table(dims, device),
        tokens, D, len(dims), worked_heads, splits, qkv.stride(0), qkv.stride(1), scale * _LOG2_E,
        FULL=full, REST=rest, ALIGNED=aligned, NARROWEST=narrowest,
        WIDEST=widest, PRECISION=precision(qkv), **config,
    )  # fmt: skip
    return out, lse
