"""Attention of equal heads in ATen operators: fused, or with maps for whoever looks at them."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn


def seen_by(fused_attn: bool, attn_drop: nn.Module) -> nn.Module | None:
    """Returns the module that attention maps must pass through, None where nobody looks at them.

    Args:
        fused_attn: timm's switch; False asks for maps.
        attn_drop: Hooks on it, or another module than torch's Dropout in its place, ask for them.
    """
    hooked = attn_drop._forward_hooks or attn_drop._forward_pre_hooks
    looked_at = not fused_attn or hooked or type(attn_drop) is not nn.Dropout
    return attn_drop if looked_at else None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    maps: nn.Module | None = None,
    dropout_p: float = 0.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attends as timm's Attention does.

    Args:
        q: [B, H, N, d].
        k: Likewise.
        v: Likewise.
        scale: Multiplies the scores.
        maps: The module that the attention weights [B, H, N, N] pass through, from `seen_by`.
        dropout_p: Of the weights where there is none.
        attn_mask: As scaled_dot_product_attention takes it.
        is_causal: Likewise.

    Returns:
        [B, H, N, d].
    """
    if maps is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    attn = (q * scale) @ k.transpose(-2, -1)
    attn = _with_mask(attn, attn_mask, is_causal)
    attn = maps(attn.softmax(dim=-1))
    return attn @ v


# A call in a graph of torch.fx, for which timm's arguments without a value are unknown.
@torch.fx.wrap
def _with_mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        tokens = scores.shape[-1]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -torch.inf)
    return scores + attn_mask
