"""The activations of masked_mlp and their derivatives, in float32.

Value and derivative share what costs: gelu's density is the exponential inside its error function,
the others' gate is one sigmoid. Whoever uses the value alone pays nothing for the derivative.
"""

import triton
import triton.language as tl


@triton.jit
def activate(u, ACT: tl.constexpr):
    """Returns act(u) and act'(u); NaN stays NaN.

    u: float32; ACT: a name of ops.masked_mlp.ACTIVATIONS.
    """
    if ACT == "relu":
        # The comparison lets NaN through, as torch does: it is not below zero, nor above.
        return tl.where(u <= 0.0, 0.0, u), tl.where(u > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        return _gelu(u)
    elif ACT == "gelu_tanh":
        return _gelu_tanh(u)
    elif ACT == "quick_gelu":
        return _gated(u, 1.702)
    else:
        tl.static_assert(ACT == "silu")
        return _gated(u, 1.0)


@triton.jit
def _reciprocal(x):
    """Returns 1 / x for x from 1 to infinity, within 3e-7 of it."""
    # A division takes nine instructions, for numbers that cannot be here.
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _sigmoid(x):
    # 1 / (1 + exp(-x)); where the exponential overflows, the right zero.
    return _reciprocal(1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def _gated(u, SLOPE: tl.constexpr):
    """u sigmoid(SLOPE u): silu and quick_gelu."""
    gate = _sigmoid(SLOPE * u)
    value = u * gate
    return value, gate + SLOPE * value * (1.0 - gate)


@triton.jit
def _gelu_tanh(u):
    # (1 + tanh(y)) / 2 is sigmoid(2 y), y = sqrt(2 / pi) (u + 0.044715 u^3).
    square = u * u
    gate = _sigmoid(u * (1.5957691216057308 + 0.07135481627159 * square))
    value = u * gate
    slope = 1.5957691216057308 + 0.21406444881478 * square
    return value, gate + value * (1.0 - gate) * slope


@triton.jit
def _gelu(u):
    """u P(u), P the normal distribution; the derivative is P(u) + u p(u), p its density.

    The tail is P(-|u|) = exp(-u^2 / 2) (a1 t + ... + a5 t^5) / 2 with t = 1 / (1 + 0.3275911 |u| /
    sqrt(2)), Abramowitz and Stegun 7.1.26, within 1e-7: what float32 rounds anyway, and half the
    instructions of an error function and an exponential.
    """
    # exp(-u^2 / 2) as a power of two, and t.
    bell = tl.exp2(-0.7213475204444817 * u * u)
    t = _reciprocal(1.0 + 0.23164190 * tl.abs(u))
    # The coefficients are halved.
    tail = 0.5307027145 * t - 0.7265760135
    tail = tail * t + 0.7107068705
    tail = tail * t - 0.142248368
    tail = (tail * t + 0.127414796) * t * bell
    normal = tl.where(u < 0.0, tail, 1.0 - tail)
    return u * normal, normal + 0.3989422804014327 * u * bell
