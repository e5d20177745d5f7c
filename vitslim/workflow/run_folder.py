"""The folder of a job of several stages: whose it is, and what it was asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import VitslimError
from ..files import atomic_write
from .runtime.world import World
from .training.state import StageFolder


def begin(output: Path, given: Mapping[str, Any], world: World, resume: bool) -> None:
    """Refuses a folder that holds another run, and writes args.yaml where none has begun.

    What a stage was told is checked when that stage is reached, so budgets can be added.

    Args:
        output: The folder; the first stage's is `dense` in it.
        given: The whole merged recipe.
        world: The processes, which all look before one writes.
        resume: Whether to go on with what is in the folder.
    """
    # A run that was refused before its first checkpoint has left nothing but its arguments.
    begun = StageFolder(output / "dense", {}).started
    if begun and not resume:
        raise VitslimError(
            f"{output} holds an earlier run: add --resume to go on with it, "
            "or give another --output."
        )
    world.wait()
    if world.primary and not begun:
        write_args(output, given)


def write_args(output: Path, given: Mapping[str, Any]) -> None:
    """Writes the whole merged recipe, in the form that `-c` reads."""
    atomic_write(output / "args.yaml", yaml.safe_dump(dict(given), sort_keys=False))
