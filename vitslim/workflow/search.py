"""Step one: learn which attention dimensions, MLP units and tokens matter."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import load, save
from ..masks import KINDS, Masks
from ..surgery import mask
from .options.settings import Settings
from .report.forecast import Forecast
from .report.watch import Watch
from .training.penalty import Penalty
from .training.train import journal_for, open_stage, stage_args, train
from .training.world import World, seed_everything


def search(
    model: nn.Module,
    settings: Settings,
    folder: Path,
    world: World,
    *,
    granularity: str = "head_dim",
    kinds: Iterable[str] = KINDS,
    token_start: str = "paper",
    token_gate: str = "input",
    skip: Iterable[str] = (),
    teacher: nn.Module | None = None,
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    planning: Mapping[str, Any] | None = None,
    fold: bool = True,
    resume: bool = False,
    summary: Path | None = None,
    base: str = "",
) -> nn.Module:
    """Trains masks and weights together and writes the masked model and `masks.safetensors`.

    Args:
        model: The dense model.
        settings: How to train.
        folder: Where the model, the masks, the states and the result go.
        world: This process among all of them.
        granularity: `head_dim`, `uniform` or `head`.
        kinds: Which masks take part.
        token_start: Whether token gates start at the paper's tanh(3) or at one.
        token_gate: Whether they scale the input of a layer, as in the paper, or weigh its keys.
        skip: Blocks to leave alone.
        teacher: A model to imitate where `settings.distill_loss_weight` is set.
        budgets: By name; the model cut to each of them is evaluated after every epoch.
        planning: Arguments of `vitslim.threshold` for that.
        fold: Argument of `vitslim.slim` for that.
        resume: Whether to go on with what is in the folder.
        summary: Folder of summary.csv, if not `folder`.
        base: Which model this is, for the record.
    """
    kinds, skip = tuple(kinds), tuple(skip)
    args = stage_args(
        settings,
        world,
        model=base,
        granularity=granularity,
        kinds=kinds,
        token_start=token_start,
        token_gate=token_gate,
        skip=skip,
    )
    stage = open_stage(folder, args, world, resume, settings.checkpoint_keep)
    if stage.result() is not None:
        return load(folder)
    seed_everything(settings.seed, 0)
    masked = mask(model, granularity, kinds, token_start, skip, token_gate)
    journal = journal_for("search", summary or folder, world)
    output = summary or folder
    forecast = None
    if settings.forecast and budgets:
        forecast = Forecast(budgets, planning or {}, fold, output, journal)
    with closing(Watch("search", output, settings, world, forecast)) as watch:
        outcome = train(
            masked,
            settings,
            stage,
            world,
            journal,
            penalty=Penalty(settings),
            teacher=teacher if settings.distill_loss_weight else None,
            after=watch,
        )
    if world.primary:
        save(outcome.model, folder, ignore_hooks=True)
        Masks.of(outcome.model).save(folder / "masks.safetensors")
        stage.finish({"accuracy": outcome.accuracy, "seconds": outcome.seconds})
    world.wait()
    # As a run that goes on after the search has it: without the search's stochastic depth.
    return load(folder)
