"""`packed_linear`: a linear layer on a weight packed once, with its norm, bias and residual."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ..errors import VitslimError
from ._checks import check, check_like
from ._dispatch import LIBRARY, define

_OP = "packed_linear"
PANEL = 16
# Their places are the numbers that the layout of `vit_encoder` holds.
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
define(
    _OP,
    "packed_linear_forward",
    "(Tensor x, Tensor panels, Tensor? bias, int out_features, str activation, Tensor? residual, "
    "Tensor? scale, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "bool bfloat16_products) -> Tensor",
)


def packed_linear(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    bfloat16_products: bool = False,
) -> Tensor:
    """Computes f(norm(x) W^T + b), or residual + scale * f(norm(x) W^T + b). For inference.

    Args:
        x: [..., in], float32, of any strides; the reference takes float64 too.
        panels: What `pack_weight` made of W [out, in].
        bias: [out], or None for zeros.
        out_features: Rows of W.
        activation: f, one of ACTIVATIONS.
        residual: [..., out], or None.
        scale: [out], with a residual only; None for ones.
        norm_weight: [in] of a layer norm over x, or None for no norm.
        norm_bias: [in], with norm_weight.
        norm_eps: Of that norm.
        bfloat16_products: Round the left operand to bfloat16 and sum in float32. Needs panels in
            bfloat16, which else are widened and multiplied in float32.

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check(x.dim() >= 1, _OP, "x must be [..., in], got a scalar")
    check_floats(_OP, "x", x)
    check_panels(_OP, panels, x, bfloat16_products)
    check(activation in ACTIVATIONS, _OP, f"no activation is called {activation!r}; {_CHOICE}")
    check(scale is None or residual is not None, _OP, "scale is for a residual, and there is none")
    both = (norm_weight is None) == (norm_bias is None)
    check(both, _OP, "norm_weight and norm_bias come together")
    depth = x.shape[-1]
    check(out_features >= 0, _OP, f"out_features must not be negative, got {out_features}")
    elements = panel_elements(out_features, depth, panels.dtype)
    check_like(_OP, "panels", panels, (elements,), x)
    shapes = {"bias": (bias, (out_features,)), "scale": (scale, (out_features,))}
    shapes |= {"norm_weight": (norm_weight, (depth,)), "norm_bias": (norm_bias, (depth,))}
    shapes |= {"residual": (residual, (*x.shape[:-1], out_features))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            check_like(_OP, name, tensor, shape, x)
            check(tensor.dtype == x.dtype, _OP, f"{name} is {tensor.dtype}, x {x.dtype}")
    epilogue = (bias, out_features, activation, residual, scale)
    norm = (norm_weight, norm_bias, float(norm_eps))
    forward = torch.ops.vitslim.packed_linear_forward
    out: Tensor = forward(x, panels, *epilogue, *norm, bfloat16_products)
    return out


_CHOICE = f"there are {', '.join(ACTIVATIONS)}"


def pack_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packs a weight into panels of 16 output columns, as csrc/packed_linear.h lays them out.

    Args:
        weight: [out, in].
        dtype: Of the panels. bfloat16 puts neighbours of the sum side by side.

    Returns:
        1-D, `panel_elements(out, in, dtype)` long.
    """
    check(weight.dim() == 2, _OP, f"a weight must be [out, in], got {list(weight.shape)}")
    (out_features, in_features), pair = weight.shape, _pair(dtype)
    padding = (0, -in_features % pair, 0, -out_features % PANEL)
    panels, pairs = -(-out_features // PANEL), -(-in_features // pair)
    rows = F.pad(weight.detach().to(dtype), padding).reshape(panels, PANEL, pairs, pair)
    return rows.transpose(1, 2).reshape(-1)  # [panels][pairs][PANEL][pair]


def panel_elements(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Returns how many elements the panels of a weight [out, in] take."""
    pair = _pair(dtype)
    return -(-out_features // PANEL) * PANEL * -(-in_features // pair) * pair


def check_floats(op: str, name: str, tensor: Tensor) -> None:
    """Checks that an input has a dtype which the packed ops compute in."""
    fits = tensor.dtype in (torch.float32, torch.float64)
    check(fits, op, f"{name} must be float32, got {tensor.dtype}; call .float() on it")


def check_panels(op: str, panels: Tensor, x: Tensor, bfloat16_products: bool) -> None:
    """Checks that panels are in the input's dtype or in bfloat16, as these products need."""
    fits = panels.dtype in (x.dtype, torch.bfloat16)
    check(fits, op, f"panels must be {x.dtype} or torch.bfloat16, got {panels.dtype}")
    fits = not bfloat16_products or panels.dtype == torch.bfloat16
    check(fits, op, f"bfloat16_products needs panels in bfloat16, got {panels.dtype}")


def only_forward(op: str, instead: str) -> Any:
    """Returns the backward of an op that has none: it raises one sentence."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise VitslimError(f"{op} is for inference and has no gradient; {instead}")

    return backward


def _pair(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


@register_fake("vitslim::packed_linear_forward", lib=LIBRARY)
def _forward_fake(
    x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, *_: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


register_autograd(
    "vitslim::packed_linear_forward",
    only_forward(_OP, "train with torch.nn.functional.linear and pack afterwards"),
    lib=LIBRARY,
)


@register_flop_formula(torch.ops.vitslim.packed_linear_forward)
def _forward_flops(
    x_shape: Sequence[int],
    panels_shape: Any,
    bias_shape: Any,
    out_features: int,
    *_: Any,
    **__: Any,
) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * x_shape[-1] * out_features
