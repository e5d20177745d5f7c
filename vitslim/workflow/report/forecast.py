"""What would I get if I stopped now: the model cut to every budget after each epoch of a search.

`forecast.csv` has one row per epoch and budget: epoch (from 1), budget, accuracy (held out, top-1
in percent, right after the cut and without retraining), params and macs of the cut model, and the
fractions of attention dimensions, MLP units and tokens that it keeps. A budget that was out of
reach in an epoch has empty cells there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import VitslimError
from ...masks import Masks
from ...planning.threshold import threshold
from ...surgery import slim
from ..options.choices import PlanOptions
from ..runtime.journal import Journal, budget_text, read_table, write_table
from .kept import keeps

COLUMNS = ("epoch", "budget", "accuracy", "params", "macs", "attention", "mlp", "token")


class Forecast:
    """Cuts a model that is being searched to the budgets and evaluates what is left.

    Args:
        budgets: What was asked for, by the name of the plan. One of latency is left out, for
            measuring would take longer than an epoch.
        plans: How plans are made, and how the model is cut to them.
        folder: Where forecast.csv goes.
        journal: Where it is told; a quiet one makes this process write nothing.
    """

    def __init__(
        self,
        budgets: Mapping[str, Mapping[str, Any]],
        plans: PlanOptions,
        folder: Path,
        journal: Journal,
    ) -> None:
        self.budgets = {}
        self.plans, self.journal = plans, journal
        self.path = folder / "forecast.csv"
        for budget in budgets.values():
            if "latency" in budget:
                journal.say(
                    f"{budget_text(budget)} is not forecast: latency is measured at the end"
                )
            else:
                self.budgets[budget_text(budget)] = dict(budget)

    def __call__(
        self, model: nn.Module, epoch: int, evaluate: Callable[[nn.Module], float]
    ) -> list[dict[str, Any]]:
        """Forecasts after an epoch. Every process takes part, the primary one writes.

        Args:
            model: The masked model; it stays as it is.
            epoch: The epoch just done, from 1. Rows of later ones are dropped: they are from
                before the run went on at this epoch.
            evaluate: Returns the accuracy of a model in percent, the same in every process.

        Returns:
            One row per budget, with the columns of forecast.csv.
        """
        if not self.budgets:
            return []
        masks = Masks.of(model)
        rows = [
            self._row(model, masks, epoch, text, budget, evaluate)
            for text, budget in self.budgets.items()
        ]
        if not self.journal.quiet:
            write_table(self.path, COLUMNS, [*self._earlier(epoch), *rows])
        told = [
            f"{row['budget']} -> "
            + ("out of reach" if row["accuracy"] is None else f"{row['accuracy']:.1f} %")
            for row in rows
        ]
        self.journal.say(f"if you stopped now: {', '.join(told)}")
        return rows

    @torch.no_grad()
    def _row(
        self,
        model: nn.Module,
        masks: Masks,
        epoch: int,
        text: str,
        budget: Mapping[str, Any],
        evaluate: Callable[[nn.Module], float],
    ) -> dict[str, Any]:
        row: dict[str, Any] = {**dict.fromkeys(COLUMNS), "epoch": epoch, "budget": text}
        try:
            plan = threshold(model, budget, masks=masks, **self.plans.threshold_arguments)
        except VitslimError as error:
            self.journal.say(f"{text} cannot be met now: {error}")
            return row
        shares = {kind: float(flags.mean()) for kind, flags in keeps(plan, masks).items()}
        accuracy = evaluate(slim(model, plan, self.plans.fold))
        return {**row, "accuracy": accuracy, **plan.reached, **shares}

    def _earlier(self, epoch: int) -> list[dict[str, str]]:
        """Returns the rows on disk that stay beside those of this epoch."""
        kept = []
        for row in read_table(self.path):
            number = row.get("epoch") or ""
            if number.isdecimal() and (
                int(number) < epoch
                or (int(number) == epoch and row.get("budget") not in self.budgets)
            ):
                kept.append(row)
        return kept
