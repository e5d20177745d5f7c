"""Budgets of latency: the MACs that reach a measured time are found by bisection."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import VitslimError
from ..masks import Masks
from ..plan import Plan
from ..planning.threshold import fraction_of, threshold
from ..surgery import slim
from .latency import measure
from .models import base_model

STEPS = 6


def plan_for(
    masked: nn.Module,
    budget: Mapping[str, Any],
    masks: Masks | None = None,
    *,
    batch_size: int = 1,
    **options: Any,
) -> Plan:
    """Plans any budget, also `latency=60%` of the dense model's time on the model's device.

    Args:
        masked: The model the search ended with.
        budget: As `vitslim.threshold` takes it, or with `latency` alone.
        masks: The learned masks, if not those of the model.
        batch_size: Images per call when latency is measured.
        **options: Passed to `vitslim.threshold`.
    """
    if "latency" not in budget:
        return threshold(masked, budget, masks=masks, **options)
    if set(budget) != {"latency"}:
        raise VitslimError("A latency budget stands alone: it is met by choosing the MACs.")
    wanted = fraction_of("latency", budget["latency"])
    dense = base_model(masked)
    best: Plan | None = None
    low, high, fastest = 0.0, 1.0, float("inf")
    for _ in range(STEPS):
        middle = (low + high) / 2
        try:
            plan = threshold(masked, {"macs": f"{100 * middle:.4f}%"}, masks=masks, **options)
        except VitslimError:
            # Out of reach is too small a budget.
            low = middle
            continue
        times = measure({"dense": dense, "slim": slim(masked, plan)}, (batch_size,), seconds=0.3)
        ratio = times["slim"][str(batch_size)] / times["dense"][str(batch_size)]
        fastest = min(fastest, ratio)
        if ratio <= wanted:
            best, low = plan, middle
        else:
            high = middle
    if best is None:
        raise VitslimError(
            f"A latency of {wanted:.0%} of the dense model's is out of reach: "
            f"the fastest plan tried took {fastest:.0%}."
        )
    return Plan.from_dict({**best.to_dict(), "budget": dict(budget)})
