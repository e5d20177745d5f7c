"""Attention over heads of ragged widths against everything a user could write instead.

All contenders read the same packed projection and give the same packed output, except "pre-padded",
whose projection was widened beforehand so that nothing has to be gathered, and the dense ones.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shapes import DEIT, HEAD_DIM, SCALE, TOKENS, Shape
from torch import Tensor

from vitslim import native

Call = Callable[[Tensor], Tensor]


def sdpa_of_equal_heads(qkv: Tensor, heads: int) -> Tensor:
    """The way of timm: qkv [B, N, 3 * heads * width] -> [B, N, heads * width]."""
    batch, tokens, columns = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, columns // (3 * heads)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    return out.transpose(1, 2).reshape(batch, tokens, columns // 3)


def padded_sdpa(head_dims: tuple[int, ...]) -> Call:
    """Pads every head to the widest: one scatter, SDPA, one gather."""
    widest, heads = max(head_dims), len(head_dims)
    place = torch.cat([torch.arange(w) + h * widest for h, w in enumerate(head_dims)])
    places = torch.cat([place + i * heads * widest for i in range(3)])

    def call(qkv: Tensor) -> Tensor:
        padded = qkv.new_zeros(*qkv.shape[:2], 3 * heads * widest).index_copy(2, places, qkv)
        return sdpa_of_equal_heads(padded, heads).index_select(2, place)

    return call


def grouped_sdpa(head_dims: tuple[int, ...], unit: int) -> Call:
    """One SDPA for all heads that have the same width once rounded up to `unit`."""
    embed_dim, begins, begin = sum(head_dims), [], 0
    for width in head_dims:
        begins.append(begin)
        begin += width
    groups: dict[int, list[int]] = {}
    for head, width in enumerate(head_dims):
        groups.setdefault(-(-width // unit) * unit, []).append(head)

    def call(qkv: Tensor) -> Tensor:
        outs: list[Tensor] = [qkv] * len(head_dims)
        for width, heads in groups.items():
            q, k, v = (
                torch.stack(
                    [
                        F.pad(
                            qkv.narrow(2, i * embed_dim + begins[h], head_dims[h]),
                            (0, width - head_dims[h]),
                        )
                        for h in heads
                    ],
                    1,
                )
                for i in range(3)
            )
            out = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
            for i, h in enumerate(heads):
                outs[h] = out[:, i, :, : head_dims[h]]
        return torch.cat(outs, 2)

    return call


def looped_sdpa(head_dims: tuple[int, ...]) -> Call:
    """One SDPA per head, on views of the projection."""
    widths = list(head_dims)

    def call(qkv: Tensor) -> Tensor:
        q, k, v = (part.split(widths, 2) for part in qkv.chunk(3, 2))
        outs = [
            F.scaled_dot_product_attention(a, b, c, scale=SCALE)
            for a, b, c in zip(q, k, v, strict=True)
        ]
        return torch.cat(outs, 2)

    return call


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


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", DEIT, ids=lambda shape: shape.name)
def bench_forward(compare, shape, batch):
    calls = {}
    for name, (call, columns) in contenders(shape).items():
        x = torch.randn(batch, TOKENS, columns)
        calls[name] = lambda call=call, x=x: call(x)
    name = f"ragged_attention forward {shape.name} batch {batch}"
    with torch.no_grad():
        compare(name, calls, "padded SDPA", info(shape, batch, 2))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", DEIT, ids=lambda shape: shape.name)
def bench_forward_backward(compare, shape, batch):
    calls = {}
    for name, (call, columns) in contenders(shape).items():
        x = torch.randn(batch, TOKENS, columns, requires_grad=True)
        grad = torch.randn_like(call(x))
        calls[name] = lambda call=call, x=x, grad=grad: torch.autograd.grad(call(x), x, grad)
    name = f"ragged_attention forward+backward {shape.name} batch {batch}"
    compare(name, calls, "padded SDPA", info(shape, batch, 7))
