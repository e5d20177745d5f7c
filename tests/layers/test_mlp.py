"""Masked and slim MLPs stand where timm's Mlp stood."""

import pytest
import torch
from timm.layers import GluMlp, Mlp
from torch import nn

from vitslim.layers import MaskedMlp, SlimMlp
from vitslim.layers.mlp import why_not_mlp
from vitslim.ops import use_backend


def make(dtype=torch.float64, **kwargs):
    return Mlp(16, 40, **kwargs).to(dtype).eval()


def test_masked_equals_timm_bit_for_bit_while_the_mask_is_one():
    mlp = make(torch.float32)
    x = torch.randn(2, 9, 16)
    expected = mlp(x)
    assert torch.equal(MaskedMlp.from_timm(mlp)(x), expected)


@pytest.mark.parametrize("act_layer", [nn.GELU, nn.SiLU, nn.Mish], ids=lambda a: a.__name__)
def test_the_mask_multiplies_after_the_activation(act_layer):
    masked = MaskedMlp.from_timm(make(act_layer=act_layer))
    nn.init.uniform_(masked.mask)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected = masked.fc2(masked.mask * masked.act(masked.fc1(x)))
    torch.testing.assert_close(masked(x), expected, atol=1e-12, rtol=1e-12)


def test_the_fused_way_equals_the_folded_way(monkeypatch):
    masked = MaskedMlp.from_timm(make())
    nn.init.uniform_(masked.mask)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    results = []
    for way in (True, False):
        monkeypatch.setattr("vitslim.layers.mlp.fused", lambda *_, way=way: way)
        masked.zero_grad()
        out = masked(x)
        (out * torch.arange(16)).sum().backward()
        results.append((out, masked.mask.grad, masked.fc1.weight.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("keep", [[0, 3, 39], list(range(40)), [7]])
def test_slim_equals_masked_with_the_rest_at_zero(keep):
    masked = MaskedMlp.from_timm(make())
    nn.init.uniform_(masked.mask, -1, 1)
    slim = SlimMlp.from_timm(masked, keep)
    masked.mask.data[[unit for unit in range(40) if unit not in keep]] = 0
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(slim(x), masked(x), atol=1e-12, rtol=1e-12)
    assert slim.fc1.weight.shape == (len(keep), 16)
    forgetful = SlimMlp.from_timm(masked, keep, fold=False)
    assert torch.equal(forgetful.fc2.weight, masked.fc2.weight[:, keep])


def test_layers_obey_a_forced_backend():
    with use_backend("native", "masked_mlp"), pytest.raises(RuntimeError, match="cannot run"):
        MaskedMlp.from_timm(make())(torch.randn(2, 9, 16, dtype=torch.float64))


def test_dropout_acts_in_training_only():
    masked = MaskedMlp.from_timm(make(drop=0.5))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    assert torch.equal(masked(x), masked(x))
    masked.train()
    assert not torch.equal(masked(x), masked(x))


def test_what_cannot_be_masked_is_said():
    assert "GluMlp" in why_not_mlp(GluMlp(16, 40))
    assert "normalises" in why_not_mlp(make(norm_layer=nn.LayerNorm))
    assert "convolutions" in why_not_mlp(make(use_conv=True))
    assert why_not_mlp(make()) is None
