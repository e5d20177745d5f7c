"""Accuracy on held-out images."""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..errors import VitslimError
from ..packed import pack
from .data.batches import Data
from .options.settings import Settings
from .runtime.interrupt import Interrupted, interrupted
from .runtime.world import World


def evaluate(model: nn.Module, data: Data, world: World, settings: Settings) -> float:
    """Returns top-1 accuracy in percent over the held-out images, each counted once.

    Args:
        model: On the device of the data; it is left in the mode it came in.
        data: Where the held-out images come from; every process sees its share.
        world: The processes that share the work.
        settings: Whether and how to autocast.

    Raises:
        Interrupted: While training, a process was asked to stop; all of them raise it.
    """
    right = torch.zeros((), device=world.device)
    seen = 0
    for answer, target in _answers(model, data, world, settings):
        right += (answer == target).sum()
        seen += len(target)
    total_right, total_seen = world.total([float(right), seen])
    if not total_seen:
        raise VitslimError(f"{settings.data} has no image that can be read to evaluate on.")
    return 100 * total_right / total_seen


def evaluate_at_rest(model: nn.Module, data: Data, world: World, settings: Settings) -> float:
    """Does what `evaluate` does with a model that is not being trained: packed, on a CPU."""
    return evaluate(_at_rest(model, world, settings), data, world, settings)


def _at_rest(model: nn.Module, world: World, settings: Settings) -> nn.Module:
    """Returns a model packed where that is faster; one that cannot be packed as it is."""
    if world.device.type == "cpu" and not settings.amp:
        with suppress(VitslimError):
            return pack(model)
    return model


def accuracy_by_class(
    model: nn.Module, data: Data, world: World, settings: Settings
) -> list[float | None]:
    """Returns top-1 accuracy in percent of every class, None where it has no held-out image.

    Arguments are those of `evaluate`, the model not being trained.
    """
    model = _at_rest(model, world, settings)
    right, seen = torch.zeros(2, data.num_classes, dtype=torch.int64)
    for answer, target in _answers(model, data, world, settings):
        hits, all_of_them = target[answer == target].cpu(), target.cpu()
        right += torch.bincount(hits, minlength=data.num_classes)
        seen += torch.bincount(all_of_them, minlength=data.num_classes)
    totals = world.total([*right.tolist(), *seen.tolist()])
    pairs = zip(totals[: data.num_classes], totals[data.num_classes :], strict=True)
    return [100 * hits / images if images else None for hits, images in pairs]


@torch.no_grad()
def _answers(
    model: nn.Module, data: Data, world: World, settings: Settings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the classes that a model answers with, and the true ones, batch by batch."""
    was_training = model.training
    model.eval()
    try:
        for images, target in _heeding(data, world):
            with autocast(world, settings):
                logits = model(images)
            yield logits.argmax(1), target
    finally:
        model.train(was_training)


def _heeding(data: Data, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields held-out batches; processes with fewer of them wait for the others, batch by batch."""
    batches = data.held_out()
    while True:
        batch = next(batches, None)
        stop, left = world.total([interrupted(), batch is not None])
        if stop:
            raise Interrupted
        if not left:
            return
        if batch is not None:
            yield batch


def autocast(world: World, settings: Settings) -> torch.autocast:
    """Returns the context in which a model computes; it does nothing without --amp."""
    dtype = getattr(torch, settings.amp_dtype)
    return torch.autocast(world.device.type, dtype, enabled=settings.amp)
