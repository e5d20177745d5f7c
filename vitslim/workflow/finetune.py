"""Training a model on from the weights it has: on other data, at another size, or after a cut."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..cost import cost
from ..errors import VitslimError
from ..surgery.classes import MaskedModel
from .classifier import fit_classifier
from .data.batches import Data
from .evaluate import evaluate
from .runtime.context import StageContext
from .stage import Done, run_stage
from .training.train import Outcome


def finetune(
    model: nn.Module,
    context: StageContext,
    *,
    teacher: nn.Module | None = None,
    output: Path | None = None,
    base: str = "",
) -> Done:
    """Trains a dense or slim model on from its weights; it gets a new classifier if it needs one.

    Args:
        model: What to start from; it stays as it is.
        context: How to train, and where the states and the result go.
        teacher: A model to imitate where `settings.distill_loss_weight` is set.
        output: Where the model goes, if not the folder of the stage.
        base: Which model this is, for the record.

    Returns:
        The model, and {"before": {"accuracy"}, "after": {"accuracy"}, "best": {"epoch",
        "accuracy"}, "params", "macs", "seconds"}. Where the best epoch is not the last one, its
        model is in folder/best.

    Raises:
        VitslimError: The model is masked.
    """
    if isinstance(model, MaskedModel):
        raise VitslimError(
            "A masked model is not fine-tuned: fine-tune the dense model, or cut this one first "
            "with `vitslim threshold` and `vitslim retrain`."
        )

    def build() -> nn.Module:
        start = copy.deepcopy(model)
        fit_classifier(start, context)
        return start

    return train_on(
        build, context, {"model": base}, ("before", "after"), teacher=teacher, output=output
    )


def train_on(
    build: Callable[[], nn.Module],
    context: StageContext,
    identity: Mapping[str, Any],
    names: tuple[str, str],
    *,
    teacher: nn.Module | None = None,
    output: Path | None = None,
) -> Done:
    """Runs a stage whose model is worth evaluating before it is trained, and keeps its best epoch.

    Args:
        build: Makes the model to start from.
        context: How to train, and where the states and the result go.
        identity: What must be the same when the stage goes on, beside its settings.
        names: What the accuracies before and after are called in the result.
        teacher: A model to imitate where `settings.distill_loss_weight` is set.
        output: Where the model goes, if not the folder of the stage.
    """
    before, after = names

    def accuracy_before(model: nn.Module, data: Data) -> dict[str, Any]:
        accuracy = evaluate(model, data, context.world, context.settings)
        when = "right after the cut" if before == "cut" else "before training"
        context.journal.say(f"{when}, accuracy {accuracy:.2f} %")
        return {before: {"accuracy": accuracy}}

    def finish(outcome: Outcome) -> dict[str, Any]:
        params, macs = cost(outcome.model)
        return {
            **outcome.facts,
            after: {"accuracy": outcome.accuracy},
            "best": outcome.best,
            "params": params,
            "macs": macs,
            "seconds": outcome.seconds,
        }

    return run_stage(
        context,
        identity,
        build,
        output=output,
        teacher=teacher,
        before=accuracy_before,
        keep_best=True,
        finish=finish,
    )
