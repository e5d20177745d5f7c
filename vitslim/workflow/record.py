"""What a run folder holds so far: numbers, masks, plans, and a list of what is missing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import VitslimError
from ..masks import Masks
from ..plan import Plan
from .journal import read_summary

_PARTS = ("summary.json", "summary.csv", "args.yaml", "search", "plans")


@dataclass
class Record:
    """The content of a run folder.

    Attributes:
        folder: The run folder.
        summary: summary.json, empty before the run ends.
        stages: Rows of summary.csv per stage; a cell that is no number is left out.
        masks: What the search learned.
        plans: Plans by the budget that asked for them, in the order of the summary.
        missing: What is not there yet, one phrase each.
    """

    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    masks: Masks | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def budget_text(budget: Mapping[str, Any] | str) -> str:
    """Writes a budget the way it is typed: `macs=60%`."""
    if isinstance(budget, str):
        return budget
    return ",".join(f"{name}={value}" for name, value in budget.items())


def read_record(folder: Path) -> Record:
    """Reads a run folder, finished or not.

    Raises:
        VitslimError: It is not a run folder, or a file in it is broken.
    """
    advice = "give the folder that `vitslim run --output` wrote"
    if not folder.is_dir():
        raise VitslimError(f"there is no folder {folder}; {advice}")
    if not any((folder / part).exists() for part in _PARTS):
        raise VitslimError(f"{folder} has none of {', '.join(_PARTS)}; {advice}")
    record = Record(folder, _read_summary(folder), _read_stages(folder / "summary.csv"))
    if not record.summary:
        record.missing.append("accuracy, cost and latency (summary.json, written as the run ends)")
    if not record.stages:
        record.missing.append("training curves (summary.csv has no finished epoch)")
    if (path := folder / "search" / "masks.safetensors").exists():
        record.masks = Masks.load(path)
    else:
        record.missing.append("the masks and their histograms (search/masks.safetensors)")
    record.plans, names = _read_plans(folder, record.summary)
    record.stages = {names.get(stage, stage): rows for stage, rows in record.stages.items()}
    if not record.plans:
        record.missing.append("what is kept (plans/*.json, made after the search)")
    for slim in record.summary.get("slim", []):
        if not slim.get("retrained"):
            record.missing.append(f"the retrained accuracy for {budget_text(slim['budget'])}")
    return record


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text())
        for slim in summary.get("slim", []):
            slim["budget"], slim["plan"] = budget_text(slim["budget"]), str(slim.get("plan", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VitslimError(
            f"{path} is not the summary of a run ({error!r}); delete it and resume the run"
        ) from None
    return dict(summary)


def _read_plans(folder: Path, summary: Mapping[str, Any]) -> tuple[dict[str, Plan], dict[str, str]]:
    """Returns the plans by budget, and their retraining stages under the name of the budget."""
    order = [Path(slim["plan"]).name for slim in summary.get("slim", [])]
    files = sorted((folder / "plans").glob("*.json"))
    files.sort(key=lambda file: order.index(file.name) if file.name in order else len(order))
    plans: dict[str, Plan] = {}
    names: dict[str, str] = {}
    for file in files:
        try:
            plan = Plan.load(file)
        except ValueError as error:
            raise VitslimError(f"{error}; delete it and run `vitslim threshold` again") from None
        text = budget_text(plan.budget)
        text = text if text not in plans else f"{text} ({file.stem})"
        plans[text] = plan
        names[f"retrain/{file.stem}"] = f"retrain/{text}"
    return plans, names


def _read_stages(path: Path) -> dict[str, list[dict[str, float]]]:
    stages: dict[str, list[dict[str, float]]] = {}
    for line in read_summary(path):
        cells = {name: _number(cell) for name, cell in line.items() if name != "stage"}
        row = {name: value for name, value in cells.items() if value is not None}
        if "epoch" in row:
            stages.setdefault(line["stage"], []).append(row)
    return stages


def _number(cell: str | None) -> float | None:
    try:
        return float(cell or "")
    except ValueError:
        return None
