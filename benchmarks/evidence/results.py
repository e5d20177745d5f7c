"""The cells of a study, gathered over seeds."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .methods import METHODS

Found = Mapping[str, Any]


class Line(NamedTuple):
    """What is one line of a table or plot: a method, and whether it is refitted."""

    method: str
    way: str

    @property
    def label(self) -> str:
        return METHODS[self.method].label


class Range(NamedTuple):
    """Mean, least and most over seeds."""

    mean: float
    least: float
    most: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Range":
        values = list(values)
        return cls(statistics.fmean(values), min(values), max(values), len(values))

    def text(self) -> str:
        """Returns it with one digit, the range in brackets where there are several seeds."""
        if self.seeds == 1:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ({self.least:.1f}–{self.most:.1f})"  # noqa: RUF001


class Results:
    """All cells of a study.

    Args:
        whole: As `study.gather` writes them.
    """

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self.about: dict[str, Any] = whole["about"]
        self.dense: Found = next(cell for cell in whole["cells"] if cell["method"] == "dense")
        self._cells = [cell for cell in whole["cells"] if cell["method"] in METHODS]

    def lines(self, way: str, groups: Iterable[str], epochs: bool = False) -> list[Line]:
        """Returns the lines of some groups of methods that are there, in the methods' order.

        Args:
            way: "cut" or "refitted".
            groups: Of "ours", "ablation", "rival" and "search".
            epochs: Whether those are wanted that were retrained.
        """
        there = {
            cell["method"]
            for cell in self._cells
            if cell["way"] == way and bool(cell["epochs"]) == epochs
        }
        chosen = tuple(groups)
        return [
            Line(name, way)
            for name, method in METHODS.items()
            if name in there and method.group in chosen
        ]

    def budgets(self) -> list[int]:
        """Returns the budgets in percent of MACs, the largest first."""
        return sorted({cell["budget"] for cell in self._cells}, reverse=True)

    def retrained_budgets(self) -> list[int]:
        """Returns those at which something was retrained, the largest first."""
        found = {cell["budget"] for cell in self._cells if cell["epochs"]}
        return sorted(found, reverse=True)

    def epochs(self) -> list[int]:
        """Returns the lengths of retraining, 0 for none first."""
        return sorted({cell["epochs"] for cell in self._cells} | {0})

    def cells(self, line: Line, budget: int, epochs: int = 0) -> list[Found]:
        """Returns the cells of all seeds."""
        wanted = (line.method, line.way, budget, epochs)
        names = ("method", "way", "budget", "epochs")
        return [c for c in self._cells if tuple(c[name] for name in names) == wanted]

    def accuracy(self, line: Line, budget: int, epochs: int = 0) -> Range | None:
        """Returns accuracy in percent, None where no cell is there."""
        found = self.cells(line, budget, epochs)
        return Range.of(cell["accuracy"] for cell in found) if found else None

    def minutes(self, line: Line, budget: int, epochs: int = 0) -> Range | None:
        """Returns minutes of wall time of all that the method did, None where no cell is there."""
        found = self.cells(line, budget, epochs)
        return Range.of(sum(c["seconds"].values()) / 60 for c in found) if found else None
