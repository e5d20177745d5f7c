"""`ragged_attention`: self-attention in which every head has its own width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ._checks import accumulated, check, check_like
from ._dispatch import LIBRARY, define

_OP = "ragged_attention"
define(
    _OP,
    "ragged_attention_forward",
    "(Tensor qkv, int[] head_dims, float scale, Tensor? mask) -> (Tensor out, Tensor lse)",
)
define(
    _OP,
    "ragged_attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int[] head_dims, float scale, "
    "Tensor? mask) -> (Tensor grad_qkv, Tensor grad_mask)",
)


def ragged_attention(
    qkv: Tensor, head_dims: Sequence[int], scale: float, mask: Tensor | None = None
) -> Tensor:
    """Computes softmax(scale (q z)(k z)^T) (v z) for every head h of width head_dims[h].

    Args:
        qkv: [B, N, 3 D] with D = sum(head_dims): all heads of q, then of k, then of v, as one
            linear layer emits them. Any strides; unit inner stride is read in place.
        head_dims: Width of each head. Zero is legal and gives no output columns.
        scale: Multiplies the scores. A slim model keeps the dense model's 1 / sqrt(head_dim).
        mask: [D], the z above, or None for ones. Kept in float32 whatever qkv is.

    Returns:
        [B, N, D] in qkv's dtype, heads side by side, as the output projection takes it.

    Raises:
        ValueError: A shape or device does not fit.
    """
    check(qkv.dim() == 3, _OP, f"qkv must be [batch, tokens, 3 D], got {list(qkv.shape)}")
    check(len(head_dims) > 0, _OP, "head_dims is empty; a head may have width 0, but one must be")
    check(min(head_dims) >= 0, _OP, f"head_dims must not be negative, got {list(head_dims)}")
    width = sum(head_dims)
    check(
        qkv.shape[2] == 3 * width,
        _OP,
        f"qkv must have 3 * sum(head_dims) = {3 * width} columns, got {qkv.shape[2]}",
    )
    if mask is not None:
        check_like(_OP, "mask", mask, (width,), qkv)
        mask = accumulated(mask, qkv)
    forward = torch.ops.vitslim.ragged_attention_forward
    out: Tensor = forward(qkv, list(head_dims), float(scale), mask)[0]
    return out


@register_fake("vitslim::ragged_attention_forward", lib=LIBRARY)
def _forward_fake(
    qkv: Tensor, head_dims: Sequence[int], scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, columns = qkv.shape
    lse_dtype = torch.promote_types(qkv.dtype, torch.float32)
    lse = qkv.new_empty(batch, len(head_dims), tokens, dtype=lse_dtype)
    return qkv.new_empty(batch, tokens, columns // 3), lse


@register_fake("vitslim::ragged_attention_backward", lib=LIBRARY)
def _backward_fake(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    head_dims: Sequence[int],
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), lse.new_empty(0 if mask is None else mask.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.head_dims, ctx.scale, mask = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, mask)


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    qkv, out, lse, mask = ctx.saved_tensors
    backward = torch.ops.vitslim.ragged_attention_backward
    grad_qkv, grad_mask = backward(grad_out, qkv, out, lse, ctx.head_dims, ctx.scale, mask)
    return grad_qkv, None, None, None if mask is None else grad_mask


register_autograd(
    "vitslim::ragged_attention_forward", _backward, setup_context=_setup_context, lib=LIBRARY
)


@register_flop_formula(torch.ops.vitslim.ragged_attention_forward)
def _forward_flops(qkv_shape: Sequence[int], *_: Any, **__: Any) -> int:
    batch, tokens, columns = qkv_shape
    return 2 * 2 * batch * tokens * tokens * (columns // 3)


@register_flop_formula(torch.ops.vitslim.ragged_attention_backward)
def _backward_flops(grad_shape: Sequence[int], *_: Any, **__: Any) -> int:
    # Five products: the scores once more, and the gradients of v, the scores, q and k.
    batch, tokens, width = grad_shape
    return 2 * 5 * batch * tokens * tokens * width
