"""What is looked at after every epoch of a stage, beside its row in summary.csv."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...masks import Masks, mask_parameters
from ..data.batches import Data
from ..evaluate import evaluate
from ..runtime.context import StageContext
from .board import Board, require_tensorboard
from .forecast import Forecast


class Watch:
    """Called after every epoch: forecasts the cut models, and writes TensorBoard files.

    Args:
        context: The stage; its primary process writes.
        forecast: What is cut to which budgets, in a search.
    """

    def __init__(self, context: StageContext, forecast: Forecast | None = None) -> None:
        self.context, self.forecast = context, forecast
        self._board: Board | None = None
        self._has_board = context.settings.tensorboard and context.world.primary
        if self._has_board:
            require_tensorboard()

    def __call__(self, model: nn.Module, data: Data, row: Mapping[str, Any]) -> None:
        """Looks at a model after an epoch.

        Args:
            model: The result so far.
            data: To evaluate on.
            row: What summary.csv says of the epoch.
        """
        context = self.context
        forecasts: list[dict[str, Any]] = []
        if self.forecast is not None:
            accuracy = functools.partial(
                evaluate, data=data, world=context.world, settings=context.settings
            )
            forecasts = self.forecast(model, row["epoch"], accuracy)
        if self._has_board:
            if self._board is None:
                self._board = Board(context.output, context.name, row["epoch"] - 1)
            masks = Masks.of(model) if mask_parameters(model) else None
            self._board.epoch(row, masks, forecasts)

    def close(self) -> None:
        """Closes what was opened; the stage is over."""
        if self._board is not None:
            self._board.close()
