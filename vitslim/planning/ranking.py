"""Ranking: all units of a kind in the order in which a growing budget takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..allowed import KINDS, RANKINGS, TOKEN_RULES
from ..cost import BlockShape, Geometry
from ..errors import VitslimError
from ..masks import Masks
from ..plan import BlockPlan


@dataclass(frozen=True)
class _Group:
    """Units that are cut together: a head's dimensions, a layer's hidden units or its patches.

    Attributes:
        layer: The block it belongs to.
        scores: [units], the larger the later it is cut.
        first: How many units, from the best, every budget keeps.
    """

    layer: int
    scores: Tensor
    first: Tensor


class _Order:
    """The units of one kind, best first; ties by index, and what the floor keeps before all."""

    def __init__(self, groups: Sequence[_Group], round_to: int) -> None:
        self.groups, self.round_to = groups, round_to
        sizes = torch.tensor([group.scores.numel() for group in groups])
        self.sizes = sizes  # [groups]
        scores = torch.cat([group.scores for group in groups])
        floor = torch.cat([group.first for group in groups])
        # A stable sort twice: by score, then what the floor keeps to the front.
        order = torch.argsort(scores, descending=True, stable=True)
        order = order[torch.argsort(floor[order].int(), descending=True, stable=True)]
        self.scores = scores[order].masked_fill(floor[order], torch.inf)  # never rising
        self.group_of = torch.repeat_interleave(torch.arange(len(groups)), sizes)[order]
        place = torch.cat([torch.arange(size) for size in sizes.tolist()])[order]
        self.members = [place[self.group_of == index] for index in range(len(groups))]
        self.total, self.least = scores.numel(), int(floor.sum())

    def widths(self, count: int) -> list[int]:
        """Returns the width of every group when `count` units stay, rounded."""
        widths = torch.bincount(self.group_of[:count], minlength=len(self.groups))
        if self.round_to == 1:
            return widths.tolist()
        nearest = (widths + self.round_to // 2) // self.round_to * self.round_to
        # A width that rounds up to its limit or beyond is whole, multiple or not.
        rounded = torch.where(nearest >= self.sizes, self.sizes, nearest)
        rounded = torch.where(widths == self.sizes, self.sizes, rounded)
        return self._alive(widths, rounded).tolist()

    def kept(self, count: int) -> list[list[int]]:
        """Returns the sorted units of every group when `count` units stay."""
        widths = self.widths(count)
        return [sorted(m[:w].tolist()) for m, w in zip(self.members, widths, strict=True)]

    def _alive(self, widths: Tensor, rounded: Tensor) -> Tensor:
        """Gives the widest group of a layer that rounding emptied the smallest width there is."""
        layers: dict[int, list[int]] = {}
        for index, group in enumerate(self.groups):
            layers.setdefault(group.layer, []).append(index)
        for members in layers.values():
            if int(rounded[members].sum()) == 0 and int(widths[members].sum()) > 0:
                best = members[int(widths[members].argmax())]
                rounded[best] = min(self.round_to, int(self.sizes[best]))
        return rounded


class Ranking:
    """The three orders of a search, and the plans they give.

    Args:
        masks: What the search learned.
        geometry: Of the model that was searched.
        round_to: Widths are multiples of this, or whole.
        token_rule: "running-min" or "any-deeper", see `threshold`.
        floor: Units that every layer keeps at least.
        ranking: "fractions" or "macs", see `threshold`; with "macs" a score is |mask| per MAC.
    """

    def __init__(
        self,
        masks: Masks,
        geometry: Geometry,
        round_to: int,
        token_rule: str,
        floor: int,
        ranking: str = "fractions",
    ) -> None:
        if round_to < 1 or floor < 0:
            raise VitslimError(
                f"round_to must be 1 or more and floor 0 or more, got {round_to} and {floor}"
            )
        if token_rule not in TOKEN_RULES:
            raise VitslimError(f"no token rule is called {token_rule!r}; use {TOKEN_RULES}")
        if ranking not in RANKINGS:
            raise VitslimError(f"no ranking is called {ranking!r}; use {RANKINGS}")
        _check(masks, geometry)
        self.geometry, self.granularity = geometry, masks.granularity
        if ranking == "macs":
            masks = self._per_mac(masks)
        self._orders = {
            kind: _Order(groups, round_to if kind != "token" else 1)
            for kind, groups in (
                ("attention", _attention_groups(masks, floor)),
                ("mlp", _flat_groups(masks.mlp, floor)),
                ("token", _token_groups(masks.token, token_rule, floor)),
            )
            if groups
        }
        if self.granularity == "head" and "attention" in self._orders:
            self._orders["attention"].round_to = 1  # a head is whole or gone

    def count(self, kind: str) -> int:
        """Returns how many units of a kind there are."""
        return self._orders[kind].total

    def least(self, kind: str) -> int:
        """Returns how many units of a kind the floor keeps."""
        return self._orders[kind].least

    def exact(self, kind: str, fraction: float) -> int:
        """Returns round(fraction * n), but what the floor keeps at least."""
        return max(round(fraction * self.count(kind)), self.least(kind))

    def best(self, kinds: Sequence[str], count: int) -> dict[str, int]:
        """Returns how many units of every kind are among the first so many of all of them.

        One order over kinds: by score, ties in the order of `kinds`, and what floors keep first.
        """
        scores = torch.cat([self._orders[kind].scores for kind in kinds])
        order = torch.argsort(scores, descending=True, stable=True)
        sizes = torch.tensor([self.count(kind) for kind in kinds])
        kind_of = torch.repeat_interleave(torch.arange(len(kinds)), sizes)[order]
        counts = torch.bincount(kind_of[:count], minlength=len(kinds)).tolist()
        return {k: max(n, self.least(k)) for k, n in zip(kinds, counts, strict=True)}

    def kept_units(self, kind: str, count: int) -> int:
        """Returns how many units stay after rounding when the ranking gives `count`."""
        return sum(self._orders[kind].widths(count))

    def shapes(self, counts: Mapping[str, int]) -> list[BlockShape]:
        """Returns the block shapes when so many units of every kind stay."""
        shapes = list(self.geometry.blocks)
        totals: dict[str, dict[int, int]] = {}
        for kind, count in counts.items():
            order, total = self._orders[kind], totals.setdefault(kind, {})
            for group, width in zip(order.groups, order.widths(count), strict=True):
                unit = self._dims_per_unit(group.layer) if kind == "attention" else 1
                total[group.layer] = total.get(group.layer, 0) + width * unit
        tokens = self.geometry.num_prefix_tokens + self.geometry.num_patches
        for layer, shape in enumerate(shapes):
            if layer in totals.get("token", {}):
                tokens = self.geometry.num_prefix_tokens + totals["token"][layer]
            attn_dim = totals.get("attention", {}).get(layer, shape.attn_dim)
            hidden = totals.get("mlp", {}).get(layer, shape.hidden)
            shapes[layer] = replace(shape, attn_dim=attn_dim, hidden=hidden, tokens=tokens)
        return shapes

    def blocks(self, counts: Mapping[str, int]) -> list[BlockPlan]:
        """Returns what every block keeps when so many units of every kind stay."""
        kept: dict[str, dict[int, list[list[int]]]] = {}
        for kind, count in counts.items():
            order, layers = self._orders[kind], kept.setdefault(kind, {})
            for group, units in zip(order.groups, order.kept(count), strict=True):
                layers.setdefault(group.layer, []).append(units)
        return [
            BlockPlan(
                self._heads(layer, kept.get("attention", {}).get(layer)),
                kept.get("mlp", {}).get(layer, [None])[0],
                kept.get("token", {}).get(layer, [None])[0],
            )
            for layer in range(len(self.geometry.blocks))
        ]

    def _per_mac(self, masks: Masks) -> Masks:
        """Divides every score by the MACs of its unit, in the model before anything is cut."""
        columns: dict[str, list[Tensor | None]] = {}
        for kind in KINDS:
            columns[kind] = list(getattr(masks, kind))
            for layer, values in enumerate(columns[kind]):
                if values is not None:
                    macs = getattr(self.geometry.blocks[layer].unit_macs(), kind)
                    macs *= self._dims_per_unit(layer) if kind == "attention" else 1
                    # In float64, so that scores that differ keep doing so.
                    columns[kind][layer] = values.double() / macs
        return Masks(**columns, granularity=masks.granularity)

    def _dims_per_unit(self, layer: int) -> int:
        heads, head_dim = self.geometry.heads[layer]
        return {"head_dim": 1, "uniform": heads, "head": head_dim}[self.granularity]

    def _heads(self, layer: int, units: list[list[int]] | None) -> list[list[int]] | None:
        if units is None:
            return None
        heads, head_dim = self.geometry.heads[layer]
        if self.granularity == "uniform":
            return [list(units[0]) for _ in range(heads)]
        if self.granularity == "head":
            return [list(range(head_dim)) if unit else [] for unit in units]
        return units


def _attention_groups(masks: Masks, floor: int) -> list[_Group]:
    groups = []
    for layer, values in enumerate(masks.attention):
        if values is None:
            continue
        scores = values.abs()  # [heads, head_dim]
        if masks.granularity == "uniform":
            scores = scores[:1]
        elif masks.granularity == "head":
            scores = scores[:, :1]
        first = _best(scores.flatten(), floor).view(scores.shape)
        groups += [_Group(layer, s, f) for s, f in zip(scores, first, strict=True)]
    return groups


def _flat_groups(layers: Sequence[Tensor | None], floor: int) -> list[_Group]:
    return [
        _Group(layer, values.abs(), _best(values.abs(), floor))
        for layer, values in enumerate(layers)
        if values is not None
    ]


def _token_groups(layers: Sequence[Tensor | None], rule: str, floor: int) -> list[_Group]:
    """Scores that never rise with depth, so that a dropped token stays dropped at any budget."""
    where = [layer for layer, values in enumerate(layers) if values is not None]
    if not where:
        return []
    scores = torch.stack([values.abs() for values in layers if values is not None])
    if rule == "running-min":
        scores = scores.cummin(0).values
    else:
        scores = scores.flip(0).cummax(0).values.flip(0)
    first = _best(scores[-1], floor)  # the same patches in all layers
    return [_Group(layer, s, first) for layer, s in zip(where, scores, strict=True)]


def _best(scores: Tensor, floor: int) -> Tensor:
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[torch.argsort(scores, descending=True, stable=True)[:floor]] = True
    return chosen


def _check(masks: Masks, geometry: Geometry) -> None:
    depth = len(geometry.blocks)
    if len(masks.mlp) != depth:
        raise VitslimError(
            f"the masks are of {len(masks.mlp)} blocks, the model has {depth}; "
            "they were searched on another model"
        )
    for layer, shape in enumerate(geometry.blocks):
        expected = {
            "attention": geometry.heads[layer],
            "mlp": (shape.hidden,),
            "token": (geometry.num_patches,),
        }
        for kind, size in expected.items():
            values = getattr(masks, kind)[layer]
            if values is None:
                continue
            if tuple(values.shape) != size:
                raise VitslimError(
                    f"the {kind} masks of blocks.{layer} have shape {list(values.shape)}, the "
                    f"model needs {list(size)}; they were searched on another model"
                )
            if not values.isfinite().all():
                raise VitslimError(f"the {kind} masks of blocks.{layer} are not finite")
