"""What a run or a stage holds so far: numbers, masks, plans, and a list of what is missing."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ...errors import VitslimError
from ...masks import Masks
from ...plan import Plan
from ...planning.threshold import budget_name, parse_budget
from ..options.recipes import nested
from ..options.settings import of_stage, settings_for
from ..runtime.journal import budget_text, read_table
from .ongoing import Progress, masks_so_far, progress, stage_facts

_PARTS = ("summary.json", "summary.csv", "args.yaml", "search", "plans")
_ROOMS = ("summary.json", "dense", "search", "retrain", "slim")

Table = dict[str, list[dict[str, float]]]


@dataclass
class Record:
    """The content of a run folder, or of the folder of a lone stage.

    Attributes:
        folder: The folder.
        kind: `run`, `compress`, or the stage it holds: `dense`, `search`, `retrain` or `finetune`.
        summary: summary.json of a run, empty before it ends; of a stage, as much of that as it has.
        args: What the user chose (args.yaml).
        stages: Rows of summary.csv per stage; a cell that is no number is left out.
        forecasts: Rows of forecast.csv per budget.
        dense_accuracy: Of the dense model in percent, if it was measured.
        masks: What the search learned, so far or at its end.
        scores: What units were scored without a search.
        masks_at: Which update the masks are from, if the search goes on.
        plans: Plans by the budget that asked for them, in the order of the summary.
        compressed: The same of what a run cut without a search.
        progress: How far every stage is, in the order in which they run.
        read_at: When this was read, in seconds since 1970.
        missing: What is not there yet, one phrase each.
    """

    folder: Path
    kind: str = "run"
    summary: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    stages: Table = field(default_factory=dict)
    forecasts: Table = field(default_factory=dict)
    dense_accuracy: float | None = None
    masks: Masks | None = None
    scores: Masks | None = None
    masks_at: str | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    compressed: dict[str, Plan] = field(default_factory=dict)
    progress: list[Progress] = field(default_factory=list)
    read_at: float = field(default_factory=time.time)
    missing: list[str] = field(default_factory=list)


def read_record(folder: Path) -> Record:
    """Reads a run folder or the folder of a lone stage, finished or not.

    Raises:
        VitslimError: It is neither, or a file in it is broken.
    """
    record = Record(folder, _kind(folder), args=_read_args(folder))
    stages = _read_numbers(folder / "summary.csv", "stage")
    search = folder / "search" if record.kind == "run" else folder
    record.forecasts = _read_numbers(folder / "forecast.csv", "budget")
    record.forecasts = record.forecasts or _read_numbers(search / "forecast.csv", "budget")
    if record.kind in ("run", "compress"):
        record.summary = _read_summary(folder)
        record.dense_accuracy = _dense_accuracy(record, stages)
        steps = list(_steps(record, stages))
    else:
        record.summary = _summary_of_stage(record)
        steps = [progress(record.kind, folder, stages.get(record.kind, []))]
    if (search / "masks.safetensors").exists():
        record.masks = Masks.load(search / "masks.safetensors")
    elif (found := masks_so_far(search)) is not None:
        record.masks, record.masks_at = found
    for path in (folder / "scores.safetensors", folder / "compress/scores.safetensors"):
        if path.exists():
            record.scores = Masks.load(path)
    record.plans, names = _read_plans(record)
    record.compressed = {f"{n}, without a search": p for n, p in _compressed_plans(record).items()}
    names |= {f"compress/{name}": f"compress/{text}" for name, text in _budgets(record).items()}
    record.stages = {names.get(stage, stage): rows for stage, rows in stages.items()}
    record.progress = [replace(each, name=names.get(each.name, each.name)) for each in steps]
    record.missing = list(_missing(record))
    return record


def _kind(folder: Path) -> str:
    """Tells a run folder from that of a lone stage, or raises VitslimError."""
    advice = "give the folder that `vitslim run`, `search` or `retrain` wrote with --output"
    if not folder.is_dir():
        raise VitslimError(f"there is no folder {folder}; {advice}")
    if any((folder / part).exists() for part in _ROOMS):
        return _whole_job(folder)
    stages = {row["stage"] for row in read_table(folder / "summary.csv") if row.get("stage")}
    if stages == {"finetune"}:
        return "finetune"
    args = stage_facts(folder).get("args")
    if (folder / "masks.safetensors").exists() or (args and "kinds" in args):
        return "search"
    if args:
        return "retrain" if "plan" in args else "dense"
    if stages in ({"search"}, {"retrain"}):
        return stages.pop()
    if not any((folder / part).exists() for part in _PARTS):
        raise VitslimError(f"{folder} has none of {', '.join(_PARTS)}; {advice}")
    return _whole_job(folder)


def _whole_job(folder: Path) -> str:
    """Tells a compression from a run, which may compress too but has a search of its own."""
    asked = _read_args(folder)
    return "compress" if "refit" in asked and "search" not in asked else "run"


def _read_args(folder: Path) -> dict[str, Any]:
    """Reads args.yaml, which only tells how many epochs to expect: {} where it tells nothing."""
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return args if isinstance(args, dict) else {}


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text())
        for slim in [*summary.get("slim", []), *summary.get("compressed", [])]:
            slim["budget"], slim["plan"] = budget_text(slim["budget"]), str(slim.get("plan", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VitslimError(
            f"{path} is not the summary of a run ({error!r}); delete it and resume the run"
        ) from None
    return dict(summary)


def _summary_of_stage(record: Record) -> dict[str, Any]:
    """Puts together what the result of a lone stage says, in the form of summary.json."""
    facts = stage_facts(record.folder)
    args = facts.get("args") or {}
    summary = {name: args[name] for name in ("model", "data") if args.get(name)}
    if record.kind == "search" and "accuracy" in facts and "update" not in facts:
        summary["masked"] = {"accuracy": facts["accuracy"]}
    if record.kind == "finetune" and "after" in facts:
        summary |= {name: facts[name] for name in ("before", "after")}
        summary["classes"] = _class_names(record)
    if record.kind == "retrain" and "retrained" in facts:
        entry = {name: facts.get(name) for name in ("cut", "retrained", "params", "macs")}
        plan = _plan_of_model(record)
        budget = record.folder.resolve().name if plan is None else budget_text(plan.budget)
        summary["slim"] = [{**entry, "budget": budget, "plan": "", "folder": str(record.folder)}]
    return summary


def _class_names(record: Record) -> list[str]:
    """Returns the names of the classes inside the saved model of a lone stage, if it has any."""
    try:
        return list(json.loads((record.folder / "config.json").read_text())["label_names"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _plan_of_model(record: Record) -> Plan | None:
    """Returns the plan inside the saved slim model of a lone retraining, if it is there."""
    try:
        config = json.loads((record.folder / "config.json").read_text())
        return Plan.from_dict(config["model_args"]["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dense_accuracy(record: Record, stages: Table) -> float | None:
    """Returns the accuracy of the dense model from the summary, its result or its last epoch."""
    dense = record.summary.get("dense") or stage_facts(record.folder / "dense")
    rows = stages.get("dense", [])
    accuracy = dense.get("accuracy", rows[-1].get("accuracy") if rows else None)
    return float(accuracy) if isinstance(accuracy, int | float) else None


def _steps(record: Record, stages: Table) -> Iterator[Progress]:
    """Yields how far every stage of a run is."""
    summary = record.summary
    slims = {
        str(slim.get("name", Path(slim["plan"]).stem)): slim for slim in summary.get("slim", [])
    }
    finished = {"dense": bool(summary.get("dense")), "search": bool(summary.get("masked"))}
    finished |= {f"retrain/{name}": bool(slim.get("retrained")) for name, slim in slims.items()}
    finished |= {f"compress/{name}": bool(summary.get("compressed")) for name in slims}
    folders = (path.name for path in sorted((record.folder / "retrain").glob("*")))
    names = dict.fromkeys([*_budgets(record), *slims, *folders])
    order = ["dense", "search", *(f"retrain/{name}" for name in names)]
    if record.kind == "compress":
        order = ["dense", *(order[2:] if retrains(record) else ())]
    elif record.args.get("compress"):
        order += [f"compress/{name}" for name in names]
    for stage in order:
        kind, _, name = stage.partition("/")
        folder = record.folder / stage
        if kind == "compress":
            kind, folder = "retrain", record.folder / "compress/retrain" / name
        gently = stage.startswith("compress/")
        expected, rows = _epochs(record.args, kind, gently), stages.get(stage, [])
        yield progress(stage, folder, rows, expected, finished.get(stage, False))


def retrains(record: Record) -> bool:
    """Returns whether slim models are retrained, which a compression does only if asked."""
    return record.kind != "compress" or bool((record.args.get("retrain") or {}).get("epochs"))


def _budgets(record: Record) -> dict[str, str]:
    """Returns the budgets that the run was asked for, as text, by the names of their folders."""
    asked = record.args.get("budget", [])
    found = {}
    for text in asked if isinstance(asked, list) else [asked]:
        try:
            found[budget_name(parse_budget(str(text)))] = str(text)
        except VitslimError:
            continue
    return found


def _epochs(args: dict[str, Any], stage: str, gently: bool = False) -> int | None:
    """Returns how many epochs a stage of a run was told to train, or None if that is unknown."""
    if not args:
        return None
    try:
        settings = settings_for(stage, of_stage(nested(args), stage))
        return (settings.gentler() if gently else settings).epochs
    except VitslimError:
        return None


def _read_plans(record: Record) -> tuple[dict[str, Plan], dict[str, str]]:
    """Returns the plans by budget, and their retraining stages under the name of the budget."""
    if record.kind == "retrain":
        plan = _plan_of_model(record)
        return ({} if plan is None else {budget_text(plan.budget): plan}), {}
    order = [Path(slim["plan"]).name for slim in record.summary.get("slim", [])]
    # Before the run ends, the order in which the budgets were asked for.
    order = order or [f"{name}.json" for name in _budgets(record)]
    files = sorted((record.folder / "plans").glob("*.json"))
    files.sort(key=lambda file: order.index(file.name) if file.name in order else len(order))
    plans: dict[str, Plan] = {}
    names = {f"retrain/{name}": f"retrain/{text}" for name, text in _budgets(record).items()}
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


def _compressed_plans(record: Record) -> dict[str, Plan]:
    """Returns the plans of a run's second way by budget, in the order of the first."""
    found: dict[str, Plan] = {}
    for name, text in _budgets(record).items():
        path = record.folder / "compress/plans" / f"{name}.json"
        if path.exists():
            try:
                found[text] = Plan.load(path)
            except ValueError as error:
                raise VitslimError(f"{error}; delete it and resume the run") from None
    return found


