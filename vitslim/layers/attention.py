"""Attention with a learnable mask while searching, and with heads of their own widths when slim."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..allowed import GRANULARITIES
from ..ops import ragged_attention
from .carry import carry_over
from .maps import attend, seen_by
from .padded import padded_attention, padded_places
from .path import fused
from .plain import is_plain, like, why_not_cut


def why_not_attention(module: nn.Module) -> str | None:
    """Returns why an attention module can be neither masked nor cut, or None if it can.

    To be cut its layers must be plain besides, see `why_not_cut_attention`.
    """
    if type(module) is not Attention:
        return f"its attention is a {type(module).__name__}, not timm's Attention"
    for name, what in (("q_norm", "q"), ("k_norm", "k"), ("norm", "the output")):
        if not isinstance(getattr(module, name, nn.Identity()), nn.Identity):
            return f"its attention normalises {what}, and cutting a dimension changes that norm"
    if getattr(module, "gate", None) is not None:
        return "its attention output is gated"
    return None


def why_not_cut_attention(module: nn.Module) -> str | None:
    """Returns why the heads of an attention, timm's or a masked one, cannot lose dimensions."""
    why = None if isinstance(module, MaskedAttention) else why_not_attention(module)
    return why or why_not_cut({"qkv": module.qkv, "proj": module.proj})


class MaskedAttention(nn.Module):
    """timm's Attention whose q, k and v are multiplied by a learnable mask z.

        A = softmax((q z) (k z)^T / sqrt(d))        O = A (v z)

    Args:
        dim: Channels in and out.
        num_heads: Heads.
        attn_head_dim: Width of a head, dim // num_heads if None.
        qkv_bias: Whether q, k and v have biases.
        proj_bias: Whether the output projection has one.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
        granularity: "head_dim" gives every dimension of every head its value, "uniform" every
            dimension one shared by all heads, "head" every head one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        granularity: str = "head_dim",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}"
            )
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.granularity = granularity
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.attn_dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        rows = 1 if granularity == "uniform" else num_heads
        columns = 1 if granularity == "head" else self.head_dim
        self.mask = nn.Parameter(torch.ones(rows, columns, device=device, dtype=dtype))

    @classmethod
    def from_timm(cls, attn: Attention, granularity: str = "head_dim") -> "MaskedAttention":
        """Takes over the parts of timm's Attention, whatever they are; the mask starts at 1."""
        heads, head_dim = attn.num_heads, attn.head_dim
        masked = cls(heads * head_dim, heads, head_dim, granularity=granularity, device="meta")
        masked.scale, masked.fused_attn = attn.scale, attn.fused_attn
        masked.qkv, masked.proj = attn.qkv, attn.proj
        masked.attn_drop, masked.proj_drop = attn.attn_drop, attn.proj_drop
        masked.mask = nn.Parameter(like(attn).new_ones(masked.mask.shape))
        masked.training = attn.training
        return masked

    def expanded_mask(self) -> Tensor:
        """Returns the mask of every head and dimension, [num_heads, head_dim]."""
        return self.mask.expand(self.num_heads, self.head_dim)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Maps x [B, N, C] to [B, N, C]; attn_mask and is_causal are timm's."""
        batch, tokens, _ = x.shape
        maps = seen_by(self.fused_attn, self.attn_drop)
        dropout_p = self.attn_drop.p if self.training and maps is None else 0.0
        mask = self.expanded_mask().flatten()  # [D]
        special = (
            maps is not None or attn_mask is not None or is_causal is not False or dropout_p > 0
        )
        head_dims = [self.head_dim] * self.num_heads
        if not special and fused("MaskedAttention", x):
            out = ragged_attention(self.qkv(x), head_dims, self.scale, mask)
        else:
            rows = mask.repeat(3)  # [3 D]
            if is_plain(self.qkv):
                # q z = x (z W)^T + z b: the mask costs one product of the size of the weight.
                bias = None if self.qkv.bias is None else self.qkv.bias * rows
                qkv = F.linear(x, self.qkv.weight * rows.unsqueeze(1), bias)
            else:
                qkv = self.qkv(x) * rows
            if not special and fused("dense attention", x):
                out = ragged_attention(qkv, head_dims, self.scale)
            else:
                q, k, v = qkv.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
                out = attend(q, k, v, self.scale, maps, dropout_p, attn_mask, is_causal)
                out = out.transpose(1, 2).reshape(batch, tokens, self.attn_dim)
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, granularity={self.granularity!r}"


