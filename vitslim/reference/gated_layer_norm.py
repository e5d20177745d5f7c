"""Layer norm whose rows are scaled by a gate per token.

    n = (x - mean) rstd        y = n w + b        out = y gate[token]

Backward, with G the gradient of out and E = G gate:

    grad_gate = sum over batch and channels of G y     grad_b = sum of E     grad_w = sum of E n
    grad_x = rstd (E w - mean(E w) - n mean(E w n))
"""

import torch
from torch import Tensor


def gated_layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [B, N, C] in x's dtype, and mean and rstd [B, N, 1] for backward."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed, mean, rstd = torch.native_layer_norm(
        x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    if gate is not None:
        normed = normed * gate.unsqueeze(-1)
    return normed.to(x.dtype), mean, rstd


def gated_layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight, bias and of the gate, empty without a gate."""
    wide = mean.dtype
    x_wide, grad = x.to(wide), grad_out.to(wide)
    grad_gate = grad.new_empty(0)
    if gate is not None:
        # The normed rows are recomputed rather than saved: G y = G n w + G b.
        row_sum = ((x_wide - mean) * rstd * grad) @ weight.to(wide) + grad @ bias.to(wide)  # [B, N]
        grad_gate = row_sum.sum(0)  # [N]
        grad = grad * gate.unsqueeze(-1)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, x_wide, x.shape[-1:], mean, rstd, weight.to(wide), bias.to(wide), [True] * 3
    )
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_gate