def _missing(record: Record) -> Iterator[str]:
    """Names what is not there yet."""
    searching, room = record.kind in ("run", "search"), "search/" if record.kind == "run" else ""
    if record.kind in ("run", "compress") and not record.summary:
        yield "accuracy, cost and latency (summary.json, written as the run ends)"
    if record.kind == "retrain" and not record.summary.get("slim"):
        yield "the retrained accuracy and what is kept (result.json, written as the training ends)"
    if not record.stages and retrains(record):
        where = (
            ""
            if record.kind == "run"
            else "; those of a stage inside a run are in the folder of the run"
        )
        yield f"training curves (summary.csv has no finished epoch{where})"
    if searching and record.masks is None:
        yield f"the masks and their histograms ({room}masks.safetensors)"
    elif searching and record.masks_at is not None:
        yield (
            f"the masks as the search ends with them ({room}masks.safetensors); "
            f"those shown are of {record.masks_at}"
        )
    if record.kind == "run" and not record.plans:
        yield "what is kept (plans/*.json, made after the search)"
    if record.kind == "compress" and not record.plans:
        yield "what is kept (plans/*.json)"
    for slim in record.summary.get("slim", []):
        if retrains(record) and not slim.get("retrained"):
            yield f"the retrained accuracy for {slim['budget']}"


def _read_numbers(path: Path, key: str) -> Table:
    """Reads the numbers of a CSV file per value of a column; a row without an epoch was cut off."""
    table: Table = {}
    for line in read_table(path):
        cells = {name: _number(cell) for name, cell in line.items() if name and name != key}
        row = {name: value for name, value in cells.items() if value is not None}
        if line.get(key) and "epoch" in row:
            table.setdefault(line[key], []).append(row)
    return table


def _number(cell: str | None) -> float | None:
    try:
        return float(cell or "")
    except ValueError:
        return None
