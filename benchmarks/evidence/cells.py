"""The cells of a study in order of worth, and what each of them does."""

import copy
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

from .methods import METHODS, Bench, Ready
from .recipe import RATES, TAUGHT, fit, judged, rounded, tuning_settings


class Cell(NamedTuple):
    """One JSON of a study.

    Attributes:
        method: A key of `METHODS`, or "dense".
        seed: Of calibration images, labels that are drawn, search and retraining.
        budget: In percent of the dense model's MACs.
        way: "cut" or "refitted": whether what is kept makes up for what is cut.
        epochs: Of retraining after it.
    """

    method: str
    seed: int
    budget: int
    way: str
    epochs: int = 0

    @property
    def name(self) -> str:
        """Names the file."""
        end = f"-{self.epochs}-epochs" if self.epochs else ""
        return f"{self.method}-{self.seed}-{self.budget}-{self.way}{end}"


DENSE = Cell("dense", 0, 100, "cut")
# What is trained on, the most telling first: both ways of ours and of the best rival, then as the
# others come.
RETRAINED = (
    ("ours", "refitted"),
    ("torch-pruning", "cut"),
    ("taylor", "cut"),
    ("search", "cut"),
    ("taylor", "refitted"),
    ("search", "refitted"),
    ("scratch", "cut"),
    ("magnitude", "cut"),
    ("random", "cut"),
    ("ours", "cut"),
)


def in_order(
    seeds: Sequence[int],
    budgets: Sequence[int],
    other_budgets: Sequence[int],
    retrain_budgets: Sequence[int],
    epochs: Sequence[int],
    only: Sequence[str] | None = None,
) -> list[Cell]:
    """Returns the cells, the most telling first.

    The first seed is done whole; then each part for all others, before the next part of any.

    Args:
        seeds: The first is done whole before the others.
        budgets: Of ours, in percent of MACs.
        other_budgets: Of rivals and ablations.
        retrain_budgets: Those that are retrained.
        epochs: Lengths of retraining, each with a schedule of its own.
        only: Keys of `METHODS`; None for all.
    """
    found = [DENSE]
    for some in (seeds[:1], seeds[1:]):
        parts = [_parts(seed, budgets, other_budgets, retrain_budgets, epochs) for seed in some]
        found += [cell for part in zip(*parts, strict=True) for cells in part for cell in cells]
    return [each for each in found if only is None or each.method in (*only, "dense")]


def _parts(
    seed: int,
    budgets: Sequence[int],
    other_budgets: Sequence[int],
    retrain_budgets: Sequence[int],
    epochs: Sequence[int],
) -> list[list[Cell]]:
    """Returns the cells of a seed in parts, the most telling first."""

    def cuts(group: str, way: str) -> list[Cell]:
        chosen = budgets if group == "ours" else other_budgets
        names = [n for n, m in METHODS.items() if m.group == group and way in m.ways]
        return [Cell(name, seed, budget, way) for name in names for budget in chosen]

    def retrained(length: int) -> list[Cell]:
        pairs = [(pair, each) for pair in RETRAINED for each in retrain_budgets]
        return [Cell(method, seed, each, way, length) for (method, way), each in pairs]

    lengths = sorted(epochs)
    return [
        cuts("ours", "refitted"),
        cuts("rival", "cut"),
        cuts("ours", "cut"),
        cuts("rival", "refitted"),
        *([retrained(lengths[0])] if lengths else []),
        [*cuts("search", "cut"), *cuts("search", "refitted")],
        cuts("ablation", "refitted"),
        *(retrained(each) for each in lengths[1:]),
    ]


class Worker:
    """Makes cells one after the other, and keeps what the next one needs too."""

    def __init__(self, bench: Bench, rate: float | None = None) -> None:
        self._bench, self._rate = bench, rate

    def make(self, cell: Cell) -> dict[str, Any]:
        """Returns what a cell finds: scores, cost, and wall seconds of every step."""
        found: dict[str, Any] = {}
        if cell.method == "dense":
            model: nn.Module = self._bench.dense
            seconds: dict[str, float] = {}
        else:
            ready = self._ready(cell.method, cell.seed)
            began = time.perf_counter()
            model = ready.cut(cell.budget, cell.way == "refitted")
            step = "cut and refit" if cell.way == "refitted" else "cut"
            seconds = {**ready.seconds, step: time.perf_counter() - began}
        if cell.epochs:
            model, found, seconds["retraining"] = self._retrained(model, cell)
        found |= judged(model, self._bench.photos.held_out)
        return {**cell._asdict(), **found, "seconds": rounded(seconds)}

    @lru_cache(maxsize=8)  # noqa: B019 - there is one worker in a process
    def _ready(self, method: str, seed: int) -> Ready:
        return METHODS[method].make(self._bench, seed)

    def _retrained(self, model: nn.Module, cell: Cell) -> tuple[nn.Module, dict[str, Any], float]:
        bench = self._bench
        rate = self._rate or RATES["scratch" if cell.method == "scratch" else cell.way]
        settings = tuning_settings(
            bench.links, cell.seed, bench.batch_size, epochs=cell.epochs, lr=rate, **TAUGHT
        )
        # A copy, for a teacher is frozen.
        teacher = copy.deepcopy(bench.dense)
        done = fit(model, settings, bench.folder / "training" / cell.name, teacher)
        return done.model, {"lr": rate}, done.seconds
