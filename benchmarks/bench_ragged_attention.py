"""Attention over heads of ragged widths against everything a user could write instead."""

import importlib

import pytest
import torch
from baselines import Call, grouped_sdpa, looped_sdpa, padded_sdpa, sdpa_of_equal_heads, timed
from shapes import BATCHES, DEIT, HEAD_DIM, SCALE, TOKENS, Shape

from vitslim import native


class NativeAttention(torch.autograd.Function):
    """The two native calls joined by the least autograd can cost."""

    @staticmethod
    def forward(ctx, qkv, head_dims, mask):
        out, lse = native.ragged_attention_forward(qkv, head_dims, SCALE, mask)
        ctx.save_for_backward(qkv, out, lse, mask)
        ctx.head_dims = head_dims
        return out

    @staticmethod
    def backward(ctx, grad_out):
        qkv, out, lse, mask = ctx.saved_tensors
        grad_qkv, grad_mask = native.ragged_attention_backward(
            grad_out, qkv, out, lse, ctx.head_dims, SCALE, mask
        )
        return grad_qkv, None, None if mask is None else grad_mask


def contenders(shape: Shape) -> dict[str, tuple[Call, int]]:
    """Every contender's name, call and width of its projection."""
    widths, heads = list(shape.head_dims), shape.heads
    slim, dense = 3 * sum(widths), 3 * heads * HEAD_DIM
    ones = torch.ones(heads * HEAD_DIM)
    found: dict[str, tuple[Call, int]] = {
        "native": (lambda x: NativeAttention.apply(x, widths, None), slim),
        "padded SDPA": (padded_sdpa(shape.head_dims), slim),
        "pre-padded SDPA": (lambda x: sdpa_of_equal_heads(x, heads), 3 * heads * max(widths)),
        "SDPA padded to 16": (grouped_sdpa(shape.head_dims, 16), slim),
        "SDPA of equal widths": (grouped_sdpa(shape.head_dims, 1), slim),
        "SDPA per head": (looped_sdpa(shape.head_dims), slim),
        "dense SDPA": (lambda x: sdpa_of_equal_heads(x, heads), dense),
        "dense native, masked": (
            lambda x: NativeAttention.apply(x, [HEAD_DIM] * heads, ones),
            dense,
        ),
    }
    for module, name in (("vitslim.ops", "public op"), ("vitslim.reference", "reference")):
        try:
            found_module = importlib.import_module(module)
        except ImportError:
            continue
        if name == "public op":
            op = found_module.ragged_attention
            found[name] = (lambda x, op=op: op(x, widths, SCALE), slim)
        else:
            # Autograd differentiates the formulas of its forward, as in a model written eagerly.
            forward = found_module.ragged_attention_forward
            found[name] = (lambda x, f=forward: f(x, widths, SCALE, None)[0], slim)
    return found


def info(shape: Shape, batch: int, products: int) -> dict[str, object]:
    """Bytes that must move at least, and the MACs of `products` matrix products per head."""
    width = sum(shape.head_dims)
    return {
        "head_dims": list(shape.head_dims),
        "batch": batch,
        "bytes": 4 * batch * TOKENS * 4 * width * (1 if products == 2 else 3),
        "macs": products * batch * TOKENS * TOKENS * width,
    }


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", DEIT, ids=lambda shape: shape.name)
def bench_forward(compare, shape, batch):
    calls = {}
    for name, (call, columns) in contenders(shape).items():
        calls[name] = timed(call, [torch.randn(batch, TOKENS, columns)], None)
    name = f"ragged_attention forward {shape.name} batch {batch}"
    with torch.no_grad():
        compare(name, calls, "padded SDPA", info(shape, batch, 2))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", DEIT, ids=lambda shape: shape.name)
def bench_forward_backward(compare, shape, batch):
    calls = {}
    for name, (call, columns) in contenders(shape).items():
        x = torch.randn(batch, TOKENS, columns)
        calls[name] = timed(call, [x], torch.randn(batch, TOKENS, columns // 3))
    name = f"ragged_attention forward+backward {shape.name} batch {batch}"
    compare(name, calls, "padded SDPA", info(shape, batch, 7))
