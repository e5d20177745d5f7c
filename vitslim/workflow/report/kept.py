"""What a plan keeps beside what the dense model has: the numbers behind the report's figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...allowed import KINDS
from ...masks import Masks
from ...plan import Plan


@dataclass(frozen=True)
class Sizes:
    """Sizes of the dense model, per layer; None where the search did not touch the layer."""

    heads: list[list[int] | None]
    hidden: list[int | None]
    patches: int | None


def dense_sizes(masks: Masks | None, plan: Plan | None) -> Sizes:
    """Reads the dense sizes from the masks, or guesses them from the plan where there are none."""
    if masks is not None:
        patches = next((len(gate) for gate in masks.token if gate is not None), None)
        return Sizes(
            heads=[None if m is None else [m.shape[1]] * m.shape[0] for m in masks.attention],
            hidden=[None if m is None else len(m) for m in masks.mlp],
            patches=patches,
        )
    blocks = plan.blocks if plan is not None else []
    dims = [i for b in blocks for head in b.heads or [] for i in head]
    units = [i for b in blocks for i in b.hidden or []]
    tokens = [i for b in blocks for i in b.tokens or []]
    return Sizes(
        heads=[None if b.heads is None else [max(dims) + 1] * len(b.heads) for b in blocks],
        hidden=[None if b.hidden is None else max(units) + 1 for b in blocks],
        patches=max(tokens) + 1 if tokens else None,
    )


def head_widths(plan: Plan, sizes: Sizes) -> tuple[list[list[int]], list[list[int]]] | None:
    """Returns kept and dense widths per layer and head, or None if attention was left alone."""
    known = next((row for row in sizes.heads if row is not None), None)
    if known is None or all(block.heads is None for block in plan.blocks):
        return None
    dense = [row or known for row in sizes.heads]
    kept = [b.head_dims or full for b, full in zip(plan.blocks, dense, strict=True)]
    return kept, dense


def mlp_widths(plan: Plan, sizes: Sizes) -> tuple[list[int], list[int]] | None:
    """Returns kept and dense MLP widths per layer, or None if the MLPs were left alone."""
    known = next((width for width in sizes.hidden if width is not None), None)
    if known is None or all(block.hidden is None for block in plan.blocks):
        return None
    dense = [width or known for width in sizes.hidden]
    kept = [
        full if b.hidden is None else len(b.hidden)
        for b, full in zip(plan.blocks, dense, strict=True)
    ]
    return kept, dense


def kept_tokens(plan: Plan, sizes: Sizes) -> list[list[int]] | None:
    """Returns the patches that are still there per layer, or None if no layer drops any."""
    if sizes.patches is None:
        return None
    alive, rows = list(range(sizes.patches)), []
    for block in plan.blocks:
        alive = alive if block.tokens is None else block.tokens
        rows.append(alive)
    return rows if rows and len(rows[-1]) < sizes.patches else None


def grid_of(patches: int, img_size: Any, patch_size: Any = None) -> tuple[int, int]:
    """Finds how many patches an image has per column and per row.

    Args:
        patches: How many it has.
        img_size: One number or [height, width], where it is known.
        patch_size: The same of a patch; squares where it is not known.
    """
    if img_size and patch_size:
        whole, part = _pair(img_size), _pair(patch_size)
        rows, columns = whole[0] // part[0], whole[1] // part[1]
        if rows * columns == patches:
            return rows, columns
    if isinstance(img_size, Sequence) and len(img_size) >= 2:
        height, width = img_size[-2:]
        side = math.sqrt(height * width / patches)
        rows, columns = round(height / side), round(width / side)
        if rows * columns == patches:
            return rows, columns
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, patches)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size[-2:] if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def scores(masks: Masks) -> dict[str, np.ndarray]:
    """Returns the size of every mask value per kind that was searched.

    A dropped patch is gone for good, so what ranks it in a layer is its smallest gate so far.
    """
    found = {
        "attention": [m.detach().abs().flatten() for m in masks.attention if m is not None],
        "mlp": [m.detach().abs().flatten() for m in masks.mlp if m is not None],
    }
    values = {
        kind: np.concatenate([m.float().cpu().numpy() for m in some])
        for kind, some in found.items()
        if some
    }
    gates = [g.detach().abs().float().cpu().numpy() for g in masks.token if g is not None]
    if gates:
        values["token"] = np.minimum.accumulate(np.stack(gates), axis=0).ravel()
    return values


def keeps(plan: Plan, masks: Masks) -> dict[str, np.ndarray]:
    """Returns for every value of `scores` whether the plan keeps it."""
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for index, block in enumerate(plan.blocks):
        attention, mlp, token = masks.attention[index], masks.mlp[index], masks.token[index]
        if attention is not None:
            for head in range(attention.shape[0]):
                kept["attention"].append(
                    _flags(attention.shape[1], block.heads[head] if block.heads else None)
                )
        if mlp is not None:
            kept["mlp"].append(_flags(len(mlp), block.hidden))
        if token is not None:
            kept["token"].append(_flags(len(token), block.tokens))
    return {kind: np.concatenate(flags) for kind, flags in kept.items() if flags}


def _flags(size: int, kept: Sequence[int] | None) -> np.ndarray:
    flags = np.full(size, kept is None)
    if kept is not None:
        flags[list(kept)] = True
    return flags


def threshold(values: np.ndarray, kept: np.ndarray) -> tuple[float, int] | None:
    """Finds the mask value at which a plan cuts.

    Rounding a width moves a few units across the line, so there may be no clean one. The line
    returned keeps as many units as the plan does; without rounding it lies between the smallest
    kept and the largest cut value.

    Args:
        values: Mask values of one kind.
        kept: Whether the plan keeps each of them.

    Returns:
        The threshold and how many kept units lie below it, or None if nothing or everything is cut.
    """
    number = int(kept.sum())
    if number in (0, len(values)):
        return None
    ranked = np.sort(values)[::-1]
    value = float(ranked[number - 1] + ranked[number]) / 2
    return value, int((kept & (values < ranked[number - 1])).sum())


def sentence(plan: Plan, sizes: Sizes) -> str:
    """Says how much of each kind a plan keeps."""
    shares: dict[str, tuple[int, int]] = {}
    if heads := head_widths(plan, sizes):
        shares["head dimensions"] = sum(map(sum, heads[0])), sum(map(sum, heads[1]))
    if mlp := mlp_widths(plan, sizes):
        shares["MLP hidden units"] = sum(mlp[0]), sum(mlp[1])
    if tokens := kept_tokens(plan, sizes):
        full = (sizes.patches or 0) * len(tokens)
        shares["patches, counted over all layers"] = sum(map(len, tokens)), full
    if not shares:
        return "This plan cuts nothing."
    parts = [
        f"{number} of {dense} {name} ({100 * number / dense:.0f} %)"
        for name, (number, dense) in shares.items()
    ]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    rounding = f" Widths are multiples of {plan.round_to} or whole." if plan.round_to > 1 else ""
    return f"The slim model keeps {listed}.{rounding}"
