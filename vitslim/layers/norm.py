"""Layer norm that takes a gate per token, for the soft token masks of the search."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import gated_layer_norm
from .path import fused


def why_not_norm(module: nn.Module) -> str | None:
    """Returns why a norm cannot carry token gates, or None if it can."""
    if not isinstance(module, nn.LayerNorm):
        return f"its norm is a {type(module).__name__}, not a LayerNorm"
    if module.weight is None or module.bias is None:
        return "its norm has no weight or no bias"
    if {"weight", "bias"} - module._parameters.keys():
        return "its norm is pruned or parametrized; make its weight and bias parameters again"
    return None


class GatedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose output rows are multiplied by a gate: layer_norm(x) * gate[token]."""

    @classmethod
    def from_timm(cls, norm: nn.LayerNorm) -> "GatedLayerNorm":
        """Takes over the parameters of a layer norm, timm's or torch's."""
        gated = cls(norm.normalized_shape, eps=norm.eps, device="meta")
        gated.weight, gated.bias = norm.weight, norm.bias
        gated.training = norm.training
        return gated

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Maps x [B, N, C] and gate [N] or None to [B, N, C]."""
        if gate is not None and fused("GatedLayerNorm", x):
            return gated_layer_norm(x, self.weight, self.bias, self.eps, gate)
        out = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return out if gate is None else out * gate.unsqueeze(-1).to(out.dtype)
