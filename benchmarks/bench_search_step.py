"""What masks cost in a search step: forward, loss, penalty and backward; time and activations.

The floor is timm's step without any masks. "published way" multiplies q, k, v, the hidden units and
the normed input by their masks, as the method's own code does.
"""

from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitslim
from vitslim.layers import GatedLayerNorm, MaskedAttention, MaskedMlp

NAMES = {"T": "deit_tiny_patch16_224", "S": "deit_small_patch16_224"}
BATCH = 8


def attention_the_published_way(self: MaskedAttention, x: Tensor, **_: object) -> Tensor:
    batch, tokens, _channels = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv * self.mask.unsqueeze(1)
    scores = ((q @ k.mT) * self.scale).softmax(-1)
    return self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, -1))


def mlp_the_published_way(self: MaskedMlp, x: Tensor) -> Tensor:
    return self.fc2(self.act(self.fc1(x)) * self.mask)


def norm_the_published_way(self: GatedLayerNorm, x: Tensor, gate: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps) * gate.unsqueeze(-1)


def the_published_way(model: nn.Module) -> nn.Module:
    """Returns a masked copy of a timm model whose masks multiply activations."""
    forwards = {
        MaskedAttention: attention_the_published_way,
        MaskedMlp: mlp_the_published_way,
        GatedLayerNorm: norm_the_published_way,
    }
    masked = vitslim.mask(model)
    for module in masked.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
    return masked


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


@pytest.mark.parametrize("size", NAMES)
def bench_search_step(compare, size):
    torch.compiler.reset()
    model = timm.create_model(NAMES[size])
    x, target = torch.randn(BATCH, 3, 224, 224), torch.randint(0, 1000, (BATCH,))
    masked = vitslim.mask(model)
    compiled = torch.compile(model)

    def step(network: nn.Module, penalised: bool) -> None:
        network.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(x), target)
        if penalised:
            loss = loss + vitslim.sparsity_loss(network)
        loss.backward()

    published = the_published_way(model)
    calls = {
        "search step": lambda: step(masked, True),
        "timm, no masks": lambda: step(model, False),
        "masks the published way": lambda: step(published, True),
        "timm, no masks, torch.compile": lambda: step(compiled, False),
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
    medians = compare(f"search step {size} batch {BATCH}", calls, "timm, no masks", info, rounds=9)
    for name, mib in info["saved_mib"].items():
        time = medians[name] / medians["timm, no masks"]
        print(f"{size}: {name}: {time:.2f}x the time, {mib / floor:.2f}x the activations of timm")
