"""Refitting what comes after a cut: the slim model's residual stream back to the uncut one's."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..families import family_of
from ..families.family import Half
from ..layers import TokenSelect
from ..layers.plain import is_plain, like
from .images import Images
from .ridge import STRENGTHS, Moments, best_strength, put_weights, weights_of
from .spool import Spool
from .watching import Point, watching

# One batch in so many is held out where the strength of a ridge is chosen.
HELD = 6
# The part of a token's weight that does not depend on what the loss feels of it.
EVEN = 0.3
# Streams that are there at once: the target's before a block and after each of its halves, the
# slim model's before a half and after it, and what its last layer reads, four times as wide.
_SPOOLS = 9


@torch.no_grad()
def refit(
    slim: nn.Module,
    target: nn.Module,
    images: Images,
    *,
    felt: Sequence[Tensor] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    memory: int = 2 << 30,
    quiet: bool = False,
) -> None:
    """Refits proj and fc2 of every block of a slim model, in place, to another model's stream.

    With h the slim model's residual stream on its own states, d' the target's after its attention,
    x what proj reads in the slim block, s the layer scale and w the weight of a token, the
    attention of a block gets

        W, b = argmin sum_tokens w |h + s (W x + b) - d'|^2 + ridge to the W, b there were

    then the MLP likewise, with fc2. Every block is fitted on what the blocks before it, fitted
    already, give. Sums are in float64. Each ridge has the strength whose solution of five sixths
    of the batches is nearest on the others; with one batch, the strength in the middle.

    Args:
        slim: Made of a plan; bare, in evaluation mode.
        target: What it was cut from, or another model with the same blocks and channels.
        images: What both see.
        felt: How much the loss feels of each token after every half of every block, [tokens], see
            `felt_tokens`; None counts all alike.
        strengths: Of the ridges that are tried.
        memory: Bytes for the states of all images; what is beyond lies in temporary files.
        quiet: Whether there is no progress bar.
    """
    family = family_of(target, "calibrated")
    pairs = list(zip(family.sites(slim), family.sites(target), strict=True))
    each = memory // _SPOOLS
    weights = None if felt is None else iter([_weights(each) for each in felt])
    with ExitStack() as streams:
        wanted = streams.enter_context(Spool(each))
        stream = streams.enter_context(Spool(each))
        for batch, _ in images:
            # The target's embedding is the slim model's: nothing of it was cut.
            wanted.append(family.embed(target, batch))
            stream.append(family.embed(slim, batch))
        alive = None
        for one, other in tqdm(pairs, "refitting", unit="block", disable=quiet or None):
            with ExitStack() as block:
                halves, others = family.halves(one.block), family.halves(other.block)
                points = [block.enter_context(Spool(each)) for _ in halves[1:]]
                after = Spool(each)
                inner = [Point(number, half.norm, "input") for number, half in enumerate(others)]
                for state in wanted:
                    with watching(inner[1:]) as seen:
                        after.append(other.block(state))
                    for number, spool in enumerate(points, 1):
                        spool.append(seen[number])
                wanted.close()
                wanted = streams.enter_context(after)
                select = getattr(one.block, "tokens", None)
                gate: tuple[Tensor, ...] = ()
                if isinstance(select, TokenSelect):
                    alive = select.rows if alive is None else alive[select.rows]
                    gate = (select.gate,)
                    dropped = streams.enter_context(Spool(each))
                    for state in stream:
                        dropped.append(select(state))
                    stream.close()
                    stream = dropped
                for half, goal in zip(halves, [*points, wanted], strict=True):
                    weight = None if weights is None else next(weights)
                    fitted = streams.enter_context(Spool(each))
                    _half(half, gate, stream, goal, fitted, alive, weight, strengths, 4 * each)
                    stream.close()
                    stream = fitted


def _half(
    half: Half,
    gate: tuple[Tensor, ...],
    stream: Spool,
    goal: Spool,
    fitted: Spool,
    alive: Tensor | None,
    weight: Tensor | None,
    strengths: Sequence[float],
    memory: int,
) -> None:
    """Refits the last layer of a half, and puts the stream after it into `fitted`."""
    gamma = _gamma(half)
    fits = is_plain(half.last)
    moments = [Moments(half.last), Moments(half.last)] if fits else []
    with Spool(memory) as reads:
        for number, (state, wished) in enumerate(zip(stream, goal, strict=True)):
            with watching([Point("read", half.last, "input")]) as seen:
                half.layer(half.norm(state, *gate))
            reads.append(seen["read"])
            if fits:
                wished = wished if alive is None else wished[:, alive]
                rows = state.new_ones(state.shape[:2])
                if weight is not None:
                    own = weight if alive is None else weight[alive]
                    rows = own.to(rows).expand_as(rows)
                held = moments[number % HELD == HELD - 1]
                held.add(
                    seen["read"].flatten(0, 1),
                    ((wished - state) / gamma).flatten(0, 1),
                    rows.flatten(),
                )
        if fits:
            _solve(half.last, moments[0], moments[1], gamma, strengths)
        for state, read in zip(stream, reads, strict=True):
            fitted.append(state + half.scale(half.last(read)))


def _solve(
    layer: nn.Linear, fitted: Moments, held: Moments, gamma: Tensor, strengths: Sequence[float]
) -> None:
    start = weights_of(layer)
    strength = sorted(strengths)[len(strengths) // 2]
    if held.rows and len(strengths) > 1:
        strength = best_strength(fitted, held, start, gamma.double(), strengths)
    put_weights(layer, (fitted + held).solve(start, strength))


def _weights(felt: Tensor) -> Tensor:
    """Returns weights of tokens with mean 1, a part of which is the same for all."""
    share = felt / felt.mean().clamp(min=torch.finfo(felt.dtype).tiny)
    return EVEN + (1 - EVEN) * share


def _gamma(half: Half) -> Tensor:
    """Returns the layer scale of a half, [channels] or [1], none of it so small as to be lost."""
    gamma = getattr(half.scale, "gamma", None)
    if gamma is None:
        return like(half.last).new_ones(1)
    tiny = 1e-4 * gamma.abs().max().clamp(min=torch.finfo(gamma.dtype).tiny)
    return torch.where(gamma.abs() < tiny, torch.where(gamma < 0, -tiny, tiny), gamma)
