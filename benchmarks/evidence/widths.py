"""Plans as other tools make them: every layer keeps one fraction, every head one width."""

from torch import Tensor, nn

from vitslim import Masks, VitslimError
from vitslim.cost import Geometry
from vitslim.description import base_of
from vitslim.plan import BlockPlan, Plan


def even_widths(model: nn.Module, scores: Masks, budget: int) -> Plan:
    """Returns the largest plan of equal widths within a budget; the scores choose the units.

    Each head keeps the best of its own dimensions. The fraction is the same for heads and MLPs but
    for what a whole dimension of every head leaves of the budget, which the hidden units take, as
    with Torch-Pruning in this study.

    Args:
        model: The dense one.
        scores: Of all attention dimensions and hidden units.
        budget: In percent of the dense model's MACs.

    Raises:
        VitslimError: The budget is out of reach.
    """
    geometry = Geometry.of(model)
    limit = budget / 100 * geometry.cost().macs
    hidden = min(len(layer) for layer in scores.mlp)
    wide = min(layer.shape[1] for layer in scores.attention)

    def blocks(width: int, units: int) -> list[BlockPlan]:
        return [
            BlockPlan([_best(head, width) for head in attention], _best(mlp, units))
            for attention, mlp in zip(scores.attention, scores.mlp, strict=True)
        ]

    def macs(width: int, units: int) -> int:
        return geometry.cost(geometry.planned(blocks(width, units))).macs

    if macs(1, 1) > limit:
        raise VitslimError(f"{budget}% of the MACs is out of reach of even widths")
    width = max(
        (w for w in range(1, wide + 1) if macs(w, max(1, hidden * w // wide)) <= limit), default=1
    )
    low, high = 1, hidden
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if macs(width, middle) <= limit else (low, middle - 1)
    kept = blocks(width, low)
    reached = geometry.cost(geometry.planned(kept))
    return Plan(base_of(model), {"macs": f"{budget}%"}, reached._asdict(), 1, kept)


def _best(scores: Tensor, count: int) -> list[int]:
    order = scores.abs().argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())
