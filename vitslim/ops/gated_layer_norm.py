"""`gated_layer_norm`: layer norm with a soft token mask on its rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ._checks import accumulated, check, check_like
from ._dispatch import LIBRARY, define

_OP = "gated_layer_norm"
define(
    _OP,
    "gated_layer_norm_forward",
    "(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? gate) "
    "-> (Tensor out, Tensor mean, Tensor rstd)",
)
define(
    _OP,
    "gated_layer_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, Tensor? gate, Tensor mean, "
    "Tensor rstd) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_gate)",
)


def gated_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None = None
) -> Tensor:
    """Computes layer_norm(x) * gate[token].

    Args:
        x: [B, N, C].
        weight: [C].
        bias: [C].
        eps: Added to the variance.
        gate: [N], one value per token, or None for ones. Kept in float32 whatever x is.

    Returns:
        [B, N, C] in x's dtype.

    Raises:
        ValueError: A shape or device does not fit.
    """
    check(x.dim() == 3, _OP, f"x must be [batch, tokens, channels], got {list(x.shape)}")
    check_like(_OP, "weight", weight, (x.shape[2],), x)
    check_like(_OP, "bias", bias, (x.shape[2],), x)
    if gate is not None:
        check_like(_OP, "gate", gate, (x.shape[1],), x)
        gate = accumulated(gate, x)
    out: Tensor = torch.ops.vitslim.gated_layer_norm_forward(x, weight, bias, eps, gate)[0]
    return out


@register_fake("vitslim::gated_layer_norm_forward", lib=LIBRARY)
def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    statistics = [x.new_empty(*x.shape[:2], 1, dtype=wide) for _ in range(2)]
    return x.new_empty(x.shape), statistics[0], statistics[1]


@register_fake("vitslim::gated_layer_norm_backward", lib=LIBRARY)
def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_gate = mean.new_empty(0 if gate is None else gate.shape[0])
    grad_weight, grad_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return x.new_empty(x.shape), grad_weight, grad_bias, grad_gate


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, bias, _eps, gate = inputs
    _out, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, gate, mean, rstd)


def _backward(ctx: Any, grad_out: Tensor, *_grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, gate, mean, rstd = ctx.saved_tensors
    backward = torch.ops.vitslim.gated_layer_norm_backward
    grad_x, grad_weight, grad_bias, grad_gate = backward(
        grad_out, x, weight, bias, gate, mean, rstd
    )
    return grad_x, grad_weight, grad_bias, None, None if gate is None else grad_gate


register_autograd(
    "vitslim::gated_layer_norm_forward", _backward, setup_context=_setup_context, lib=LIBRARY
)


@register_flop_formula(
    [torch.ops.vitslim.gated_layer_norm_forward, torch.ops.vitslim.gated_layer_norm_backward]
)
def _flops(*_: Sequence[int], **__: Any) -> int:
    # As torch counts its own layer norm: only products of matrices are FLOPs.
    return 0
