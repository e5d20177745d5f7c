"""Torch-Pruning to a budget: every head of a layer, and every layer, cut by the same fraction."""

import copy
import warnings
from collections.abc import Callable, Iterable

import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from vitslim import cost
from vitslim.workflow.latency import example_input

# Halvings of the interval of ratios; finer than a unit of the widest layer.
HALVINGS = 9


def prune(
    model: nn.Module,
    macs: float,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> nn.Module:
    """Returns the largest copy of timm's ViT, all layers cut alike, that is within a budget.

    Importance is Torch-Pruning's own Taylor expansion over groups of coupled parameters. The
    residual stream keeps its width, as it does in all our plans: cut too, it ends far worse here.

    Args:
        model: The dense model; its gradients are replaced.
        macs: Multiply-accumulates it may take.
        batches: Training images that importance is measured on.
    """
    model.eval()
    model.zero_grad()
    for images, target in batches:
        F.cross_entropy(model(images), target).backward()

    def largest(pruned: Callable[[float], nn.Module]) -> float:
        """Returns the smallest ratio whose model is within the budget."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            ratio = (low + high) / 2
            fits = cost(pruned(ratio)).macs <= macs
            low, high = (low, ratio) if fits else (ratio, high)
        return high

    # One ratio for all widths leaves room in the budget, for a head loses whole dimensions of a
    # few. The hidden units, which are many, take that room.
    ratio = largest(lambda every: _pruned(model, every, every))
    hidden = largest(lambda hidden: _pruned(model, ratio, hidden))
    return _pruned(model, ratio, hidden)


def _pruned(model: nn.Module, ratio: float, hidden: float) -> nn.Module:
    import torch_pruning

    small = copy.deepcopy(model)
    for parameter, dense in zip(small.parameters(), model.parameters(), strict=True):
        parameter.grad = dense.grad.clone()
    attentions = [module for module in small.modules() if isinstance(module, Attention)]
    # What is ignored keeps its outputs: those of fc2 are the whole residual stream.
    ignored = [small.head, *(block.mlp.fc2 for block in small.blocks)]
    with warnings.catch_warnings():
        # It tells how it will prune the position embedding, and it is right.
        warnings.filterwarnings("ignore", message="Unwrapped parameters")
        pruner = torch_pruning.pruner.BasePruner(
            small,
            example_input(small, 1),
            torch_pruning.importance.GroupTaylorImportance(),
            pruning_ratio=ratio,
            pruning_ratio_dict={block.mlp.fc1: hidden for block in small.blocks},
            ignored_layers=ignored,
            num_heads={attn.qkv: attn.num_heads for attn in attentions},
        )
    pruner.step()
    small.zero_grad()
    for attn in attentions:
        attn.num_heads = pruner.num_heads[attn.qkv]
        attn.attn_dim = attn.proj.in_features
        attn.head_dim = attn.attn_dim // attn.num_heads
        attn.scale = attn.head_dim**-0.5
    return small
