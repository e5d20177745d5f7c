"""Ragged attention in ATen operators: for export, masks, dropout, devices without a kernel.

Rows of zeros in the projection's weight pad every head to the same width, so that the projection
itself gives heads which scaled_dot_product_attention takes. That costs a copy of the weights a call
and the padding's MACs; activations are padded nowhere.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    qkv: nn.Linear,
    proj: nn.Linear,
    heads: int,
    places: tuple[Tensor, Tensor],
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Projects, attends with every head padded to the widest, and projects back.

    Args:
        x: [B, N, C].
        qkv: The projection to 3 D columns, as `ops.ragged_attention` takes them.
        proj: The projection of D columns back.
        heads: How many heads D is made of.
        places: As `padded_places` gives them.
        scale: Multiplies the scores.
        attn_mask: As scaled_dot_product_attention takes it.
        is_causal: Likewise.
        dropout_p: Likewise.

    Returns:
        [B, N, C].
    """
    rows, columns = places
    weight, bias, out_weight = qkv.weight, qkv.bias, proj.weight
    if rows.numel() > 0:
        weight = F.pad(weight, (0, 0, 0, 1)).index_select(0, rows)
        bias = None if bias is None else F.pad(bias, (0, 1)).index_select(0, rows)
        out_weight = F.pad(out_weight, (0, 1)).index_select(1, columns)
    batch, tokens, _ = x.shape
    width = out_weight.shape[1] // heads
    packed = F.linear(x, weight, bias).view(batch, tokens, 3, heads, width)
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # [B, H, N, width]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, proj.bias)
