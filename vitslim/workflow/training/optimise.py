"""From settings to timm's optimiser, schedule and mixup."""

from typing import Any

import torch
from timm.data import Mixup
from timm.optim import (
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from torch import nn

from ...errors import VitslimError
from ...masks import mask_parameters
from ..data.images import reason
from ..options.settings import Settings


def make_optimizer(
    model: nn.Module, settings: Settings, images_per_update: int
) -> torch.optim.Optimizer:
    """Makes timm's optimiser; masks are a group of their own, without decay.

    Args:
        model: What is trained, with masks or without.
        settings: Optimiser, learning rate and decay.
        images_per_update: Over all processes; the learning rate may follow it.
    """
    lr = settings.lr
    if lr is None:
        lr = settings.lr_base * images_per_update / 512
    groups = _groups(model, settings)
    masked = [parameter for _, parameter in mask_parameters(model)]
    masks = {id(parameter) for parameter in masked}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in masks]
    if masked:
        # Not `lr_scale`, which timm's schedules would apply on top of the rate they start from.
        groups.append({"params": masked, "weight_decay": 0.0, "lr": lr * settings.mask_lr_scale})
    # torch's kernels that step all weights at once.
    fused = {"fused": True} if settings.opt in ("adam", "adamw") else {}
    try:
        return create_optimizer_v2(groups, settings.opt, lr=lr, **fused)
    except (AssertionError, ValueError, KeyError) as error:
        raise VitslimError(
            f"timm cannot make the optimiser {settings.opt!r} ({reason(error)})."
        ) from error


def _groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Returns timm's groups of all that is trained, by weight decay and perhaps by layer."""
    decay, rate = settings.weight_decay, settings.layer_decay
    if rate is None:
        return param_groups_weight_decay(model, decay, no_weight_decay_list=_undecayed(model))
    # A student in distillation: what stands beside it has no layer.
    net = getattr(model, "student", model)
    groups = param_groups_layer_decay(
        net, decay, no_weight_decay_list=_undecayed(net), layer_decay=rate
    )
    own = {id(parameter) for parameter in net.parameters()}
    beside = [p for p in model.parameters() if id(p) not in own]
    return [*groups, {"params": beside, "weight_decay": decay}] if beside else groups


def _undecayed(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "no_weight_decay", None)
    return tuple(names()) if callable(names) else ()


def make_scheduler(optimizer: torch.optim.Optimizer, settings: Settings, updates: int) -> Any:
    """Makes timm's schedule over so many updates an epoch, None for a rate that never changes."""
    name, steps = settings.sched, {}
    if name == "none":
        # timm's schedules are what gives layers their own rates.
        if not settings.warmup_epochs and settings.layer_decay is None:
            return None
        # Steps that change nothing, after the warm-up.
        name, steps = "step", {"decay_epochs": settings.epochs, "decay_rate": 1.0}
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            name,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.warmup_lr,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates,
            **steps,
        )
    except (AssertionError, ValueError):
        scheduler = None
    # Older timm answers None for a name it does not know.
    if scheduler is None or settings.sched == "plateau":
        raise VitslimError(f"There is no schedule {settings.sched!r}: use cosine, step or none.")
    return scheduler


def make_mixup(settings: Settings, num_classes: int) -> Mixup | None:
    """Makes timm's mixup and cutmix, None where both are off."""
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        settings.mixup,
        settings.cutmix,
        prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch_prob,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )
