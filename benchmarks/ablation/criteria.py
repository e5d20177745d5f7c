"""Taylor importance as others compute it: a batch at a time, of weights instead of masks.

Beside it, what takes one half of a search's plan away: which layers keep how much, or which of
their units.

A unit is what a plan can cut. An attention dimension is a row of q, of k and of v with their
biases, and a column of proj; a hidden unit is a row of fc1 with its bias, and a column of fc2.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitslim.masks import Masks

Reading = Callable[[Tensor], Tensor]


def taylor(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Masks:
    """Scores a unit by |sum of weight * gradient|: the change of the loss without it, roughly.

    The absolute value is taken of each batch, and averaged: over a whole epoch the gradients of a
    model that has converged cancel.
    """
    model.eval()
    each = []
    for images, target in batches:
        model.zero_grad()
        F.cross_entropy(model(images), target).backward()
        each.append(_change_without(model))
    model.zero_grad()
    return Masks(
        [torch.stack(layer).mean(0) for layer in zip(*(m.attention for m in each), strict=True)],
        [torch.stack(layer).mean(0) for layer in zip(*(m.mlp for m in each), strict=True)],
        [None] * len(model.blocks),
    )


def even_layers(masks: Masks, seed: int) -> Masks:
    """Leaves the order of the units within each layer, and makes all layers equal."""
    return Masks(_each(masks.attention, _ranks), _each(masks.mlp, _ranks), masks.token)


def random_units(masks: Masks, seed: int) -> Masks:
    """Leaves what every head and every MLP keeps, and draws which of its units."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(scores: Tensor) -> Tensor:
        rows = scores.view(-1, scores.shape[-1])  # a head each, or the MLP
        order = torch.stack([torch.randperm(r.numel(), generator=generator) for r in rows])
        return rows.gather(1, order).view_as(scores)

    return Masks(_each(masks.attention, shuffled), _each(masks.mlp, shuffled), masks.token)


def _each(layers: Iterable[Tensor | None], change: Reading) -> list[Tensor | None]:
    return [None if scores is None else change(scores) for scores in layers]


def _ranks(scores: Tensor) -> Tensor:
    """Puts in the place of each score the fraction of the layer that it is not below."""
    ranks = scores.abs().flatten().argsort(stable=True).argsort().float() + 1
    return (ranks / ranks.numel()).view_as(scores)


def _times_gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter * parameter.grad


@torch.no_grad()
def _change_without(model: nn.Module) -> Masks:
    """Scores units, each a row of all its parameters times their gradients."""
    attention: list[Tensor | None] = []
    mlp: list[Tensor | None] = []
    for block in model.blocks:
        units = _attention_units(block.attn).sum(1).abs()
        attention.append(units.view(block.attn.num_heads, -1))
        mlp.append(_hidden_units(block.mlp).sum(1).abs())
    return Masks(attention, mlp, [None] * len(mlp))


def _attention_units(attn: nn.Module) -> Tensor:
    bias = _times_gradient(attn.qkv.bias).unsqueeze(1)
    rows = torch.cat([_times_gradient(attn.qkv.weight), bias], 1)  # [3 D, C + 1]
    q, k, v = rows.chunk(3)
    return torch.cat([q, k, v, _times_gradient(attn.proj.weight).T], 1)  # [D, 4 C + 3]


def _hidden_units(mlp: nn.Module) -> Tensor:
    bias = _times_gradient(mlp.fc1.bias).unsqueeze(1)
    rows = [_times_gradient(mlp.fc1.weight), bias, _times_gradient(mlp.fc2.weight).T]
    return torch.cat(rows, 1)  # [M, 2 C + 1]
