"""nn.LayerNorm -> reference -> every backend: gated_layer_norm is what it says it is."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_within_budget
from torch import nn

from vitslim.ops import gated_layer_norm, use_backend, why_not

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
    if forced(OP, dtype) == "triton" and device == "cpu":
        # In the interpreter rows take long; a tile has no more than 16 of them.
        shape = (shape[0], min(shape[1], 21), shape[2])
    inputs, grad = make(*shape, dtype, device, gated)
    wide = [None if each is None else each.double() for each in inputs]
    exact = gradients(eager, wide, grad.double())
    plain = gradients(eager, inputs, grad)
    actual = gradients(gated_layer_norm, inputs, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("channels", [384, 1000, 1280], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_that_are_no_power_of_two(channels, dtype, forced, device):
    forced(OP, dtype)
    inputs, grad = make(2, 3, channels, dtype, device)
    wide = [each.double() for each in inputs]
    exact = gradients(eager, wide, grad.double())
    plain = gradients(eager, inputs, grad)
    actual = gradients(gated_layer_norm, inputs, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name)


def test_a_program_walks_over_many_rows(forced, device, monkeypatch):
    if forced(OP, torch.float32) == "triton":
        monkeypatch.setattr("vitslim.triton_kernels.configs.processors", lambda _: 2)
    inputs, grad = make(41, 33, 16, device=device)
    exact = gradients(eager, [each.double() for each in inputs], grad.double())
    plain = gradients(eager, inputs, grad)
    actual = gradients(gated_layer_norm, inputs, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("channels", [64, 100], ids=str)
def test_a_large_mean_costs_no_variance(channels, forced, device):
    forced(OP, torch.float32)
    (x, weight, bias, gate), grad = make(2, 5, channels, device=device)
    # Multiples of a quarter, so that the offset itself rounds nothing.
    small = (x * 4).round() / 4
    expected = gradients(eager, [small.double(), weight.double(), bias.double(), gate], grad)
    actual = gradients(gated_layer_norm, [small + 2.0**12, weight, bias, gate], grad)
    for name in expected:
        torch.testing.assert_close(
            actual[name].double(), expected[name].double(), rtol=0, atol=0.01
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_with_half_precision_rows(dtype, forced, device):
    # What autocast gives: rows from a linear, parameters as they are stored.
    forced(OP, dtype)
    (x, weight, bias, gate), grad = make(2, 9, 48, device=device)
    x, grad = x.to(dtype), grad.to(dtype)
    exact = gradients(eager, [each.double() for each in (x, weight, bias, gate)], grad.double())
    actual = gradients(gated_layer_norm, [x, weight, bias, gate], grad)
    assert actual["out"].dtype == actual["x"].dtype == dtype
    for name in ("weight", "bias", "gate"):
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=1e-5, atol=1e-4)
    for name in ("out", "x"):
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=1e-2, atol=1e-2)


def test_triton_names_its_widest_row(device):
    reason = why_not("triton", OP, device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    x, parameter = torch.randn(1, 1, 4097, device=device), torch.randn(4097, device=device)
    with (
        use_backend("triton", OP),
        pytest.raises(ValueError, match="4097 channels and Triton's kernels hold 4096"),
    ):
        gated_layer_norm(x, parameter, parameter, EPS)


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
