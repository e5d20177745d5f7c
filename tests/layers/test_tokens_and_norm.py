"""Token gates, token removal and the norm that carries the gate."""

import pytest
import torch
from timm.layers import LayerNorm, RmsNorm
from torch import nn

from vitslim.layers import GatedLayerNorm, TokenGate, TokenSelect
from vitslim.layers.norm import why_not_norm


def test_gates_start_as_in_the_paper_and_spare_prefix_tokens():
    gate = TokenGate(16, num_prefix_tokens=2)
    assert torch.equal(gate()[:2], torch.ones(2))
    torch.testing.assert_close(gate()[2:], torch.full((16,), 3.0).tanh())
    gate().sum().backward()
    assert gate.raw.grad.shape == (16,)


@pytest.mark.parametrize("patches", [1, 7, 16, 196])
def test_gates_can_start_at_exactly_one(patches):
    assert torch.equal(TokenGate(patches, start="one")(), torch.ones(patches + 1))
    with pytest.raises(ValueError, match="start must be one of"):
        TokenGate(patches, start="zero")


def test_selection_removes_rows_and_keeps_prefix_tokens():
    x = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
    select = TokenSelect([11, 13], arriving=range(10, 15), num_prefix_tokens=2)
    assert torch.equal(select(x), x[:, [0, 1, 3, 5]])
    assert select.gate.shape == (4,)
    assert TokenSelect(range(5), range(5), 2)(x) is x


@pytest.mark.parametrize("cls", [nn.LayerNorm, LayerNorm], ids=["torch", "timm"])
@pytest.mark.parametrize("fused", [True, False])
def test_norm_with_and_without_gate(cls, fused, monkeypatch):
    monkeypatch.setattr("vitslim.layers.norm.fused", lambda *_: fused)
    norm = cls(16, eps=1e-6)
    nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 5, 16), torch.rand(5)
    expected = norm(x)
    gated = GatedLayerNorm.from_timm(norm)
    assert torch.equal(gated(x), expected)
    torch.testing.assert_close(gated(x, gate), expected * gate.view(1, 5, 1))
    assert gated.weight is norm.weight


def test_what_cannot_carry_gates_is_said():
    assert "RmsNorm" in why_not_norm(RmsNorm(16))
    assert "no weight" in why_not_norm(nn.LayerNorm(16, elementwise_affine=False))
    assert why_not_norm(LayerNorm(16)) is None


def test_bias_on_the_keys_is_the_log_of_the_gate():
    gate = TokenGate(4, num_prefix_tokens=2, place="keys", dtype=torch.float64)
    gate.raw.data = torch.tensor([3.0, -0.5, 1e-3, 0.0], dtype=torch.float64)
    bias = gate.key_bias()
    assert torch.equal(bias[:2], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(bias[2:5], gate.raw[:3].tanh().abs().log())
    assert torch.exp(bias[5]) < 1e-15
    bias.sum().backward()
    derivative = (1 - gate.raw[:3].tanh() ** 2) / gate.raw[:3].tanh()
    torch.testing.assert_close(gate.raw.grad[:3], derivative.detach())
    # A closed gate can open again.
    assert 0 < gate.raw.grad[3] < torch.inf
    with pytest.raises(ValueError, match="place must be one of"):
        TokenGate(4, place="values")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bias_on_the_keys_can_start_at_exactly_none(dtype):
    gate = TokenGate(7, start="one", place="keys", dtype=dtype)
    assert torch.equal(gate.key_bias(), torch.zeros(8, dtype=dtype))
