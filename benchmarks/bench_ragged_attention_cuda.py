"""Attention on a GPU in bfloat16: our kernels against those of SDPA and FlexAttention.

Dense heads with a mask do what unmasked SDPA does after the mask was folded into the weights.
Ragged heads are padded for SDPA in every way a user could; "pre-padded" had its projection widened
beforehand, which its linear layer pays for elsewhere. At batch 1 launches cost more than kernels,
so there each is also replayed from a CUDA graph. Caches are not flushed.
"""

import pytest
import torch
from baselines import (
    SDPA_KERNELS,
    aims_of_each,
    compiled,
    each_sdpa_kernel,
    grouped_sdpa,
    in_a_graph,
    ours,
    padded_sdpa,
    sdpa_of_equal_heads,
    timed,
)
from floor import Pass
from harness import Absent, Contender
from shapes import GPU_BATCHES, GPU_DEIT, HEAD_DIM, SCALE, TOKENS, ragged_widths
from torch.nn.attention.flex_attention import flex_attention

from vitslim.ops import ragged_attention

OP = "ragged_attention"
DTYPE = torch.bfloat16
# What a search leaves is rounded to 8 unless the user says otherwise.
UNIT = 8
MASKED = ", masked"
NOT_COMPILED = "compiled for the large batch alone, to keep the suite short"

passes_of = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
batch_of = pytest.mark.parametrize("batch", GPU_BATCHES)
shape_of = pytest.mark.parametrize("shape", GPU_DEIT, ids=lambda shape: shape.name)


