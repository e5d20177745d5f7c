"""Runs every cell of the evidence that is not there yet, the most telling first.

    python -m benchmarks.evidence.study --data folder:PHOTOS --dense FOLDER --output DIR

Every cell is a JSON in DIR/cells, so a study that was stopped goes on by the same command; stopped
while it trains, it goes on from a checkpoint. After every cell the results so far are gathered in
DIR/evidence-NAME.json, which `python -m benchmarks.evidence.tables` makes tables and plots of.
"""

import argparse
import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import timm

from benchmarks import records
from vitslim import VitslimError, cost
from vitslim.files import atomic_write
from vitslim.workflow.runtime.interrupt import Stopped

from .cells import Cell, Worker, in_order
from .dense import dense_model
from .methods import METHODS, Bench
from .photos import Photos, Shown
from .recipe import RECIPE

BUDGETS = (80, 70, 60, 50, 40, 30, 20)


def run(
    plan: Sequence[Cell],
    make: Callable[[Cell], dict[str, Any]],
    output: Path,
    about: dict[str, Any],
    minutes: float | None = None,
) -> dict[str, Any]:
    """Makes the cells that are missing and returns all that are there.

    Args:
        plan: The cells in order.
        make: Does the work of one.
        output: Folder of the study.
        about: Goes into the results: data, machine, what was asked for.
        minutes: No cell is begun after so many.
    """
    began = time.monotonic()
    results = gather(output, about)
    for count, cell in enumerate(plan, 1):
        path = output / "cells" / f"{cell.name}.json"
        if path.exists():
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            print(f"stopped after {minutes:g} minutes, before cell {count} of {len(plan)}")
            break
        start = time.monotonic()
        # The library tells of every epoch and batch; errors are raised all the same.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = make(cell)
        atomic_write(path, json.dumps({**found, **_versions()}, indent=1) + "\n")
        wall, accuracy = time.monotonic() - start, found["accuracy"]
        print(f"{count}/{len(plan)} {cell.name}: {accuracy:.2f}%, {wall:.0f} s", flush=True)
        results = gather(output, about)
    return results


def gather(output: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Returns all cells that are in the folder, asked for this time or not, and writes them."""
    found = [json.loads(path.read_text()) for path in sorted((output / "cells").glob("*.json"))]
    whole = {"about": about, "cells": found}
    atomic_write(results_file(output, about["data"]), json.dumps(whole, indent=1) + "\n")
    return whole


def results_file(output: Path, data: str) -> Path:
    """Returns where the cells of a study are gathered."""
    return output / f"evidence-{data}.json"


def claim(output: Path, recipe: dict[str, Any]) -> None:
    """Refuses a folder whose cells were made of other images or by another recipe."""
    path, text = output / "recipe.json", json.dumps({**recipe, "settings": RECIPE}) + "\n"
    if path.exists() and path.read_text() != text:
        raise VitslimError(f"{output} holds a study of another recipe: give another --output.")
    atomic_write(path, text)


def _versions() -> dict[str, Any]:
    return {"by": records.facts("cpu") | {"timm": timm.__version__}}


def parser() -> argparse.ArgumentParser:
    """Returns the options of a study."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--data", required=True, help="folder:PATH with PATH/train, PATH/val and perhaps PATH/test")
    add("--output", type=Path, default=Path("runs/evidence"), help="for the cells")
    add("--dense", type=Path, help="folder of the dense model; else --model is fine-tuned")
    add("--model", default="vit_small_patch14_dinov2", help="of timm")
    add("--pretrained", action="store_true", help="with timm's weights")
    add("--image-size", type=int, help="pixels, if not the model's own")
    add("--dense-epochs", type=int, default=6, help="of fine-tuning")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--budgets", type=int, nargs="+", default=list(BUDGETS), help="percent of MACs")
    add("--other-budgets", type=int, nargs="+", help="of rivals and ablations; default: the same")
    add("--retrain-budgets", type=int, nargs="*", default=[50], help="those that are retrained")
    add("--epochs", type=int, nargs="*", default=[1, 3], help="of retraining, each by itself")
    add("--retrain-lr", type=float, help="one rate for all; default: 2e-5 refitted, 5e-5 cut")
    add("--calibration", type=int, default=256, help="training images that methods look at")
    add("--train-limit", type=int, help="images of a class that train")
    add("--val-limit", type=int, help="images of a class of each split that are held out")
    add("--batch-size", type=int, default=32, help="of training")
    add("--only", nargs="+", choices=list(METHODS), help="these methods and the dense model")
    add("--minutes", type=float, help="begin no cell after so many")
    return found


def main(given: Sequence[str] | None = None) -> None:
    args = parser().parse_args(given)
    kind, _, path = args.data.partition(":")
    if kind != "folder" or not path:
        raise SystemExit("--data is folder:PATH")
    try:
        _study(args, Path(path))
    except Stopped:
        raise SystemExit("stopped, and saved: the same command goes on") from None


def _study(args: argparse.Namespace, data: Path) -> None:
    output = args.output
    photos = Photos(data, output / "photos", args.train_limit, args.val_limit)
    asked = {
        **photos.facts,
        "calibration_images": args.calibration,
        "batch_size": args.batch_size,
        "retrain_lr": args.retrain_lr,
    }
    claim(output, asked)
    dense = dense_model(
        args.dense,
        args.model,
        args.pretrained,
        args.image_size,
        args.dense_epochs,
        photos.links,
        output / "dense",
        args.batch_size,
    )
    params, macs = cost(dense)
    about = {**asked, "params": params, "macs": macs, **_versions()["by"]}
    bench = Bench(
        dense, Shown(photos, dense), args.calibration, args.batch_size, photos.links, output
    )
    others = args.other_budgets or args.budgets
    plan = in_order(args.seeds, args.budgets, others, args.retrain_budgets, args.epochs, args.only)
    run(plan, Worker(bench, args.retrain_lr).make, output, about, args.minutes)


if __name__ == "__main__":
    main()
