"""Runs every cell of the study that is not there yet, several at a time.

    python -m benchmarks.ablation.study [--jobs 2] [--seeds 5] [--budgets 30% 15%]

Every cell is a JSON in the folder of the study, so one that was stopped goes on by the same
command. When all are there, they are gathered in results/ablation-digits.json.
"""

import argparse
import functools
import io
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from benchmarks import records
from vitslim import VitslimError
from vitslim.files import atomic_write

from . import cells
from .recipe import EPOCHS, MODEL, RATES

RESULTS = records.FOLDER / "ablation-digits.json"
BUDGETS = ("30%", "15%")
Work = Callable[[Path], dict[str, Any]]


class Cell(NamedTuple):
    """One JSON of the study.

    Attributes:
        table: What it is for: "models", "ablation" or "baselines".
        facts: What tells it from the others; its file is named by them.
        work: Given the folder of the study, returns what is found.
    """

    table: str
    facts: dict[str, Any]
    work: Work

    def path(self, folder: Path) -> Path:
        name = " ".join(str(value) for value in self.facts.values())
        return folder / "cells" / self.table / f"{name}.json"


def phases(seeds: Sequence[int], budgets: Sequence[str]) -> list[list[Cell]]:
    """Returns the cells in phases, each of which needs models of those before it."""
    dense = [_cell("models", cells.dense, "dense", seed) for seed in seeds]
    models = [_cell("models", cells.longer, "longer", seed) for seed in seeds]
    models += [
        _cell("models", functools.partial(cells.searched, name=name), name, seed)
        for name in cells.SEARCHES
        for seed in seeds
    ]
    last = [_cell("baselines", cells.uncut, "uncut", seed, way="") for seed in seeds]
    for seed in seeds:
        for budget in budgets:
            last += _cut(seed, budget)
    return [dense, models, last]


def _cut(seed: int, budget: str) -> Iterator[Cell]:
    for name in cells.VARIANTS:
        yield _cell("ablation", functools.partial(cells.cut, name=name), name, seed, budget)
    for name in cells.RIVALS:
        for way in ("at once", "after"):
            work = functools.partial(cells.rival, name=name, at_once=way == "at once")
            yield _cell("baselines", work, name, seed, budget, way)
    for way in ("same", "all"):
        work = functools.partial(cells.scratch, pretraining=way == "all")
        yield _cell("baselines", work, "from scratch", seed, budget, way)


def _cell(
    table: str,
    work: Callable[..., dict[str, Any]],
    name: str,
    seed: int,
    budget: str | None = None,
    way: str | None = None,
) -> Cell:
    facts: dict[str, Any] = {"name": name, "seed": seed}
    given: dict[str, Any] = {"seed": seed}
    if budget is not None:
        facts["budget"] = given["budget"] = budget
    if way is not None:
        facts["way"] = way
    return Cell(table, facts, functools.partial(work, **given))


def make(cell: Cell, folder: Path) -> float:
    """Does the work of a cell, writes its JSON and returns the seconds of CPU time it took."""
    began = time.process_time()
    # Two workers that tell of every epoch at once tell nothing; errors are raised all the same.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        found = cell.work(folder)
    seconds = time.process_time() - began
    whole = {"table": cell.table, **cell.facts, **found, "seconds": round(seconds, 1)}
    atomic_write(cell.path(folder), json.dumps(whole, indent=1) + "\n")
    return seconds


def run(plan: Sequence[Sequence[Cell]], folder: Path, jobs: int) -> None:
    """Makes the cells that are missing, a phase after the other."""
    # Spawned, because torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        for phase in plan:
            missing = [cell for cell in phase if not cell.path(folder).exists()]
            waiting = {pool.submit(make, cell, folder): cell for cell in missing}
            for count, future in enumerate(as_completed(waiting), 1):
                cell = waiting[future]
                name = " ".join(str(value) for value in cell.facts.values())
                print(f"{count}/{len(missing)} {name}: {future.result():.1f} s", flush=True)


def claim(folder: Path) -> None:
    """Refuses a folder whose cells were made by another recipe."""
    path, recipe = folder / "recipe.json", json.dumps([MODEL, EPOCHS, RATES]) + "\n"
    if path.exists() and path.read_text() != recipe:
        raise VitslimError(f"{folder} holds a study of another recipe: give another --folder.")
    atomic_write(path, recipe)


def gather(plan: Sequence[Sequence[Cell]], folder: Path) -> dict[str, Any]:
    """Returns all cells in one object, with what they were made with."""
    found = [json.loads(cell.path(folder).read_text()) for phase in plan for cell in phase]
    about = records.facts("cpu") | {"timm": timm.__version__, "model": MODEL, "epochs": EPOCHS}
    about["threads"] = 1
    return {"about": about, "cells": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="of MACs")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"), help="for the cells")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where all are gathered")
    args = parser.parse_args()
    plan = phases(range(1, args.seeds + 1), args.budgets)
    claim(args.folder)
    run(plan, args.folder, args.jobs)
    atomic_write(args.results, json.dumps(gather(plan, args.folder), indent=1) + "\n")


if __name__ == "__main__":
    main()