class SlimAttention(nn.Module):
    """Attention in which head h is head_dims[h] wide; nothing is padded and nothing is masked.

    Args:
        dim: Channels in and out.
        head_dims: Width of each head, 0 allowed.
        scale: Multiplies the scores: 1 / sqrt(d) of the DENSE model's heads.
        qkv_bias: Whether q, k and v have biases.
        proj_bias: Whether the output projection has one.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        head_dims: Sequence[int],
        scale: float,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dims = list(head_dims)
        self.num_heads = len(self.head_dims)
        self.attn_dim = sum(self.head_dims)
        self.scale = scale
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.attn_dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        rows, columns = padded_places(self.head_dims, device)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    @classmethod
    def from_timm(
        cls,
        attn: Attention | MaskedAttention,
        heads: Sequence[Sequence[int]],
        fold: bool = True,
    ) -> "SlimAttention":
        """Cuts an attention, masked or not, down to the dimensions kept.

        Args:
            attn: timm's Attention or a MaskedAttention; it is left as it is.
            heads: For every head the dimensions kept.
            fold: Multiply what the mask learned into the weights; else it is forgotten.
        """
        qkv, proj = attn.qkv, attn.proj
        weight, bias = qkv.weight.detach(), qkv.bias
        attn_dim, head_dim = attn.num_heads * attn.head_dim, attn.head_dim
        keep = torch.tensor(
            [head * head_dim + dim for head, dims in enumerate(heads) for dim in dims],
            dtype=torch.long,
            device=weight.device,
        )  # [D]
        rows = torch.cat([keep, keep + attn_dim, keep + 2 * attn_dim])  # [3 D]
        factor = weight.new_ones(attn_dim)
        if fold and isinstance(attn, MaskedAttention):
            factor = attn.expanded_mask().detach().flatten().to(weight.dtype)
        factor = factor.repeat(3)[rows]
        slim = cls(weight.shape[1], [len(dims) for dims in heads], attn.scale, device="meta")
        slim.fused_attn = attn.fused_attn
        cut_bias = None if bias is None else bias.detach()[rows] * factor
        slim.qkv = linear(weight[rows] * factor.unsqueeze(1), cut_bias, qkv)
        slim.proj = linear(proj.weight.detach()[:, keep], proj.bias, proj)
        slim.attn_drop, slim.proj_drop = attn.attn_drop, attn.proj_drop
        slim.init_non_persistent_buffers()
        slim.training = attn.training
        return slim

    def init_non_persistent_buffers(self) -> None:
        """Fills the buffers that no checkpoint holds, as timm asks of a module built on "meta"."""
        self.rows, self.columns = padded_places(self.head_dims, like(self.qkv).device)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Maps x [B, N, C] to [B, N, C]; attn_mask and is_causal are timm's."""
        maps = seen_by(self.fused_attn, self.attn_drop)
        dropout_p = self.attn_drop.p if self.training and maps is None else 0.0
        special = (
            maps is not None or attn_mask is not None or is_causal is not False or dropout_p > 0
        )
        if not special and fused("SlimAttention", x):
            out = self.proj(ragged_attention(self.qkv(x), self.head_dims, self.scale))
        else:
            out = padded_attention(
                x,
                self.qkv,
                self.proj,
                self.head_dims,
                (self.rows, self.columns),
                self.scale,
                maps,
                dropout_p,
                attn_mask,
                is_causal,
            )
        return self.proj_drop(out)

    def extra_repr(self) -> str:
        return f"head_dims={self.head_dims}, scale={self.scale:.6g}"


def linear(weight: Tensor, bias: Tensor | None, source: nn.Linear) -> nn.Linear:
    """Returns a linear layer with copies of `weight` [out, in] and `bias` [out].

    Args:
        weight: What was cut from the source's.
        bias: Likewise.
        source: The layer that it is made of; its hooks, its mode and what is frozen go over.
    """
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.clone().contiguous(), source.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), source.bias.requires_grad)
    layer.training = source.training
    return carry_over(source, layer)
