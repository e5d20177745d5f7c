"""Step three: cut to a plan and train what is left, from the weights the search ended with."""

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from ..cost import cost
from ..plan import Plan
from ..surgery import slim
from .data.batches import Data
from .evaluate import evaluate
from .runtime.context import StageContext
from .stage import run_stage
from .training.train import Outcome


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

    def cut_accuracy(model: nn.Module, data: Data) -> dict[str, Any]:
        accuracy = evaluate(model, data, context.world, context.settings)
        context.journal.say(f"right after the cut, accuracy {accuracy:.2f} %")
        return {"cut": {"accuracy": accuracy}}

    def finish(outcome: Outcome) -> dict[str, Any]:
        params, macs = cost(outcome.model)
        return {
            **outcome.facts,
            "retrained": {"accuracy": outcome.accuracy},
            "best": outcome.best,
            "params": params,
            "macs": macs,
            "seconds": outcome.seconds,
        }

    digest = hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
    done = run_stage(
        context,
        {"fold": fold, "plan": digest},
        lambda: slim(masked, plan, fold=fold),
        output=output,
        teacher=teacher,
        before=cut_accuracy,
        keep_best=True,
        finish=finish,
    )
    return done.result
