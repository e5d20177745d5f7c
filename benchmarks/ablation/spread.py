"""Figures over seeds: means, spreads, and differences of pairs that share a seed."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from scipy.stats import t as student

CONFIDENCE = 0.95
BETTER, WORSE, SAME = "better", "worse", "no difference"

Cell = Mapping[str, Any]


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if values[1:] else math.nan)

    def text(self, digits: int) -> str:
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}"


class Difference(NamedTuple):
    """Mean of differences of pairs, the half width of its interval, and the pairs themselves."""

    mean: float
    half: float
    pairs: list[float]

    @property
    def verdict(self) -> str:
        """What this says of a loss, which is better when smaller."""
        # Of a single seed there is no interval, and no verdict.
        if not abs(self.mean) > self.half:
            return SAME
        return BETTER if self.mean < 0 else WORSE

    def text(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}"


def column(cells: Iterable[Cell], moment: str, what: str) -> dict[int, float]:
    """Returns a figure of every seed, such as "cross_entropy" of "retrained"."""
    return {cell["seed"]: cell[moment][what] for cell in cells}


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """Compares two columns seed by seed; the interval is Student's, of the mean difference."""
    pairs = [values[seed] - reference[seed] for seed in sorted(values)]
    if len(pairs) < 2:
        return Difference(pairs[0], math.nan, pairs)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    half = float(student.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * error
    return Difference(statistics.fmean(pairs), half, pairs)
