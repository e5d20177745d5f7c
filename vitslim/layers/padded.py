"""Ragged attention in ATen operators: for export, masks, dropout, devices without a kernel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_attention(
    qkv: Tensor,
    head_dims: Sequence[int],
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Pads every head to the widest and calls scaled_dot_product_attention.

    Args:
        qkv: [B, N, 3 D], as `ops.ragged_attention` takes it.
        head_dims: Width of each head.
        scale: Multiplies the scores.
        attn_mask: As scaled_dot_product_attention takes it.
        is_causal: Likewise.
        dropout_p: Likewise.

    Returns:
        [B, N, D].
    """
    width = max(head_dims)
    if width == 0:
        return qkv
    q, k, v = (
        torch.stack(
            [F.pad(head, (0, width - head.shape[-1])) for head in part.split(list(head_dims), -1)],
            dim=1,
        )  # [B, H, N, width]
        for part in qkv.chunk(3, -1)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    return torch.cat([out[:, head, :, :dim] for head, dim in enumerate(head_dims)], -1)
