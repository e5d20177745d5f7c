"""Step one: learn which attention dimensions, MLP units and tokens matter."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..masks import Masks
from ..oneshot import rotate as rotated_copy
from ..surgery import mask
from .data.calibration import calibration
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
    rotate: int | None = None,
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
        rotate: On how many training images heads are rotated first, so that masks rank principal
            directions; None for not at all.
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

    def build() -> nn.Module:
        start = model if rotate is None else _rotated(model, context, rotate)
        return mask(start, **masks.mask_arguments)

    identity = {"model": base, **masks.mask_arguments}
    # An earlier version's search, which knew no rotation, can be gone on with.
    if rotate is not None:
        identity |= {"rotate": True, "calibration_images": rotate}
    done = run_stage(
        context,
        identity,
        build,
        penalty=Penalty(settings),
        teacher=teacher,
        forecast=forecast,
        finish=finish,
    )
    return done.model


def _rotated(model: nn.Module, context: StageContext, count: int) -> nn.Module:
    """Returns an equal model whose heads have their principal directions first."""
    world = context.world
    start = copy.deepcopy(model).to(world.device).eval()
    found = calibration(context.settings, start, world, count)
    context.journal.say(f"heads rotated on {len(found.images)} images")
    rotated: nn.Module = rotated_copy(
        start, found.images, seed=context.settings.seed, quiet=not world.primary
    )
    return rotated.train(model.training)
