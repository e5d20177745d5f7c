"""Masked and slim attention stand where timm's Attention stood."""

import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention

from vitslim.layers import MaskedAttention, SlimAttention
from vitslim.layers.attention import why_not_attention
from vitslim.layers.padded import padded_attention, padded_places
from vitslim.ops import ragged_attention, use_backend, why_not

HEADS = [[0, 1, 5, 7], [], [2], list(range(8))]


def make(dtype=torch.float64, **kwargs):
    return Attention(32, num_heads=4, qkv_bias=True, **kwargs).to(dtype).eval()


def with_output_norm(attn):
    """What scale_norm=True makes, in every version of timm."""
    attn.norm = torch.nn.LayerNorm(16)
    return attn


@pytest.mark.parametrize("granularity", ["head_dim", "uniform", "head"])
def test_masked_equals_timm_while_masks_are_one(granularity, monkeypatch):
    attn = make(torch.float32)
    x = torch.randn(2, 9, 32)
    expected = attn(x)
    masked = MaskedAttention.from_timm(attn, granularity)
    torch.testing.assert_close(masked(x), expected, atol=1e-6, rtol=0)
    # Folded and through the same SDPA, to the bit.
    monkeypatch.setattr("vitslim.layers.attention.fused", lambda *_: False)
    assert torch.equal(masked(x), expected)
    assert masked.mask.numel() == {"head_dim": 32, "uniform": 8, "head": 4}[granularity]


