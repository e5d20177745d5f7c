"""Step one: learn which attention dimensions, MLP units and tokens matter."""

import functools
from collections.abc import Iterable
from pathlib import Path

from timm.layers import DropPath
from torch import nn

from ..checkpoint import load, save
from ..errors import VitslimError
from ..masks import KINDS, Masks, sparsity_loss
from ..surgery import mask
from .settings import Settings
from .state import StageFolder
from .train import journal_for, stage_args, train
from .world import World, seed_everything


def search(
    model: nn.Module,
    settings: Settings,
    folder: Path,
    world: World,
    *,
    granularity: str = "head_dim",
    kinds: Iterable[str] = KINDS,
    token_start: str = "paper",
    skip: Iterable[str] = (),
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
        skip: Blocks to leave alone.
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
        skip=skip,
    )
    stage = open_stage(folder, args, resume)
    if stage.result() is not None:
        return load(folder)
    seed_everything(settings.seed, 0)
    masked = mask(model, granularity, kinds, token_start, skip)
    set_drop_path(masked, settings.drop_path)
    penalty = functools.partial(
        sparsity_loss,
        attention=settings.l1_attention,
        mlp=settings.l1_mlp,
        token=settings.l1_token,
    )
    journal = journal_for("search", summary or folder, world)
    outcome = train(masked, settings, stage, world, journal, penalty=penalty)
    if world.primary:
        save(outcome.model, folder)
        Masks.of(outcome.model).save(folder / "masks.safetensors")
        stage.finish({"accuracy": outcome.accuracy, "seconds": outcome.seconds})
    world.wait()
    return outcome.model


def open_stage(folder: Path, args: dict[str, object], resume: bool) -> StageFolder:
    """Opens the folder of a stage; what is in it already is gone on with only if asked."""
    stage = StageFolder(folder, args)
    if stage.started and not resume:
        raise VitslimError(
            f"{folder} holds an earlier run: add --resume to go on with it, "
            "or give another --output."
        )
    return stage


def set_drop_path(model: nn.Module, rate: float | None) -> None:
    """Sets stochastic depth, growing linearly with depth as timm builds it.

    Args:
        model: A timm vision transformer; its blocks' DropPath modules are replaced.
        rate: The rate of the deepest block, or None to leave the model as it is.
    """
    if rate is None:
        return
    depth = len(model.blocks)
    for index, block in enumerate(model.blocks):
        each = rate * index / max(depth - 1, 1)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(each) if each else nn.Identity())
