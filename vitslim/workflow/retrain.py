"""Step three: cut to a plan and train what is left, from the weights the search ended with."""

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import load, save
from ..cost import cost
from ..plan import Plan
from ..surgery import slim
from .data.batches import Data
from .options.settings import Settings
from .report.watch import Watch
from .training.evaluate import evaluate
from .training.train import journal_for, open_stage, stage_args, train
from .training.world import World, seed_everything


def retrain(
    masked: nn.Module,
    plan: Plan,
    settings: Settings,
    folder: Path,
    world: World,
    *,
    fold: bool = True,
    teacher: nn.Module | None = None,
    resume: bool = False,
    output: Path | None = None,
    stage: str = "retrain",
    summary: Path | None = None,
) -> dict[str, Any]:
    """Cuts a masked model to a plan, trains it and writes the slim model.

    The optimiser is made after the cut, so it holds no state of what is gone.

    Args:
        masked: The model the search ended with; it stays as it is.
        plan: What every block keeps.
        settings: How to train.
        folder: Where the states and the result go.
        world: This process among all of them.
        fold: Whether the learned values of the masks are multiplied into the weights.
        teacher: The dense model, to imitate where `settings.distill_loss_weight` is set.
        resume: Whether to go on with what is in the folder.
        output: Where the slim model goes, if not `folder`.
        stage: Name in summary.csv.
        summary: Folder of summary.csv, if not `folder`.

    Returns:
        {"cut": {"accuracy"}, "retrained": {"accuracy"}, "best": {"epoch", "accuracy"}, "params",
        "macs", "seconds"}. Where the best epoch is not the last one, its model is in folder/best.
    """
    output = output or folder
    digest = hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
    args = stage_args(settings, world, fold=fold, plan=digest)
    place = open_stage(folder, args, world, resume, settings.checkpoint_keep)
    done = place.result()
    if done is not None:
        load(output)
        return done
    seed_everything(settings.seed, 0)
    model = slim(masked, plan, fold=fold)
    journal = journal_for(stage, summary or folder, world)

    def cut_accuracy(model: nn.Module, data: Data) -> dict[str, Any]:
        accuracy = evaluate(model, data, world, settings)
        journal.say(f"right after the cut, accuracy {accuracy:.2f} %")
        return {"cut": {"accuracy": accuracy}}

    with closing(Watch(stage, summary or folder, settings, world)) as watch:
        outcome = train(
            model,
            settings,
            place,
            world,
            journal,
            teacher=teacher if settings.distill_loss_weight else None,
            before=cut_accuracy,
            after=watch,
            keep_best=True,
        )
    params, macs = cost(outcome.model)
    result = {
        **outcome.facts,
        "retrained": {"accuracy": outcome.accuracy},
        "best": outcome.best,
        "params": params,
        "macs": macs,
        "seconds": outcome.seconds,
    }
    if world.primary:
        save(outcome.model, output, ignore_hooks=True)
        if outcome.best_model is not None:
            save(outcome.best_model, folder / "best", ignore_hooks=True)
        place.finish(result)
    world.wait()
    return result