class Work:
    """Inputs of one case, and contenders made of them.

    Args:
        device: Where.
        batch: Images.
        backward: Whether gradients are taken too.
    """

    def __init__(self, device, batch, backward):
        self.device, self.batch, self.backward = device, batch, backward

    def call(self, function, width, mask=None):
        """Returns a call on a projection of `width` columns a part, and on a mask if given."""
        shape = (self.batch, TOKENS, width)
        qkv = torch.randn(*shape[:2], 3 * width, device=self.device).to(DTYPE)
        grad = torch.randn(shape, device=self.device).to(DTYPE) if self.backward else None
        return timed(function, [qkv] if mask is None else [qkv, mask], grad)

    def ours(self, head_dims, mask=None, beside=""):
        """Returns the op with each backend forced; with a mask, its gradient is computed too."""
        call = self.call(
            lambda qkv, mask=None: ragged_attention(qkv, head_dims, SCALE, mask),
            sum(head_dims),
            mask,
        )
        return ours(call, OP, self.device, DTYPE, beside)

    def sdpa_of(self, heads, head_dim, name):
        """Returns equal heads through each of SDPA's kernels."""
        call = self.call(lambda qkv: sdpa_of_equal_heads(qkv, heads), heads * head_dim)
        return each_sdpa_kernel(name, call)

    def dense(self, heads):
        """Returns the contenders for dense heads."""
        mask = torch.rand(heads * HEAD_DIM, device=self.device) + 0.5
        head_dims = [HEAD_DIM] * heads
        found = self.ours(head_dims, mask, MASKED) | self.ours(head_dims, beside=", no mask")
        return found | self.sdpa_of(heads, HEAD_DIM, "SDPA")

    def ragged(self, head_dims, compiles):
        """Returns the contenders for ragged heads, SDPA on dense ones included."""
        heads, width = len(head_dims), sum(head_dims)
        widest = -(-max(head_dims) // UNIT) * UNIT
        padded = padded_sdpa(head_dims, widest, self.device)
        # FlexAttention's kernels are made for heads of a power of two.
        flexible = padded_sdpa(
            head_dims, HEAD_DIM, self.device, lambda q, k, v: flex_attention(q, k, v, scale=SCALE)
        )
        found = self.ours(list(head_dims))
        found |= each_sdpa_kernel("padded SDPA", self.call(padded, width))
        found |= {
            name: Contender(self.call(compiled(call), width)) if compiles else Absent(NOT_COMPILED)
            for name, call in (
                ("padded SDPA, compiled", padded),
                ("padded FlexAttention, compiled", flexible),
            )
        }
        for unit in (8, 16):
            call = self.call(grouped_sdpa(head_dims, unit), width)
            found[f"SDPA padded to {unit}, grouped"] = Contender(call)
        found |= self.sdpa_of(heads, widest, "pre-padded SDPA")
        return found | self.sdpa_of(heads, HEAD_DIM, "dense SDPA")

    def info(self, head_dims):
        """Returns what belongs beside the times."""
        return {"head_dims": list(head_dims), "batch": self.batch, "dtype": "bfloat16"}

    def passes(self, width):
        """Returns the least work: q, k, v, out and their gradients once, two and five products."""
        rows = self.batch * TOKENS
        forward = Pass(DTYPE.itemsize * rows * 4 * width, 2 * rows * TOKENS * width)
        backward = Pass(DTYPE.itemsize * rows * 8 * width, 5 * rows * TOKENS * width)
        return [forward, backward] if self.backward else [forward]

    def name(self, what, shape, beside=""):
        """Returns the entry's name."""
        direction = "forward+backward" if self.backward else "forward"
        return f"{what} {direction} {shape.name} batch {self.batch} bf16{beside}"

    def against(self, compare, name, contenders, baseline, head_dims, aims):
        """Compares, without gradients where none are wanted."""
        with torch.set_grad_enabled(self.backward):
            compare(
                name,
                contenders,
                baseline,
                self.info(head_dims),
                rounds=7,
                slice_s=0.02,
                device=self.device,
                dtype=DTYPE,
                passes=self.passes(sum(head_dims)),
                aims=aims,
            )


def dense_aims():
    """The aims of masked dense heads."""
    rivals = tuple(f"SDPA, {kernel}" for kernel in SDPA_KERNELS)
    return aims_of_each("masked no slower than the best unmasked SDPA", rivals, 1.0, MASKED)


def ragged_aims(contenders, backward):
    """The aims of ragged heads: over all that pad or group when called, then over pre-padded."""
    rivals = tuple(name for name in contenders if name.startswith(("padded", "SDPA padded")))
    factor = 1.3 if backward else 1.5
    beforehand = tuple(name for name in contenders if name.startswith("pre-padded"))
    return [
        *aims_of_each(f"{factor} times the best that pads or groups", rivals, factor),
        *aims_of_each("no slower than the best that was padded beforehand", beforehand, 1.0),
    ]


@passes_of
@batch_of
@shape_of
def bench_dense_masked(compare, gpu, shape, batch, backward):
    work = Work(gpu, batch, backward)
    name = work.name("dense masked attention", shape)
    head_dims = [HEAD_DIM] * shape.heads
    work.against(compare, name, work.dense(shape.heads), "SDPA, flash", head_dims, dense_aims())


@passes_of
@batch_of
@shape_of
def bench_ragged(compare, gpu, shape, batch, backward):
    work = Work(gpu, batch, backward)
    head_dims = ragged_widths(shape.heads, UNIT)
    contenders = work.ragged(head_dims, compiles=batch == max(GPU_BATCHES))
    aims = ragged_aims(contenders, backward)
    name = work.name(OP, shape, ", widths of 8")
    work.against(compare, name, contenders, "padded SDPA, flash", head_dims, aims)


@passes_of
@shape_of
def bench_ragged_any_width(compare, gpu, shape, backward):
    work = Work(gpu, max(GPU_BATCHES), backward)
    contenders = work.ragged(shape.head_dims, compiles=False)
    aims = ragged_aims(contenders, backward)
    name = work.name(OP, shape, ", any widths")
    work.against(compare, name, contenders, "padded SDPA, flash", shape.head_dims, aims)


@passes_of
@shape_of
@pytest.mark.parametrize("what", ["dense", "ragged"])
def bench_in_a_cuda_graph(compare, gpu, what, shape, backward):
    work = Work(gpu, 1, backward)
    if what == "dense":
        head_dims, contenders = (HEAD_DIM,) * shape.heads, work.dense(shape.heads)
        aims, baseline = dense_aims(), "SDPA, flash"
    else:
        head_dims = ragged_widths(shape.heads, UNIT)
        contenders = work.ragged(head_dims, compiles=False)
        aims, baseline = ragged_aims(contenders, backward), "padded SDPA, flash"
    contenders = {name: in_a_graph(each, gpu) for name, each in contenders.items()}
    name = work.name(f"{what} attention in a CUDA graph", shape)
    work.against(compare, name, contenders, baseline, head_dims, aims)
