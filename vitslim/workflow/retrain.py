"""Step three: cut to a plan and train what is left, from the weights the search ended with."""

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from ..plan import Plan
from ..surgery import slim
from .finetune import train_on
from .runtime.context import StageContext


def retrain(
    masked: nn.Module,
    plan: Plan,
    context: StageContext,
    *,
    fold: bool = True,
    teacher: nn.Module | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Cuts a masked model to a plan, trains it and writes the slim model.

    The optimiser is made after the cut, so it holds no state of what is gone.

    Args:
        masked: The model the search ended with; it stays as it is.
        plan: What every block keeps.
        context: How to train, and where the states and the result go.
        fold: Whether the learned values of the masks are multiplied into the weights.
        teacher: The dense model, to imitate where `settings.distill_loss_weight` is set.
        output: Where the slim model goes, if not the folder of the stage.

    Returns:
        {"cut": {"accuracy"}, "retrained": {"accuracy"}, "best": {"epoch", "accuracy"}, "params",
        "macs", "seconds"}. Where the best epoch is not the last one, its model is in folder/best.
    """
    digest = hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
    done = train_on(
        lambda: slim(masked, plan, fold=fold),
        context,
        {"fold": fold, "plan": digest},
        ("cut", "retrained"),
        teacher=teacher,
        output=output,
    )
    return done.result
