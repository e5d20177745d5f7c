"""What masks cost in a search step: forward, loss, penalty and backward; time and activations.

The floor is timm's step without any masks.
"""

import models
import pytest
import torch
from baselines import compiled, the_published_way
from shapes import CLASSES, DEIT
from torch import Tensor, nn

import vitslim

BATCH = 8


def saved_mib(model: nn.Module, x: Tensor) -> float:
    """Returns the MiB of distinct activations that a forward pass keeps for backward."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


@pytest.mark.parametrize("shape", DEIT[:2], ids=lambda shape: shape.name)
def bench_search_step(compare, shape):
    model = models.dense(shape)
    x, target = models.images(BATCH), torch.randint(0, CLASSES, (BATCH,))
    masked, published = vitslim.mask(model), the_published_way(model)
    batch = x, target
    calls = {
        "search step": models.Step(masked, batch),
        "timm, no masks": models.Step(model, batch),
        "masks the published way": models.Step(published, batch),
        "timm, no masks, torch.compile": models.Step(model, batch, compiled(model)),
    }
    floor = saved_mib(model, x)
    info = {
        "batch": BATCH,
        "macs": 3 * BATCH * vitslim.cost(model).macs,
        "saved_mib": {
            "timm, no masks": round(floor, 1),
            "search step": round(saved_mib(masked, x), 1),
            "masks the published way": round(saved_mib(published, x), 1),
        },
    }
    size = shape.name
    medians = compare(f"search step {size} batch {BATCH}", calls, "timm, no masks", info, rounds=9)
    for name, mib in info["saved_mib"].items():
        time = medians[name] / medians["timm, no masks"]
        print(f"{size}: {name}: {time:.2f}x the time, {mib / floor:.2f}x the activations of timm")