def test_masked_equals_the_papers_equation():
    masked = MaskedAttention.from_timm(make())
    torch.nn.init.uniform_(masked.mask)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    q, k, v = masked.qkv(x).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4) * masked.mask.unsqueeze(1)
    scores = (q @ k.mT / 8**0.5).softmax(-1)
    expected = masked.proj((scores @ v).transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(masked(x), expected, atol=1e-12, rtol=1e-12)


def test_the_fused_way_equals_the_folded_way(monkeypatch):
    masked = MaskedAttention.from_timm(make())
    torch.nn.init.uniform_(masked.mask)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    results = []
    for way in ("MaskedAttention", "dense attention", None):
        monkeypatch.setattr("vitslim.layers.attention.fused", lambda layer, _, w=way: layer == w)
        masked.zero_grad()
        out = masked(x)
        (out * torch.arange(32)).sum().backward()
        results.append((out, masked.mask.grad, masked.qkv.weight.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("heads", [HEADS, [[3], [3], [3], [3]], [list(range(8))] * 4])
def test_slim_equals_masked_with_the_rest_at_zero(heads):
    masked = MaskedAttention.from_timm(make())
    torch.nn.init.uniform_(masked.mask, -1, 1)
    slim = SlimAttention.from_timm(masked, heads)
    gone = torch.ones(4, 8, dtype=torch.bool)
    for head, dims in enumerate(heads):
        gone[head, dims] = False
    masked.mask.data[gone] = 0
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(slim(x), masked(x), atol=1e-12, rtol=1e-12)
    assert slim.qkv.weight.shape == (3 * sum(map(len, heads)), 32)
    assert slim.scale == 8**-0.5


@pytest.mark.parametrize("options", ["bool mask", "float mask", "causal"])
@pytest.mark.parametrize("kind", ["masked", "slim"])
def test_attention_masks_go_through(kind, options):
    attn = make()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    given = {
        "bool mask": {"attn_mask": torch.rand(9, 9) > 0.3},
        "float mask": {"attn_mask": torch.randn(9, 9, dtype=torch.float64)},
        "causal": {"is_causal": True},
    }[options]
    if options == "bool mask":
        given["attn_mask"].fill_diagonal_(True)
    q, k, v = attn.qkv(x).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v, **given)
    expected = attn.proj(heads.transpose(1, 2).reshape(2, 9, 32))
    whole = [list(range(8))] * 4
    new = SlimAttention.from_timm(attn, whole) if kind == "slim" else None
    new = new or MaskedAttention.from_timm(attn)
    torch.testing.assert_close(new(x, **given), expected, atol=1e-12, rtol=1e-12)


def test_slim_attention_is_the_same_with_and_without_the_op(monkeypatch):
    slim = SlimAttention.from_timm(make(), HEADS)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    results = []
    for way in (True, False):
        monkeypatch.setattr("vitslim.layers.attention.fused", lambda *_, way=way: way)
        results.append(slim(x))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_layers_obey_a_forced_backend(backend, monkeypatch):
    if reason := why_not(backend, "ragged_attention", "cpu", torch.float32):
        pytest.skip(reason)
    called = []
    module = importlib.import_module(f"vitslim.{backend}")
    forward = module.ragged_attention_forward
    monkeypatch.setattr(
        module, "ragged_attention_forward", lambda *args: called.append(1) or forward(*args)
    )
    attn = make(torch.float32)
    with use_backend(backend, "ragged_attention"):
        SlimAttention.from_timm(attn, HEADS)(torch.randn(2, 9, 32))
        MaskedAttention.from_timm(attn)(torch.randn(2, 9, 32))
    assert len(called) == 2


@pytest.mark.parametrize("dims", [(4, 0, 1, 8), (5, 5), (8, 8), (3,), (0, 9)], ids=str)
def test_padded_form_equals_the_op(dims):
    slim = SlimAttention(12, dims, 0.3, qkv_bias=True, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    layers = slim.qkv, slim.proj, slim.head_dims
    padded = padded_attention(x, *layers, padded_places(dims), 0.3)
    expected = slim.proj(ragged_attention(slim.qkv(x), dims, 0.3))
    torch.testing.assert_close(padded, expected)
    weights = [p for p in slim.parameters() if p.numel()]
    grads = torch.autograd.grad(padded.square().sum(), weights)
    for grad, want in zip(
        grads, torch.autograd.grad(expected.square().sum(), weights), strict=True
    ):
        torch.testing.assert_close(grad, want)


def test_padded_form_of_heads_that_are_all_gone():
    slim = SlimAttention(12, (0, 0), 0.3)
    with use_backend("reference", "ragged_attention"):
        expected = slim(torch.randn(2, 9, 12))
    layers = slim.qkv, slim.proj, slim.head_dims
    padded = padded_attention(torch.randn(2, 9, 12), *layers, padded_places((0, 0)), 0.3)
    torch.testing.assert_close(padded, expected)


def test_attention_dropout_acts_in_training_only():
    attn = make(torch.float32, attn_drop=0.5)
    x = torch.randn(2, 9, 32)
    for new in (MaskedAttention.from_timm(attn), SlimAttention.from_timm(attn, HEADS)):
        new.eval()
        assert torch.equal(new(x), new(x))
        new.train()
        assert not torch.equal(new(x), new(x))


def test_autocast_keeps_the_mask_float32():
    masked = MaskedAttention.from_timm(make(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = masked(torch.randn(2, 9, 32))
    out.float().pow(2).sum().backward()
    assert out.dtype == torch.bfloat16
    assert masked.mask.grad.dtype == torch.float32
    slim = SlimAttention.from_timm(masked, HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        assert slim(torch.randn(2, 9, 32)).dtype == torch.bfloat16


def test_the_signature_is_timms():
    names = ["self", "x", "attn_mask", "is_causal"]
    for cls in (MaskedAttention, SlimAttention):
        assert list(inspect.signature(cls.forward).parameters) == names
        assert list(inspect.signature(cls.__init__).parameters)[-2:] == ["device", "dtype"]


@pytest.mark.parametrize(
    ("make_attention", "said"),
    [
        (lambda: Attention(16, 2, qk_norm=True, norm_layer=torch.nn.LayerNorm), "normalises q"),
        (lambda: with_output_norm(Attention(16, 2)), "normalises the output"),
        (lambda: torch.nn.Identity(), "is a Identity, not timm's Attention"),
    ],
)
def test_what_cannot_be_masked_is_said(make_attention, said):
    assert said in why_not_attention(make_attention())
    assert why_not_attention(make()) is None


def test_gradients_reach_every_parameter_of_a_slim_attention():
    slim = SlimAttention.from_timm(make(torch.float32), HEADS)
    slim(torch.randn(2, 9, 32)).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in slim.parameters())
