"""Refitting what comes after a cut: the slim model's residual stream back to the uncut one's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, family_of
from ..families.family import Half
from ..layers import TokenSelect
from ..layers.plain import is_plain
from .images import Images
from .ridge import STRENGTHS, Moments, best_strength, put_weights, weights_of
from .spool import Spool

# A part of the images that are only used to choose the strength of each ridge.
HELD = 6


@torch.no_grad()
def refit(
    slim: nn.Module,
    target: nn.Module,
    images: Images,
    *,
    weights: Sequence[Tensor] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    memory: int = 2 << 30,
    quiet: bool = False,
) -> None:
    """Refits proj and fc2 of every block of a slim model, in place, to another model's stream.

    With h the slim model's residual stream on its own states, d the target's, x what proj reads in
    the slim block, s the layer scale and w the weight of a token, the attention of a block gets

        W, b = argmin sum_tokens w |h + s (W x + b) - d'|^2 + ridge to the W, b there were

    where d' is the target's stream after its attention; then the MLP likewise, with fc2. Every
    block is fitted on what the blocks before it, fitted already, give. Sums are in float64, and
    each ridge has the strength that predicts a sixth of the batches best from the others.

    Args:
        slim: Made of a plan; bare, in evaluation mode.
        target: What it was cut from, or another model with the same blocks and channels.
        images: What both see.
        weights: Of the tokens of all images, [images, tokens] per branch of every block; None is
            all alike.
        strengths: Of the ridges that are tried.
        memory: Bytes for the states of all images; what is beyond lies in temporary files.
        quiet: Whether there is no progress bar.
    """
    family = family_of(target, "calibrated")
    pairs = list(zip(family.sites(slim), family.sites(target), strict=True))
    with Streams(family, images, memory) as streams:
        streams.begin(slim, target)
        for one, other in tqdm(pairs, "refitting", unit="block", disable=quiet or None):
            streams.enter(one.block, other.block)
            for half in family.halves(one.block):
                streams.read(half)
                if is_plain(half.last):
                    _refit(half, streams, strengths, None if weights is None else next(each))
                streams.leave(half)


@contextmanager
def reading(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Gives a list of what a layer reads, from then on, newest last."""
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        yield read
    finally:
        handle.remove()
