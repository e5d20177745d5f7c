"""The gated layer norm on a GPU, forward and backward, against F.layer_norm times the gate.

bfloat16 as the other ops; and float32, which is what a norm is given under autocast, where the
residual stream stays in float32.
"""

import pytest
import torch
import torch.nn.functional as F
from baselines import aims_of_each, compiled, ours, timed
from floor import Pass
from shapes import GPU_BATCHES, GPU_DEIT, TOKENS

from vitslim.ops import gated_layer_norm

OP = "gated_layer_norm"
EPS = 1e-6
CASES = [(batch, torch.bfloat16) for batch in GPU_BATCHES] + [(max(GPU_BATCHES), torch.float32)]
RIVAL = "F.layer_norm * gate, compiled"


def eager(x, weight, bias, gate):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS) * gate.unsqueeze(-1).to(x.dtype)


@pytest.mark.parametrize(("batch", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("shape", GPU_DEIT, ids=lambda shape: shape.name)
def bench_forward_backward(compare, gpu, shape, batch, dtype):
    size = (batch, TOKENS, shape.embed_dim)
    x, grad = (torch.randn(size, device=gpu).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape.embed_dim, device=gpu).to(dtype) for _ in range(2))
    inputs = [x, weight, bias, torch.rand(TOKENS, device=gpu) + 0.5]
    call = timed(lambda x, w, b, gate: gated_layer_norm(x, w, b, EPS, gate), inputs, grad)
    calls = {
        **ours(call, OP, gpu, dtype),
        "F.layer_norm * gate": timed(eager, inputs, grad),
        RIVAL: timed(compiled(eager), inputs, grad),
        "F.layer_norm, no gate": timed(
            lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS), inputs[:3], grad
        ),
    }
    dtype_name = str(dtype).removeprefix("torch.")
    compare(
        f"{OP} forward+backward {shape.name} batch {batch} {dtype_name}",
        calls,
        "F.layer_norm * gate",
        {"batch": batch, "dtype": dtype_name},
        rounds=7,
        slice_s=0.02,
        device=gpu,
        dtype=dtype,
        # x and out; then grad_out, x and grad_x.
        passes=[Pass(2 * x.nbytes), Pass(3 * x.nbytes)],
        aims=aims_of_each("no slower than compiled", (RIVAL,), 1.0),
    )
