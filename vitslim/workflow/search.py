"""Step one: learn which attention dimensions, MLP units and tokens matter."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..masks import Masks
from ..surgery import mask
from .options.choices import MaskOptions, PlanOptions
from .report.forecast import Forecast
from .runtime.context import StageContext
from .stage import accuracy_of, run_stage
from .training.penalty import Penalty
from .training.train import Outcome


def search(
    model: nn.Module,
    context: StageContext,
    *,
    masks: MaskOptions | None = None,
    teacher: nn.Module | None = None,
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    plans: PlanOptions | None = None,
    base: str = "",
) -> nn.Module:
    """Trains masks and weights together and writes the masked model and `masks.safetensors`.

    Args:
        model: The dense model.
        context: How to train, and where the model, the masks, the states and the result go.
        masks: Which masks to learn; None is the paper's choice.
        teacher: A model to imitate where `settings.distill_loss_weight` is set.
        budgets: By name; the model cut to each of them is evaluated after every epoch.
        plans: How it is cut for that.
        base: Which model this is, for the record.
    """
    masks, settings = masks or MaskOptions(), context.settings

    def forecast() -> Forecast | None:
        if not (settings.forecast and budgets):
            return None
        return Forecast(budgets, plans or PlanOptions(), context.output, context.journal)

    def finish(outcome: Outcome) -> dict[str, Any]:
        Masks.of(outcome.model).save(context.folder / "masks.safetensors")
        return accuracy_of(outcome)

    done = run_stage(
        context,
        {"model": base, **masks.mask_arguments},
        lambda: mask(model, **masks.mask_arguments),
        penalty=Penalty(settings),
        teacher=teacher,
        forecast=forecast,
        finish=finish,
    )
    return done.model
