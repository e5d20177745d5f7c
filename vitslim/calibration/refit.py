"""Refitting what comes after a cut: the slim model's residual stream back to the uncut one's."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..families import Family, family_of
from ..families.family import Half
from ..layers import TokenSelect
from ..layers.plain import is_plain, like
from ..plan import BlockPlan, Plan
from .images import Images
from .ridge import STRENGTHS, Fit, put_weights
from .spool import Spool
from .units import values_of_units
from .watching import Point, watching

# The part of a token's weight that does not depend on what the loss feels of it.
EVEN = 0.3
# States of all images that are there at once, counted in streams of the residual's width: the two
# models', each beside its next one; of one block the target's between its halves, the values of
# its units, and what the slim model's last layer reads, each of those up to four times as wide.
_STREAMS = 17


@torch.no_grad()
def refit(
    slim: nn.Module,
    target: nn.Module,
    images: Images,
    *,
    plan: Plan | None = None,
    felt: Sequence[Sequence[Tensor]] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    memory: int = 2 << 30,
    quiet: bool = False,
) -> None:
    """Refits the linear layers of every block of a slim model, in place, to another model's stream.

    With h the slim model's residual stream on its own states, d' the target's after its attention,
    x what proj reads in the slim block, s the layer scale and w the weight of a token, proj becomes

        W, b = argmin sum_tokens w |h + s (W x + b) - d'|^2 + ridge to the W, b there were

    With `plan`, qkv is fitted before it, to what the kept units are in the target. Then the MLP,
    fc1 and fc2, likewise. Every block is fitted on what the blocks before it, fitted already, give.
    Sums are in float64. Each ridge has the strength whose solution of five sixths of the batches is
    nearest on the others; with too few batches for that, the strength in the middle.

    Args:
        slim: Made of a plan; bare, in evaluation mode.
        target: What it was cut from, or another model with the same blocks and channels.
        images: What both see.
        plan: That the target was cut to, so that units are known; None leaves qkv and fc1 alone.
        felt: By block how much the loss feels of each token after each half, [tokens], see
            `felt_tokens`; None counts all alike.
        strengths: Of the ridges that are tried.
        memory: Bytes for the states of all images; what is beyond lies in temporary files.
        quiet: Whether there is no progress bar.
    """
    family = family_of(target, "calibrated")
    pairs = list(zip(family.sites(slim), family.sites(target), strict=True))
    blocks = [BlockPlan()] * len(pairs) if plan is None else plan.blocks
    one = memory // _STREAMS
    with Spool(one) as wanted, Spool(one) as stream:
        for batch, _ in images:
            # Nothing of the embedding was cut: the slim model's is the target's, unless it is
            # another model.
            wanted.append(family.embed(target, batch))
            stream.append(family.embed(slim, batch))
        alive = None
        bar = tqdm(pairs, "refitting", unit="block", disable=quiet or None, leave=False)
        for number, ((place, goal), keep) in enumerate(zip(bar, blocks, strict=True)):
            halves = family.halves(place.block)
            if not halves:  # a block of somebody else's, as it is in both
                stream.replace(place.block(state) for state in stream)
                wanted.replace(goal.block(state) for state in wanted)
                continue
            with ExitStack() as stack:
                ends, units = _of_target(family, goal.block, keep, wanted, stack, one)
                felt_here = [None] * len(halves) if felt is None else felt[number]
                select = getattr(place.block, "tokens", None)
                gate: tuple[Tensor, ...] = ()
                if isinstance(select, TokenSelect):
                    alive = select.rows if alive is None else alive[select.rows]
                    gate = (select.gate,)
                    stream.replace(select(state) for state in stream)
                for half, end, values, rows in zip(halves, ends, units, felt_here, strict=True):
                    if values is not None and is_plain(half.first):
                        _fit_first(half, gate, stream, values, alive, strengths)
                    weight = None if rows is None else _weights(rows)
                    _fit_last(half, gate, stream, end, alive, weight, strengths, 4 * one)


def _of_target(
    family: Family, block: Any, keep: BlockPlan, stream: Spool, stack: ExitStack, one: int
) -> tuple[list[Iterable[Tensor]], list[Spool | None]]:
    """Runs a block of the target, and moves its stream on.

    Returns:
        The stream after each half, and the values of the units that are kept of each, if known.
    """
    halves = family.halves(block)
    middles = [stack.enter_context(Spool(one)) for _ in halves[1:]]
    kept = {"attention": keep.heads, "mlp": keep.hidden}
    units = [
        None if kept[half.kind] is None else stack.enter_context(Spool(4 * one)) for half in halves
    ]
    points = [Point(("middle", i), half.norm, "input") for i, half in enumerate(halves) if i]
    points += [Point(("first", i), half.first, "output") for i, half in enumerate(halves)]

    def after(state: Tensor) -> Tensor:
        with watching(points) as seen:
            end: Tensor = block(state)
        for number, middle in enumerate(middles, 1):
            middle.append(seen["middle", number])
        for number, (half, spool) in enumerate(zip(halves, units, strict=True)):
            if spool is not None:
                spool.append(values_of_units(half, seen["first", number], keep))
        return end

    stream.replace(after(state) for state in stream)
    return [*middles, stream], units


def _fit_first(
    half: Half,
    gate: tuple[Tensor, ...],
    stream: Spool,
    values: Spool,
    alive: Tensor | None,
    strengths: Sequence[float],
) -> None:
    """Refits the first layer of a half to the values of its units in the target."""
    fit = Fit(half.first, like(half.first).new_ones(1))
    for state, wished in zip(stream, values, strict=True):
        wished = wished if alive is None else wished[:, alive]
        x = half.norm(state, *gate)
        fit.add(x, wished, x.new_ones(x.shape[:2]))
    put_weights(half.first, fit.solve(strengths))


def _fit_last(
    half: Half,
    gate: tuple[Tensor, ...],
    stream: Spool,
    end: Iterable[Tensor],
    alive: Tensor | None,
    weight: Tensor | None,
    strengths: Sequence[float],
    memory: int,
) -> None:
    """Refits the last layer of a half to the target's stream after it, and moves the stream on."""
    gamma = _gamma(half)
    fit = Fit(half.last, gamma) if is_plain(half.last) else None
    with Spool(memory) as reads:
        for state, wished in zip(stream, end, strict=True):
            with watching([Point("read", half.last, "input")]) as seen:
                half.layer(half.norm(state, *gate))
            reads.append(seen["read"])
            if fit is not None:
                rows = state.new_ones(state.shape[:2])
                if weight is not None:
                    rows = rows * (weight if alive is None else weight[alive]).to(rows)
                wished = wished if alive is None else wished[:, alive]
                fit.add(seen["read"], (wished - state) / gamma, rows)
        if fit is not None:
            put_weights(half.last, fit.solve(strengths))
        pairs = zip(stream, reads, strict=True)
        stream.replace(state + half.scale(half.last(read)) for state, read in pairs)


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
