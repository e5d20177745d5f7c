"""One stage from its folder to its saved model: what dense, search and retrain have in common."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..checkpoint import load, save
from .data.batches import open_data
from .evaluate import evaluate
from .report.forecast import Forecast
from .report.watch import Watch
from .runtime.context import StageContext
from .runtime.seeds import seed_everything
from .training.penalty import Penalty
from .training.train import Before, Outcome, open_stage, train


class Done(NamedTuple):
    """A stage that is done: the model as it is read from its folder, and result.json."""

    model: Any
    result: dict[str, Any]


def accuracy_of(outcome: Outcome) -> dict[str, Any]:
    """Returns the result of a stage that has nothing more to tell."""
    return {"accuracy": outcome.accuracy, "seconds": outcome.seconds}


def run_stage(
    context: StageContext,
    identity: Mapping[str, Any],
    build: Callable[[], nn.Module],
    *,
    output: Path | None = None,
    trains: Callable[[nn.Module], bool] = lambda model: True,
    penalty: Penalty | None = None,
    teacher: nn.Module | None = None,
    forecast: Callable[[], Forecast | None] | None = None,
    before: Before | None = None,
    keep_best: bool = False,
    finish: Callable[[Outcome], dict[str, Any]] = accuracy_of,
) -> Done:
    """Runs a stage, or goes on with it, or reads what it came to if it is done.

    Args:
        context: Where and how.
        identity: What must be the same when the stage goes on, beside its settings.
        build: Makes the model to train, from seeded random numbers; not called if all is done.
        output: Where the model goes, if not the folder of the stage.
        trains: Returns whether the model is trained at all, or evaluated as it is.
        penalty: Penalty of a search.
        teacher: A model to imitate where `settings.distill_loss_weight` is set.
        forecast: Makes what cuts and evaluates after every epoch of a search.
        before: Called once before the first epoch; what it returns is kept with the checkpoints.
        keep_best: Whether the model of the best epoch is kept in folder/best, if not the last one.
        finish: Returns what result.json holds, in the primary process, the model being saved.
    """
    output, settings = output or context.folder, context.settings
    stage = open_stage(context, identity)
    if (done := stage.result()) is not None:
        return Done(load(output), done)
    seed_everything(settings.seed, 0)
    model = build()
    if trains(model):
        with closing(Watch(context, None if forecast is None else forecast())) as watch:
            outcome = train(
                model,
                context,
                stage,
                penalty=penalty,
                teacher=teacher if settings.distill_loss_weight else None,
                before=before,
                after=watch,
                keep_best=keep_best,
            )
    else:
        outcome = _evaluated(model, context)
    if context.world.primary:
        save(outcome.model, output, ignore_hooks=True)
        if outcome.best_model is not None:
            save(outcome.best_model, context.folder / "best", ignore_hooks=True)
        stage.finish(finish(outcome))
    context.world.wait()
    # As a run that goes on after this stage has it: without the stage's stochastic depth.
    return Done(load(output), stage.read_result())


def _evaluated(model: nn.Module, context: StageContext) -> Outcome:
    settings, world = context.settings, context.world
    with closing(open_data(settings, model, world)) as data:
        accuracy = evaluate(model.to(world.device), data, world, settings)
    return Outcome(model, accuracy, 0.0, {}, {}, None)
