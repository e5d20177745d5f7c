"""The masked MLP on a GPU in bfloat16, forward and backward, against timm's without a mask.

"folded" multiplies the mask into the second weight, which costs nothing per token; with
torch.compile that is what a masked layer does where no fused kernel wins.
"""

import pytest
import torch
import torch.nn.functional as F
from baselines import aims_of_each, compiled, ours, timed
from floor import Pass
from shapes import GPU_BATCHES, GPU_DEIT, TOKENS
from timm.layers import Mlp
from torch import nn

from vitslim.ops import masked_mlp

OP = "masked_mlp"
DTYPE = torch.bfloat16
RIVAL = "timm's Mlp, no mask, compiled"


def folded(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, mask):
    hidden = F.gelu(F.linear(x, fc1_weight, fc1_bias))
    return F.linear(hidden, (fc2_weight * mask).to(fc2_weight.dtype), fc2_bias)


def passes(rows, channels, hidden):
    """Least work: x, out, the pre-activation and both weights move; two and four products."""
    weights, products = 2 * channels * hidden, 2 * rows * channels * hidden
    size = DTYPE.itemsize
    forward = Pass(size * (2 * rows * channels + rows * hidden + weights), products)
    backward = Pass(size * (3 * rows * channels + rows * hidden + 2 * weights), 2 * products)
    return [forward, backward]


@pytest.mark.parametrize("batch", GPU_BATCHES)
@pytest.mark.parametrize("shape", GPU_DEIT, ids=lambda shape: shape.name)
def bench_forward_backward(compare, gpu, shape, batch):
    channels, hidden = shape.embed_dim, shape.hidden
    mlp = Mlp(channels, hidden, act_layer=nn.GELU).to(gpu, DTYPE)
    parameters = [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
    mask = torch.rand(hidden, device=gpu) + 0.5
    x, grad = (torch.randn(batch, TOKENS, channels, device=gpu).to(DTYPE) for _ in range(2))
    plain, masked = [x, *parameters], [x, *parameters, mask]

    def without_a_mask(function):
        # timm's module reads its own parameters; they are inputs so that gradients are taken.
        return timed(lambda x, *_: function(x), plain, grad)

    calls = {
        **ours(timed(masked_mlp, masked, grad), OP, gpu, DTYPE),
        "timm's Mlp, no mask": without_a_mask(mlp),
        RIVAL: without_a_mask(compiled(mlp)),
        "folded": timed(folded, masked, grad),
        "folded, compiled": timed(compiled(folded), masked, grad),
    }
    compare(
        f"{OP} forward+backward {shape.name} batch {batch} bf16",
        calls,
        RIVAL,
        {"batch": batch, "dtype": "bfloat16"},
        rounds=7,
        slice_s=0.02,
        device=gpu,
        dtype=DTYPE,
        passes=passes(batch * TOKENS, channels, hidden),
        aims=aims_of_each("no slower than compiled without a mask", (RIVAL,), 1.0),
    )
