"""A whole slim model against the dense one and against the other ways to run it.

The slim model keeps 60% of the MACs; its heads differ in width as after a search, because every
head and every layer draws its own level. Tokens are all kept, so the ratio of the MACs is what a
perfect implementation would gain.
"""

import copy

import pytest
import timm
import torch
from shapes import DEIT
from torch import nn

import vitslim
from vitslim.layers import SlimAttention
from vitslim.layers.padded import padded_attention
from vitslim.masks import mask_parameters

NAMES = {"T": "deit_tiny_patch16_224", "S": "deit_small_patch16_224", "B": "deit_base_patch16_224"}


def searched(dense: nn.Module) -> nn.Module:
    """Returns the model with masks as a search leaves them: every head has a level of its own."""
    masked = vitslim.mask(dense, kinds=("attention", "mlp"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, mask in mask_parameters(masked):
            levels = torch.rand(*mask.shape[:-1], 1, generator=generator) + 0.3
            mask.copy_(levels * torch.rand(mask.shape, generator=generator))
    return masked


def padded(slim: nn.Module) -> nn.Module:
    """Returns a copy whose attention pads every head to the widest for SDPA."""
    twin = copy.deepcopy(slim)
    for module in twin.modules():
        if isinstance(module, SlimAttention):
            module.forward = lambda x, m=module: m.proj(
                padded_attention(m.qkv(x), m.head_dims, m.scale)
            )
    return twin


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", [shape.name for shape in DEIT])
def bench_inference(compare, size, batch):
    torch.compiler.reset()  # each shape is compiled for itself
    dense = timm.create_model(NAMES[size]).eval()
    masked = searched(dense).eval()
    plan = vitslim.threshold(masked, "macs=60%", round_to=8)
    slim = vitslim.slim(masked, plan).eval()
    x = torch.randn(batch, 3, 224, 224)
    models = {
        "slim": slim,
        "timm dense": dense,
        "timm dense, torch.compile": torch.compile(dense),
        "masked": masked,
        "slim, heads padded for SDPA": padded(slim),
        "slim, torch.compile": torch.compile(slim),
    }
    macs = {"dense": vitslim.cost(dense).macs, "slim": vitslim.cost(slim).macs}
    info = {
        "batch": batch,
        "macs": macs["slim"] * batch,
        "bytes": 4 * vitslim.cost(slim).params,
        "macs_ratio": round(macs["dense"] / macs["slim"], 3),
    }
    with torch.inference_mode():
        calls = {name: lambda m=model: m(x) for name, model in models.items()}
        medians = compare(
            f"model inference {size} batch {batch}", calls, "timm dense", info, rounds=9
        )
    gained = medians["timm dense"] / medians["slim"] / info["macs_ratio"]
    print(f"{size} batch {batch}: {gained:.2f} of the MACs ratio {info['macs_ratio']} is realised")
