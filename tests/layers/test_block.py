"""A block whose token gates act on the keys: shares in the softmax, and their limit."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

from vitslim.layers import MaskedAttention, MaskedBlock, TokenGate

TOKENS = 7  # one of them a prefix token


def make(gates, masked=True):
    torch.manual_seed(0)
    block = Block(16, num_heads=2, qkv_bias=True).double().eval()
    tokens = TokenGate(TOKENS - 1, place="keys", dtype=torch.float64)
    tokens.raw.data = torch.tensor(gates, dtype=torch.float64).atanh()
    if masked:
        block.attn = MaskedAttention.from_timm(block.attn)
        torch.nn.init.uniform_(block.attn.mask)
    return MaskedBlock(block, tokens), torch.randn(2, TOKENS, 16, dtype=torch.float64)


def by_hand(block, x, given):
    """The block with gates before every share: g_j exp(s_ij) / sum_k g_k exp(s_ik)."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).view(2, TOKENS, 3, 2, 8).permute(2, 0, 3, 1, 4)
    if isinstance(attn, MaskedAttention):
        q, k, v = (each * attn.mask.unsqueeze(1) for each in (q, k, v))
    gate = F.pad(block.tokens.gate().abs(), (1, 0), value=1.0)
    shares = gate * (q @ k.mT / 8**0.5 + given).exp()
    out = (shares / shares.sum(-1, keepdim=True)) @ v
    x = x + attn.proj(out.transpose(1, 2).reshape(2, TOKENS, 16))
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("given", ["nothing", "bool", "float", "per head", "causal"])
def test_gates_are_shares_of_the_softmax(given, masked):
    block, x = make([0.9, -0.5, 0.1, 0.99, 0.01, 0.7], masked)
    noise = torch.randn(2, 2, TOKENS, TOKENS, dtype=torch.float64)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    hidden = torch.zeros_like(noise[0, 0]).masked_fill(~seen, -torch.inf)
    options, added = {
        "nothing": ({}, 0.0),
        "bool": ({"attn_mask": seen}, hidden),
        "float": ({"attn_mask": noise[0, 0]}, noise[0, 0]),
        "per head": ({"attn_mask": noise}, noise),
        "causal": ({"is_causal": True}, hidden),
    }[given]
    torch.testing.assert_close(block(x, **options), by_hand(block, x, added), rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", ["gate", "attn_mask"])
def test_a_gate_of_zero_is_removal(limit):
    gates = [0.9, 0.0, 0.5, 0.0, -0.6, 0.2] if limit == "gate" else [0.9, 0.3, 0.5, 0.4, -0.6, 0.2]
    block, x = make(gates)
    seen = torch.tensor([True, True, limit == "gate", True, limit == "gate", True, True])
    out = block(x, attn_mask=seen.expand(TOKENS, TOKENS))
    kept = [0, 1, 3, 5, 6]
    fewer, _ = make([gates[i - 1] for i in kept[1:]])
    torch.testing.assert_close(out[:, kept], fewer(x[:, kept]), rtol=0, atol=1e-12)


def test_gradients_of_the_gates_are_those_of_finite_differences():
    block, x = make([0.9, -0.5, 0.1, 0.99, 0.01, 0.7])

    def loss(raw):
        return torch.func.functional_call(block, {"tokens.raw": raw}, (x,)).square().sum()

    torch.autograd.gradcheck(loss, block.tokens.raw.detach().requires_grad_())


def test_a_closed_gate_feels_what_opening_it_would_do():
    block, x = make([0.9, 0.0, 0.5, 0.0, 0.6, 0.2])
    out = block(x).square().sum()
    (gradient,) = torch.autograd.grad(out, block.tokens.raw)
    for patch in (1, 3):
        block.tokens.raw.data[patch] = 1e-6
        opened = block(x).square().sum()
        block.tokens.raw.data[patch] = 0.0
        torch.testing.assert_close(gradient[patch], (opened - out) / 1e-6, rtol=1e-4, atol=1e-8)
        assert gradient[patch] != 0
