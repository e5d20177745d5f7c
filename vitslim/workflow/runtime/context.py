"""Where and how one stage runs; whatever trains is handed this one thing."""

import dataclasses
from functools import cached_property
from pathlib import Path

from ..options.settings import Settings
from .journal import Journal
from .world import World


@dataclasses.dataclass(frozen=True)
class StageContext:
    """One stage: its name, its settings, its processes and its folders.

    Attributes:
        name: As summary.csv has it: `dense`, `search`, `retrain/macs-60`, `finetune`.
        settings: How to train; a global batch size is shared among the processes at once.
        world: This process among all of them.
        folder: Where checkpoints and result.json go.
        run_folder: Folder of the run that the stage is part of; None for a stage alone.
        resume: Whether to go on with what is in the folder.
    """

    name: str
    settings: Settings
    world: World
    folder: Path
    run_folder: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", self.settings.among(self.world.size))

    @property
    def output(self) -> Path:
        """The folder of summary.csv, forecast.csv and TensorBoard."""
        return self.run_folder or self.folder

    @cached_property
    def journal(self) -> Journal:
        """Where the stage is told, always the same one."""
        return Journal(self.name, self.output / "summary.csv", quiet=not self.world.primary)
