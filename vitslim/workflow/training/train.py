"""A stage of training from its first update, or its newest checkpoint, to its result."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from torch import nn

from ...description import describe
from ...errors import VitslimError
from ..data.batches import Data
from ..runtime.context import StageContext
from ..runtime.world import World, cpu_threads
from .loop import After, Loop
from .penalty import Penalty
from .prepare import restore, stochastic_depth
from .state import StageFolder

Before = Callable[[nn.Module, Data], dict[str, Any]]


@dataclasses.dataclass
class Outcome:
    """What a stage came to.

    Attributes:
        model: Trained; the averaged one where there is one.
        accuracy: In percent, at the end.
        seconds: Of training and evaluating.
        facts: What `before` gave.
        best: Epoch and accuracy of the best epoch.
        best_model: Of that epoch, if wanted, not the last one, and its checkpoint whole.
    """

    model: nn.Module
    accuracy: float
    seconds: float
    facts: dict[str, Any]
    best: dict[str, Any]
    best_model: nn.Module | None


def train(
    model: nn.Module,
    context: StageContext,
    folder: StageFolder,
    *,
    penalty: Penalty | None = None,
    teacher: nn.Module | None = None,
    before: Before | None = None,
    after: After | None = None,
    keep_best: bool = False,
) -> Outcome:
    """Trains a model in place, or goes on from the newest checkpoint in the folder.

    Args:
        model: What to train; with a checkpoint in the folder, only its shapes matter.
        context: How, and where it is told.
        folder: Where checkpoints go.
        penalty: Of a search; the same in every process.
        teacher: A model to imitate, weighted by `settings.distill_loss_weight`.
        before: Called once before the first epoch; what it returns is kept with the checkpoints.
        after: Called after every epoch with the result so far, the data, and the epoch's row.
        keep_best: Whether the model of the best epoch is wanted beside the last one.

    Raises:
        VitslimError: The loss or a gradient is not finite; the last checkpoint stays as it was.
        Stopped: SIGTERM or SIGINT came; the update was finished and saved.
    """
    settings, world, journal = context.settings, context.world, context.journal
    # What cannot be saved at the end is refused before the first update.
    describe(model, ignore_hooks=True)
    own = stochastic_depth(model)
    with cpu_threads(settings.threads):
        loop = Loop(model.to(world.device), context, folder, penalty, teacher)
        with closing(loop.data):
            state, trouble = folder.latest()
            _insist(world, -1 if state is None else state.update, folder)
            if trouble:
                journal.say(f"{trouble}; going on from the checkpoint before it.")
            if state is not None:
                loop.load(state)
                epoch, step = divmod(loop.done, loop.updates)
                within = f" and {step} updates" if step else ""
                journal.say(f"going on after epoch {epoch}{within} of {settings.epochs} epochs.")
                journal.record(loop.rows)
            elif before is not None:
                loop.facts = before(loop.learner.result(), loop.data)
            loop.run(after)
    world.wait()
    seconds = sum(row["seconds"] for row in loop.rows)
    best = max(loop.rows, key=lambda row: (row["accuracy"], row["epoch"]))
    trained = loop.learner.result()
    best_model = loop.at(best["epoch"]) if keep_best and best is not loop.rows[-1] else None
    for each in (trained, best_model):
        if each is not None:
            # A stage's stochastic depth is its own, and is not saved with its model.
            restore(each, own)
    return Outcome(
        trained,
        loop.rows[-1]["accuracy"],
        seconds,
        loop.facts,
        {name: best[name] for name in ("epoch", "accuracy")},
        best_model,
    )


def open_stage(context: StageContext, identity: Mapping[str, Any]) -> StageFolder:
    """Opens the folder of a stage; what is in it already is gone on with only if asked.

    Args:
        context: The stage.
        identity: What must be the same when the stage goes on, beside its settings.
    """
    settings, world = context.settings, context.world
    args = {**settings.binding(world.size), **identity}
    stage = StageFolder(context.folder, args, settings.checkpoint_keep)
    if stage.started and not context.resume:
        raise VitslimError(
            f"{context.folder} holds an earlier run: add --resume to go on with it, "
            "or give another --output."
        )
    _insist(world, stage.result() is not None, stage)
    return stage


def _insist(world: World, seen: int, stage: StageFolder) -> None:
    """Stops processes that have seen different things, before they wait for each other for ever."""
    if not world.agree(seen):
        raise VitslimError(
            f"The processes do not see the same in {stage.path}: give an --output on a file system "
            "that they share, or start them again if it is one."
        )
