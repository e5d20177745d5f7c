"""Ragged attention in ATen operators: for export, masks, dropout, devices without a kernel.

Rows of zeros in the projection's weight pad every head to the same width, so that the projection
itself gives heads which scaled_dot_product_attention takes. That costs a copy of the weights a call
and the padding's MACs; activations are padded nowhere.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .maps import attend
from .plain import is_plain

# SDPA's kernels want widths of whole 16 bytes.
_MULTIPLE = 8


def padded_places(
    head_dims: Sequence[int], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns which row of the projection each padded place takes, one past the last for zero.

    Returns:
        [3 * heads * width] for qkv's rows, and [heads * width] for the output's columns, int64;
        empty where the heads are equal and need no padding.
    """
    width, total = -(-max(head_dims) // _MULTIPLE) * _MULTIPLE, sum(head_dims)
    places: list[int] = []  # -1 for zero
    begin = 0
    for dim in head_dims:
        places += [*range(begin, begin + dim), *[-1] * (width - dim)]
        begin += dim
    if total == len(head_dims) * max(head_dims):
        places = []
    rows = [3 * total if p < 0 else p + part * total for part in range(3) for p in places]
    columns = [total if p < 0 else p for p in places]
    return (
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(columns, dtype=torch.int64, device=device),
    )


def padded_attention(
    x: Tensor,
    qkv: nn.Module,
    proj: nn.Module,
    head_dims: Sequence[int],
    places: tuple[Tensor, Tensor],
    scale: float,
    maps: nn.Module | None = None,
    dropout_p: float = 0.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Projects, attends with every head padded to the widest, and projects back.

    Args:
        x: [B, N, C].
        qkv: The projection to 3 D columns, as `ops.ragged_attention` takes them. One that is no
            plain layer is called, and its output is padded instead of its weight.
        proj: The projection of D columns back; likewise.
        head_dims: The width of every head.
        places: As `padded_places` gives them.
        scale: Multiplies the scores.
        maps: As `attend` takes it.
        dropout_p: Likewise.
        attn_mask: As scaled_dot_product_attention takes it.
        is_causal: Likewise.

    Returns:
        [B, N, C].
    """
    (rows, columns), heads = places, len(head_dims)
    batch, tokens, _ = x.shape
    padded = rows.numel() > 0
    folded = is_plain(qkv) and is_plain(proj)
    if not folded:
        packed = qkv(x)
        packed = F.pad(packed, (0, 1)).index_select(2, rows) if padded else packed
    elif padded:
        bias = None if qkv.bias is None else F.pad(qkv.bias, (0, 1)).index_select(0, rows)
        packed = F.linear(x, F.pad(qkv.weight, (0, 0, 0, 1)).index_select(0, rows), bias)
    else:
        packed = F.linear(x, qkv.weight, qkv.bias)
    width = (len(columns) if padded else sum(head_dims)) // heads
    q, k, v = packed.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    out = attend(q, k, v, scale, maps, dropout_p, attn_mask, is_causal)  # [B, H, N, width]
    if not folded:
        ragged = [out[:, head, :, :dim] for head, dim in enumerate(head_dims)]
        return proj(torch.cat(ragged, 2) if padded else out.transpose(1, 2).flatten(2))
    out = out.transpose(1, 2).flatten(2)
    if padded:
        out_weight = F.pad(proj.weight, (0, 1)).index_select(1, columns)
        return F.linear(out, out_weight, proj.bias)
    return F.linear(out, proj.weight, proj.bias)
