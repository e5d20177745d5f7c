"""What is looked at after every epoch of a stage, beside its row in summary.csv."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...masks import Masks, mask_parameters
from ..data.batches import Data
from ..options.settings import Settings
from ..training.evaluate import evaluate
from ..training.world import World
from .board import Board, require_tensorboard
from .forecast import Forecast


class Watch:
    """Called after every epoch: forecasts the cut models, and writes TensorBoard files.

    Args:
        stage: Its name, such as `search` or `retrain/macs-60`.
        output: The run folder, or that of a lone stage.
        settings: Whether there is a TensorBoard, and how to evaluate.
        world: The processes that evaluate; the primary one writes.
        forecast: What is cut to which budgets, in a search.
    """

    def __init__(
        self,
        stage: str,
        output: Path,
        settings: Settings,
        world: World,
        forecast: Forecast | None = None,
    ) -> None:
        self.stage, self.output, self.settings, self.world = stage, output, settings, world
        self.forecast = forecast
        self._board: Board | None = None
        self._has_board = settings.tensorboard and world.primary
        if self._has_board:
            require_tensorboard()

    def __call__(self, model: nn.Module, data: Data, row: Mapping[str, Any]) -> None:
        """Looks at a model after an epoch.

        Args:
            model: The result so far.
            data: To evaluate on.
            row: What summary.csv says of the epoch.
        """
        forecasts: list[dict[str, Any]] = []
        if self.forecast is not None:
            accuracy = functools.partial(
                evaluate, data=data, world=self.world, settings=self.settings
            )
            forecasts = self.forecast(model, row["epoch"], accuracy)
        if self._has_board:
            if self._board is None:
                self._board = Board(self.output, self.stage, row["epoch"] - 1)
            masks = Masks.of(model) if mask_parameters(model) else None
            self._board.epoch(row, masks, forecasts)

    def close(self) -> None:
        """Closes what was opened; the stage is over."""
        if self._board is not None:
            self._board.close()
