"""A linear layer on a packed weight, with the layer norm before it and the residual after it.

    y = f(norm(x) W^T + b)        y = r + s * f(norm(x) W^T + b)

W [out, in] stands in panels of 16 output columns, zero beyond `out`:

    float32, float64    [ceil(out / 16)][in][16]
    bfloat16            [ceil(out / 16)][ceil(in / 2)][16][2], zero beyond `in`
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
# In the order of the numbers that the layout of `vit_encoder` holds.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


def packed_linear_forward(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    bfloat16_products: bool,
) -> Tensor:
    """Returns y [..., out] in x's dtype, which is also the dtype of all arithmetic."""
    depth = x.shape[-1]
    if norm_weight is not None:
        x = F.layer_norm(x, [depth], norm_weight, norm_bias, norm_eps)
    weight = unpack_weight(panels, out_features, depth).to(x.dtype)
    # The product of two bfloat16 numbers is exact in float32, so that only the sum rounds.
    left = x.bfloat16().to(x.dtype) if bfloat16_products else x
    y = F.linear(left, weight, bias)  # [..., out]
    y = ACTIVATIONS[activation](y)
    if residual is None:
        return y
    return residual + (y if scale is None else scale * y)


def panel_elements(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Returns how many elements the panels of a weight [out, in] take."""
    pair = 2 if dtype == torch.bfloat16 else 1
    return -(-out_features // PANEL) * PANEL * -(-in_features // pair) * pair


def unpack_weight(panels: Tensor, out_features: int, in_features: int) -> Tensor:
    """Returns the weight [out, in] that the panels hold, in their dtype."""
    expected = panel_elements(out_features, in_features, panels.dtype)
    if panels.dim() != 1 or panels.numel() != expected:
        raise ValueError(
            f"packed_linear: a weight [{out_features}, {in_features}] packed as {panels.dtype} has "
            f"{expected} elements, panels has the shape {list(panels.shape)}"
        )
    pair = 2 if panels.dtype == torch.bfloat16 else 1
    pairs, count = -(-in_features // pair), -(-out_features // PANEL)
    columns = panels.view(count, pairs, PANEL, pair).transpose(1, 2)  # [panel, column, pairs, pair]
    return columns.reshape(count * PANEL, pairs * pair)[:out_features, :in_features]
