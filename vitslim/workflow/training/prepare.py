"""What training makes of a model before its first update."""

import torch
from timm.layers import DropPath
from torch import nn

from ...families import family_of
from ..options.settings import Settings

_DROPS = ("drop_path1", "drop_path2")


def prepare(model: nn.Module, settings: Settings) -> None:
    """Sets memory format, checkpointing, stochastic depth and what is frozen, in place.

    Args:
        model: A timm vision transformer, masked or slim or neither, on its device.
        settings: How it is trained.
    """
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    if settings.drop_path is not None:
        _set_drop_path(model, settings.drop_path)
    if settings.freeze:
        model.requires_grad_(False)
        for parameter in classifier(model):
            parameter.requires_grad_(True)


def classifier(model: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters of a model's heads, of which a distilled one has two."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return {parameter for head in heads for parameter in head.parameters()}


def stochastic_depth(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Returns what drops the paths of every block, for `restore`."""
    blocks = [site.block for site in family_of(model).sites(model)]
    return [{name: getattr(b, name) for name in _DROPS if hasattr(b, name)} for b in blocks]


def restore(model: nn.Module, own: list[dict[str, nn.Module]]) -> None:
    """Gives a trained model the stochastic depth that it had before it was prepared."""
    for site, drops in zip(family_of(model).sites(model), own, strict=True):
        for name, module in drops.items():
            setattr(site.block, name, module)


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """Sets stochastic depth to grow linearly, as timm builds it, to `rate` in the deepest block."""
    blocks = [site.block for site in family_of(model).sites(model)]
    for index, block in enumerate(blocks):
        each = rate * index / max(len(blocks) - 1, 1)
        for name in _DROPS:
            if hasattr(block, name):
                setattr(block, name, DropPath(each) if each else nn.Identity())
