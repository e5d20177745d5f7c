"""timm's Mlp -> reference -> every backend: masked_mlp is what it says it is."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_within_budget
from timm.layers import GELUTanh, Mlp, QuickGELU
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitslim.ops import masked_mlp
from vitslim.ops.masked_mlp import ACTIVATIONS

OP = "masked_mlp"
TIMM = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
SHAPES = [
    (2, 50, 48, 96, 48),
    (3, 1, 7, 13, 5),
    (1, 17, 33, 1, 33),
    (2, 9, 8, 40, 8),
    # More than one block of rows, of hidden units and of channels, none of them whole; then whole
    # blocks of channels.
    (2, 40, 70, 130, 50),
    (1, 70, 64, 72, 128),
]


def make(batch, tokens, channels, hidden, out, dtype=torch.float32, device="cpu", masked=True):
    def random(*shape):
        return torch.randn(shape, device=device).to(dtype)

    x, grad = random(batch, tokens, channels), random(batch, tokens, out)
    weights = [random(hidden, channels) * channels**-0.5, random(hidden) * 0.1]
    weights += [random(out, hidden) * hidden**-0.5, random(out) * 0.1]
    mask = torch.rand(hidden, device=device) + 0.3 if masked else None
    return [x, *weights, mask], grad


def eager(x, w1, b1, w2, b2, mask, act):
    hidden = TIMM[act]()(F.linear(x, w1, b1))
    return F.linear(hidden if mask is None else hidden * mask.to(hidden.dtype), w2, b2)


def gradients(function, inputs, act, grad):
    leaves = [None if each is None else each.detach().clone().requires_grad_() for each in inputs]
    out = function(*leaves, act)
    out.backward(grad)
    names = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "mask")
    grads = {n: leaf.grad for n, leaf in zip(names, leaves, strict=True) if leaf is not None}
    return {"out": out.detach()} | grads


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_equals_timm_mlp_without_a_mask(act):
    mlp = Mlp(16, 40, act_layer=TIMM[act]).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    actual = masked_mlp(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, act=act)
    torch.testing.assert_close(actual, mlp(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act):
    inputs, _ = make(2, 3, 5, 7, 4, torch.float64)
    leaves = [each.double().requires_grad_() for each in inputs]
    torch.autograd.gradcheck(lambda *args: masked_mlp(*args, act), leaves)


@pytest.mark.parametrize("full", [False, True], ids=["no bias, no mask", "all"])
def test_opcheck(full, forced, device):
    forced(OP, torch.float32)
    inputs, grad = make(2, 3, 5, 7, 4, device=device)
    if not full:
        inputs[2] = inputs[4] = inputs[5] = None
    leaves = [None if each is None else each.requires_grad_() for each in inputs]
    torch.library.opcheck(torch.ops.vitslim.masked_mlp_forward, (*leaves, "gelu"))
    x, w1, _, w2, _, mask = [None if each is None else each.detach() for each in leaves]
    args = (grad, x, torch.randn(2, 3, 7, device=device), w1, w2, mask, "gelu")
    torch.library.opcheck(torch.ops.vitslim.masked_mlp_backward, args)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_backends_keep_the_error_budget(act, shape, dtype, masked, forced, device):
    forced(OP, dtype)
    inputs, grad = make(*shape, dtype, device, masked)
    wide = [None if each is None else each.double() for each in inputs]
    exact = gradients(eager, wide, act, grad.double())
    plain = gradients(eager, inputs, act, grad)
    actual = gradients(masked_mlp, inputs, act, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name)


# An exponential that overflows leaves the right limit of a sigmoid.
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_backends_know_every_activation(act, forced, device):
    forced(OP, torch.float32)
    inputs, grad = make(1, 40, 8, 96, 8, device=device)
    # Far into both tails, and where nothing is left of either.
    inputs[0] *= torch.logspace(-1, 2, 40, device=device)[:, None]
    wide = [each.double() for each in inputs]
    exact = gradients(eager, wide, act, grad.double())
    plain = gradients(eager, inputs, act, grad)
    actual = gradients(masked_mlp, inputs, act, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_stays_in_its_row(act, forced, device):
    forced(OP, torch.float32)
    inputs, _ = make(1, 9, 8, 12, 8, device=device)
    inputs[0][0, 3, 5] = torch.nan
    out = masked_mlp(*inputs, act)[0]
    assert out[3].isnan().all()
    assert out[torch.arange(9, device=device) != 3].isfinite().all()


def test_same_bits_every_time(forced, device):
    forced(OP, torch.float32)
    inputs, grad = make(2, 75, 48, 96, 48, device=device)
    first, second = (gradients(masked_mlp, inputs, "gelu", grad) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_strided_input_and_stride_zero_gradient(forced, device):
    forced(OP, torch.float32)
    inputs, _ = make(2, 9, 8, 12, 8, device=device)
    ones = torch.ones(2, 9, 8, device=device)
    x = torch.randn(4, 18, 10, device=device)[::2, ::2, 1:9]
    expected = gradients(masked_mlp, [x.contiguous(), *inputs[1:]], "gelu", ones)
    strided = x.detach().requires_grad_()
    out = masked_mlp(strided, *inputs[1:], "gelu")
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected["out"])
    torch.testing.assert_close(strided.grad, expected["x"])


def test_empty_batch(forced, device):
    forced(OP, torch.float32)
    inputs, grad = make(0, 9, 8, 12, 8, device=device)
    result = gradients(masked_mlp, inputs, "gelu", grad)
    assert result["out"].shape == (0, 9, 8)
    assert (result["fc1_weight"] == 0).all()


def test_autocast_computes_in_its_dtype_and_keeps_the_mask_float32():
    inputs, grad = make(2, 9, 8, 12, 8)
    leaves = [each.requires_grad_() for each in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_mlp(*leaves)
    assert out.dtype == torch.bfloat16
    out.backward(grad.bfloat16())
    assert leaves[5].grad.dtype == torch.float32


def test_flop_counter_counts_both_products():
    inputs, grad = make(2, 9, 8, 12, 10)
    with FlopCounterMode(display=False) as counter:
        out = masked_mlp(*[each.requires_grad_() for each in inputs])
    assert counter.get_total_flops() == 2 * 18 * 12 * (8 + 10)
    with FlopCounterMode(display=False) as counter:
        out.backward(grad)
    assert counter.get_total_flops() == 2 * 2 * 18 * 12 * (8 + 10)


def test_wrong_arguments_are_named():
    (x, w1, b1, w2, b2, mask), _ = make(2, 9, 8, 12, 8)
    with pytest.raises(ValueError, match="act must be one of"):
        masked_mlp(x, w1, b1, w2, b2, mask, "mish")
    with pytest.raises(ValueError, match=r"mask must have shape \[12\], got \[11\]"):
        masked_mlp(x, w1, b1, w2, b2, mask[1:])
    with pytest.raises(ValueError, match=r"fc2_weight must have shape \[8, 12\]"):
        masked_mlp(x, w1, b1, w2[:, 1:], b2, mask)
