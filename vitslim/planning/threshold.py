"""Step two: cut what a search learned to a budget. One search serves any number of budgets."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..allowed import KINDS
from ..cost import Cost, Geometry
from ..description import base_of
from ..errors import VitslimError
from ..masks import Masks
from ..plan import Plan
from .ranking import Ranking

_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def threshold(
    model: nn.Module,
    budget: Mapping[str, Any] | str,
    *,
    masks: Masks | None = None,
    round_to: int = 8,
    token_rule: str = "running-min",
    floor: int = 1,
    ranking: str = "fractions",
) -> Plan:
    """Returns the largest plan within a budget.

    Units of one kind are ranked by |mask| over all layers together, ties by index. At round_to=1
    exactly round(fraction * n) units of a kind stay. With rounding, or for a budget of params or
    MACs, the plan is the largest one on the ranking that does not exceed the budget.

    A budget of params or MACs leaves open what each kind gives. The paper's masks are ranked kind
    by kind, so that one fraction for all kinds is the way nearest to it. The other way is to rank
    the units of all kinds together, by what they are worth for what they cost,

        score = |mask| / MACs of the unit in the model before anything is cut

    where a unit is an attention dimension (its part of qkv, of proj and of the two products), a
    hidden unit, or a token's row in a layer.

    Args:
        model: A masked model; or, with `masks`, the dense one, on any device, "meta" included;
            wrapped or not.
        budget: {"macs": "60%"}, {"params": "12M"}, {"attention": 0.7, "mlp": 0.7, "token": 0.8},
            or text such as "macs=60%,token=0.8". Kinds that are searched but not named meet
            params or macs together, see `ranking`; without params or macs they are kept whole.
        masks: What the search learned, if the model does not carry it.
        round_to: Width of a head and of an MLP is a multiple of this, or whole. 1 is exact.
        token_rule: "running-min", the paper's: a token dropped in a layer is dropped in all later
            ones. "any-deeper", the published code's: it stays while any deeper layer keeps it.
        floor: Attention dimensions, hidden units and patches that every layer keeps at least.
        ranking: How params or macs are met. "fractions": all kinds keep one fraction of their
            units. "macs": the kinds are one ranking by score per MAC, of which the largest
            beginning stays that meets the budget. In both ways each kind then takes what room is
            left to it.

    Raises:
        VitslimError: The budget cannot be read, or is out of reach; the message names the range.
    """
    asked = parse_budget(budget) if isinstance(budget, str) else dict(budget)
    masks = Masks.of(model) if masks is None else masks
    geometry = Geometry.of(model)
    ranked = Ranking(masks, geometry, round_to, token_rule, floor, ranking)
    fractions, limits = _understood(asked, masks, geometry)
    free = [kind for kind in masks.kinds() if kind not in fractions]
    if limits and not free:
        raise VitslimError(
            f"every kind that was searched has its own fraction, so nothing is left to meet "
            f"{', '.join(limits)}; drop one of them from the budget"
        )
    fixed = {kind: _exactly(ranked, kind, f) for kind, f in fractions.items()}
    counts = {kind: ranked.count(kind) for kind in free}
    if limits:
        counts = _largest(ranked, geometry, fixed, free, limits, ranking)
    blocks = ranked.blocks(fixed | counts)
    reached = geometry.cost(geometry.planned(blocks))
    return Plan(base_of(model), asked, reached._asdict(), round_to, blocks)


def even_plan(model: nn.Module, budget: Mapping[str, Any] | str, round_to: int = 1) -> Plan:
    """Returns a plan that spreads the cut evenly, for its cost before any search was run.

    Attention and MLP take part, tokens only where the budget names them.
    """
    asked = parse_budget(budget) if isinstance(budget, str) else dict(budget)
    geometry = Geometry.of(model)
    kinds = KINDS if "token" in asked else ("attention", "mlp")
    return threshold(model, asked, masks=_even_masks(geometry, kinds), round_to=round_to)


def check_budget(
    model: nn.Module,
    budget: Mapping[str, Any],
    kinds: Iterable[str] = KINDS,
    **planning: Any,
) -> None:
    """Raises VitslimError where no search of these kinds could meet a budget, before any is run.

    Args:
        model: The dense one, on any device, "meta" included.
        budget: As `threshold` takes it; a latency is passed over, for it has to be measured.
        kinds: Of masks that are to be learned.
        **planning: Arguments of `threshold`.
    """
    asked = {name: value for name, value in budget.items() if name != "latency"}
    if asked:
        threshold(model, asked, masks=_even_masks(Geometry.of(model), kinds), **planning)


def parse_budget(text: str) -> dict[str, str | float]:
    """Reads "macs=60%", "params=12M" or "attention=0.7,mlp=0.7,token=0.8".

    Raises:
        VitslimError: The text is not a budget; the message shows one.
    """
    budget: dict[str, str | float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in (*KINDS, "params", "macs", "latency") or name in budget:
            raise VitslimError(
                f"cannot read the budget {text!r} at {part!r}; write macs=60%, params=12M, "
                "latency=60% or attention=0.7,mlp=0.7,token=0.8"
            )
        budget[name] = fraction_of(name, value) if name in KINDS else value
    return budget


def budget_name(budget: Mapping[str, Any]) -> str:
    """Returns a name fit for a folder: {"macs": "60%"} becomes "macs-60"."""
    return "-".join(f"{name}-{str(value).rstrip('%')}" for name, value in budget.items())


def _even_masks(geometry: Geometry, kinds: Iterable[str]) -> Masks:
    """Masks that fall evenly inside every head, MLP and image, the same in all of them."""

    def falling(count: int) -> Tensor:
        return torch.linspace(1.0, 0.0, count + 1)[:count]

    attention = [
        falling(head_dim).expand(heads, head_dim).clone()
        if heads and "attention" in kinds
        else None
        for heads, head_dim in geometry.heads
    ]
    mlp = [falling(shape.hidden) if "mlp" in kinds else None for shape in geometry.blocks]
    gates = falling(geometry.num_patches) if "token" in kinds else None
    return Masks(attention, mlp, [gates] * len(mlp))


def _exactly(ranking: Ranking, kind: str, fraction: float) -> int:
    """Returns the most units of a kind that, rounded, do not exceed the fraction asked for."""
    total, wanted = ranking.count(kind), round(fraction * ranking.count(kind))
    count = _bisect(total, lambda n: ranking.kept_units(kind, n) <= wanted)
    if count < ranking.least(kind) or ranking.kept_units(kind, count) > wanted:
        least = ranking.kept_units(kind, ranking.least(kind))
        raise VitslimError(
            f"{kind}={fraction:g} is out of reach: every layer keeps something, so {kind} can go "
            f"from {math.ceil(least / total * 1e4) / 1e4:g} to 1"
        )
    return count


def _understood(
    asked: Mapping[str, Any], masks: Masks, geometry: Geometry
) -> tuple[dict[str, float], dict[str, float]]:
    """Splits a budget into fractions per kind and absolute limits on params and MACs."""
    if not asked:
        raise VitslimError("the budget is empty; write for example macs=60%")
    dense = geometry.cost()._asdict()
    fractions: dict[str, float] = {}
    limits: dict[str, float] = {}
    for name, value in asked.items():
        if name in KINDS:
            if name not in masks.kinds():
                raise VitslimError(
                    f"the budget names {name}, but the search has no {name} masks; it has "
                    f"{', '.join(masks.kinds())}"
                )
            fractions[name] = fraction_of(name, value)
        elif name in dense:
            limits[name] = _limit(name, value, dense[name])
        else:
            raise VitslimError(
                f"the budget names {name!r}; use attention, mlp, token, params or macs"
            )
    return fractions, limits


def fraction_of(name: str, value: Any) -> float:
    """Reads 0.6 or 60% as a fraction between 0 and 1, or raises VitslimError."""
    try:
        text = str(value)
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise VitslimError(f"the budget {name}={value} is not a fraction between 0 and 1")
    return number


def _limit(name: str, value: Any, dense: int) -> float:
    text = str(value).strip()
    try:
        if text.endswith("%"):
            number = float(text[:-1]) / 100 * dense
        else:
            scale = _UNITS.get(text[-1:].upper(), 1.0)
            number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise VitslimError(f"the budget {name}={value} is no amount; write 60%, 12M or 2.8G")
    return number


def _largest(
    ranking: Ranking,
    geometry: Geometry,
    fixed: dict[str, int],
    free: list[str],
    limits: dict[str, float],
    how: str,
) -> dict[str, int]:
    """Returns how many units of the free kinds stay: the most that keeps within the limits."""

    def cost_at(counts: dict[str, int]) -> Cost:
        return geometry.cost(ranking.shapes(fixed | counts))

    def fits(counts: dict[str, int]) -> bool:
        reached = cost_at(counts)._asdict()
        return all(reached[name] <= limit + 0.5 for name, limit in limits.items())

    smallest, whole = ({k: ranking.exact(k, f) for k in free} for f in (0.0, 1.0))
    low, high = cost_at(smallest)._asdict(), cost_at(whole)._asdict()
    dense = geometry.cost()._asdict()
    for name, limit in limits.items():
        if not low[name] <= limit + 0.5 or limit > dense[name] + 0.5:
            raise VitslimError(
                f"{name} {_amount(limit)} is out of reach: this search can give from "
                f"{_amount(low[name])} to {_amount(high[name])} "
                f"({100 * low[name] / dense[name]:.0f}% to 100% of the dense model)"
            )
    if how == "macs":
        units = sum(ranking.count(kind) for kind in free)
        counts = ranking.best(free, _bisect(units, lambda n: fits(ranking.best(free, n))))
    else:
        # In steps finer than a unit.
        steps = max(ranking.count(kind) for kind in free)
        step = _bisect(steps, lambda s: fits({k: ranking.exact(k, s / steps) for k in free}))
        counts = {kind: ranking.exact(kind, step / steps) for kind in free}
    # Then each kind alone takes what room is left: a step of all kinds at once can leave some, and
    # a limit need not concern them all, as tokens have no parameters.
    for kind in free:
        rest = {other: count for other, count in counts.items() if other != kind}
        counts[kind] = _bisect(ranking.count(kind), partial(_fits_with, fits, rest, kind))
    return counts


def _fits_with(
    fits: Callable[[dict[str, int]], bool], rest: dict[str, int], kind: str, count: int
) -> bool:
    return fits({**rest, kind: count})


def _bisect(top: int, holds: Callable[[int], bool]) -> int:
    """Returns the largest n in 0..top for which `holds`, which is true up to some n."""
    low = 0
    while low < top:
        middle = (low + top + 1) // 2
        low, top = (middle, top) if holds(middle) else (low, middle - 1)
    return low


def _amount(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.0f}"
