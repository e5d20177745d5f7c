"""`masked_mlp`: two linear layers around an activation, with a mask on the hidden units."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ._checks import accumulated, check, check_like
from ._dispatch import LIBRARY, define

_OP = "masked_mlp"
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
define(
    _OP,
    "masked_mlp_forward",
    "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? mask, str act) -> (Tensor out, Tensor pre_act)",
)
define(
    _OP,
    "masked_mlp_backward",
    "(Tensor grad_out, Tensor x, Tensor pre_act, Tensor fc1_weight, Tensor fc2_weight, "
    "Tensor? mask, str act) -> (Tensor grad_x, Tensor grad_fc1_weight, Tensor grad_fc1_bias, "
    "Tensor grad_fc2_weight, Tensor grad_fc2_bias, Tensor grad_mask)",
)


def masked_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    mask: Tensor | None = None,
    act: str = "gelu",
) -> Tensor:
    """Computes fc2(z * act(fc1(x))), z the mask of the hidden units.

    Args:
        x: [..., C].
        fc1_weight: [M, C]; fc1_bias: [M] or None.
        fc2_weight: [C_out, M]; fc2_bias: [C_out] or None.
        mask: [M], the z above, or None for ones. Kept in float32 whatever x is.
        act: One of "gelu", "gelu_tanh", "quick_gelu", "relu", "silu".

    Returns:
        [..., C_out] in x's dtype, or in autocast's where autocast is on.

    Raises:
        ValueError: A shape, device or activation does not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, fc1_weight, fc2_weight = x.to(dtype), fc1_weight.to(dtype), fc2_weight.to(dtype)
        fc1_bias = None if fc1_bias is None else fc1_bias.to(dtype)
        fc2_bias = None if fc2_bias is None else fc2_bias.to(dtype)
    check(act in ACTIVATIONS, _OP, f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    check(x.dim() >= 2, _OP, f"x must be [..., channels], got {list(x.shape)}")
    check(fc1_weight.dim() == 2 and fc2_weight.dim() == 2, _OP, "weights must be matrices")
    hidden = fc1_weight.shape[0]
    check_like(_OP, "fc1_weight", fc1_weight, (hidden, x.shape[-1]), x)
    check_like(_OP, "fc2_weight", fc2_weight, (fc2_weight.shape[0], hidden), x)
    if fc1_bias is not None:
        check_like(_OP, "fc1_bias", fc1_bias, (hidden,), x)
    if fc2_bias is not None:
        check_like(_OP, "fc2_bias", fc2_bias, (fc2_weight.shape[0],), x)
    if mask is not None:
        check_like(_OP, "mask", mask, (hidden,), x)
        mask = accumulated(mask, x)
    forward = torch.ops.vitslim.masked_mlp_forward
    out: Tensor = forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, mask, act)[0]
    return out


@register_fake("vitslim::masked_mlp_forward", lib=LIBRARY)
def _forward_fake(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    mask: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty(*rows, fc2_weight.shape[0]), x.new_empty(*rows, fc1_weight.shape[0])


@register_fake("vitslim::masked_mlp_backward", lib=LIBRARY)
def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    pre_act: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    mask: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        fc1_weight.new_empty(fc1_weight.shape),
        fc1_weight.new_empty(fc1_weight.shape[0]),
        fc2_weight.new_empty(fc2_weight.shape),
        fc2_weight.new_empty(fc2_weight.shape[0]),
        x.new_empty(0 if mask is None else mask.shape[0], dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, mask, ctx.act = inputs
    ctx.biases = fc1_bias is not None, fc2_bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], fc1_weight, fc2_weight, mask)


def _backward(ctx: Any, grad_out: Tensor, _grad_pre_act: Tensor) -> tuple[Tensor | None, ...]:
    x, pre_act, fc1_weight, fc2_weight, mask = ctx.saved_tensors
    backward = torch.ops.vitslim.masked_mlp_backward
    grads = backward(grad_out, x, pre_act, fc1_weight, fc2_weight, mask, ctx.act)
    wanted = (True, True, ctx.biases[0], True, ctx.biases[1], mask is not None)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None


register_autograd(
    "vitslim::masked_mlp_forward", _backward, setup_context=_setup_context, lib=LIBRARY
)


@register_flop_formula(torch.ops.vitslim.masked_mlp_forward)
def _forward_flops(
    x_shape: Sequence[int],
    fc1_shape: Sequence[int],
    _fc1_bias_shape: Sequence[int] | None,
    fc2_shape: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    rows = torch.Size(x_shape[:-1]).numel()
    return 2 * rows * fc1_shape[0] * (fc1_shape[1] + fc2_shape[0])


@register_flop_formula(torch.ops.vitslim.masked_mlp_backward)
def _backward_flops(
    _grad_shape: Sequence[int],
    x_shape: Sequence[int],
    _pre_act_shape: Sequence[int],
    fc1_shape: Sequence[int],
    fc2_shape: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    # Each of the two products once for its input and once for its weight.
    rows = torch.Size(x_shape[:-1]).numel()
    return 2 * 2 * rows * fc1_shape[0] * (fc1_shape[1] + fc2_shape[0])
