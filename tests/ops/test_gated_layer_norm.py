"""nn.LayerNorm -> reference -> every backend: gated_layer_norm is what it says it is."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_within_budget
from torch import nn

from vitslim.ops import gated_layer_norm

OP = "gated_layer_norm"
EPS = 1e-6
SHAPES = [(2, 197, 192), (3, 1, 7), (1, 17, 33), (2, 9, 2), (4, 50, 768)]


def make(batch, tokens, channels, dtype=torch.float32, device="cpu", gated=True):
    x = (torch.randn(batch, tokens, channels, device=device) * 2 + 0.5).to(dtype)
    weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    gate = torch.rand(tokens, device=device) + 0.3 if gated else None
    return [x, weight, bias, gate], torch.randn(x.shape, device=device).to(dtype)


def eager(x, weight, bias, eps, gate):
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed if gate is None else normed * gate.to(x.dtype).unsqueeze(-1)


def gradients(function, inputs, grad):
    leaves = [None if each is None else each.detach().clone().requires_grad_() for each in inputs]
    out = function(*leaves[:3], EPS, leaves[3])
    out.backward(grad)
    names = ("x", "weight", "bias", "gate")
    grads = {n: leaf.grad for n, leaf in zip(names, leaves, strict=True) if leaf is not None}
    return {"out": out.detach()} | grads


def test_equals_layer_norm_without_a_gate():
    norm = nn.LayerNorm(24, eps=EPS, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    actual = gated_layer_norm(x, norm.weight, norm.bias, EPS)
    torch.testing.assert_close(actual, norm(x), atol=1e-13, rtol=1e-13)


def test_gate_scales_rows():
    (x, weight, bias, gate), _ = make(2, 9, 24, torch.float64)
    expected = eager(x, weight, bias, EPS, None) * gate.view(1, 9, 1)
    torch.testing.assert_close(gated_layer_norm(x, weight, bias, EPS, gate), expected)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradcheck(gated):
    inputs, _ = make(2, 4, 6, torch.float64, gated=gated)
    leaves = [None if each is None else each.double().requires_grad_() for each in inputs]
    torch.autograd.gradcheck(lambda x, w, b, g: gated_layer_norm(x, w, b, EPS, g), leaves)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_opcheck(gated, forced, device):
    forced(OP, torch.float32)
    inputs, grad = make(2, 4, 6, device=device, gated=gated)
    x, weight, bias, gate = [None if each is None else each.requires_grad_() for each in inputs]
    torch.library.opcheck(torch.ops.vitslim.gated_layer_norm_forward, (x, weight, bias, EPS, gate))
    x, weight, bias, gate = [None if each is None else each.detach() for each in inputs]
    _, mean, rstd = torch.ops.vitslim.gated_layer_norm_forward(x, weight, bias, EPS, gate)
    args = (grad, x, weight, bias, gate, mean, rstd)
    torch.library.opcheck(torch.ops.vitslim.gated_layer_norm_backward, args)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_keep_the_error_budget(shape, dtype, gated, forced, device):
    forced(OP, dtype)
    inputs, grad = make(*shape, dtype, device, gated)
    wide = [None if each is None else each.double() for each in inputs]
    exact = gradients(eager, wide, grad.double())
    plain = gradients(eager, inputs, grad)
    actual = gradients(gated_layer_norm, inputs, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name)


def test_strided_input_and_stride_zero_gradient(forced, device):
    forced(OP, torch.float32)
    (_, weight, bias, gate), _ = make(2, 9, 8, device=device)
    x = torch.randn(4, 18, 10, device=device)[::2, ::2, 1:9]
    ones = torch.ones(2, 9, 8, device=device)
    expected = gradients(gated_layer_norm, [x.contiguous(), weight, bias, gate], ones)
    strided = x.detach().requires_grad_()
    out = gated_layer_norm(strided, weight, bias, EPS, gate)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected["out"])
    torch.testing.assert_close(strided.grad, expected["x"])


def test_empty_batch(forced, device):
    forced(OP, torch.float32)
    inputs, grad = make(0, 9, 8, device=device)
    result = gradients(gated_layer_norm, inputs, grad)
    assert result["out"].shape == (0, 9, 8)
    assert (result["gate"] == 0).all()


def test_wrong_arguments_are_named():
    (x, weight, bias, gate), _ = make(2, 9, 8)
    with pytest.raises(ValueError, match=r"x must be \[batch, tokens, channels\], got \[9, 8\]"):
        gated_layer_norm(x[0], weight, bias, EPS)
    with pytest.raises(ValueError, match=r"gate must have shape \[9\], got \[8\]"):
        gated_layer_norm(x, weight, bias, EPS, gate[1:])
