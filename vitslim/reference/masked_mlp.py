"""A two-layer perceptron whose hidden units carry a mask.

    u = x W1^T + b1        h = act(u)        out = (h z) W2^T + b2

Only u is saved; backward, with G the gradient of out and E = G W2 the gradient of h z:

    grad_W2 = G^T (h z)     grad_z = sum over tokens of E h      grad_u = E z act'(u)
    grad_W1 = grad_u^T x    grad_x = grad_u W1                   bias gradients: column sums
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mlp_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    mask: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    """Returns out [..., C] and the saved pre-activation u [..., M], both in x's dtype."""
    pre_act = F.linear(x, fc1_weight, fc1_bias)  # [..., M]
    hidden = _hidden(pre_act, mask, act).to(x.dtype)  # [..., M]
    return F.linear(hidden, fc2_weight, fc2_bias), pre_act


def masked_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    pre_act: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    mask: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, W1, b1, W2, b2 and of the mask, empty without a mask."""
    grad, rows = grad_out.flatten(0, -2), x.flatten(0, -2)  # [T, C]
    hidden = _hidden(pre_act, mask, act).to(x.dtype).flatten(0, -2)  # [T, M]
    grad_hidden = _accumulated(grad @ fc2_weight)  # [T, M]
    pre = _accumulated(pre_act.flatten(0, -2))
    grad_mask = grad_hidden.new_empty(0)
    if mask is not None:
        grad_mask = (grad_hidden * _ACTIVATIONS[act](pre)).sum(0)  # [M]
        grad_hidden = grad_hidden * mask
    grad_pre = (grad_hidden * _DERIVATIVES[act](pre)).to(x.dtype)  # [T, M]
    grad_x = (grad_pre @ fc1_weight).view(x.shape)
    return grad_x, grad_pre.mT @ rows, grad_pre.sum(0), grad.mT @ hidden, grad.sum(0), grad_mask


def _accumulated(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _hidden(pre_act: Tensor, mask: Tensor | None, act: str) -> Tensor:
    hidden = _ACTIVATIONS[act](_accumulated(pre_act))
    return hidden if mask is None else hidden * mask


def _gelu_derivative(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))) + x * density


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    slope = math.sqrt(2.0 / math.pi)
    tanh = torch.tanh(slope * (x + 0.044715 * x**3))
    return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * slope * (1.0 + 3 * 0.044715 * x**2)


def _quick_gelu_derivative(x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gate * (1.0 + 1.702 * x * (1.0 - gate))


def _silu_derivative(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu_derivative,
    "gelu_tanh": _gelu_tanh_derivative,
    "quick_gelu": _quick_gelu_derivative,
    "relu": lambda x: (x > 0).to(x.dtype),
    "silu": _silu_derivative,
}
