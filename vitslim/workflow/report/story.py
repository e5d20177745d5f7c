"""What the numbers of a run say, in words and in table cells that need no explanation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .ongoing import Progress

DASH = "\N{EN DASH}"


def count(number: float) -> str:
    """Formats a count with three significant digits: `4.61 G`, `22.1 M`, `950`."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(number) >= 0.9995 * size:
            return three_digits(number / size) + unit
    return str(round(number))


def three_digits(number: float) -> str:
    """Formats a positive number with three significant digits and no exponent."""
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2 if number >= 0.9995 else 3
    return f"{number:.{digits}f}"


def times(ratio: float) -> str:
    """Formats a ratio: `1.64x`."""
    return f"{ratio:.2f}x"


def percent(number: float | None) -> str:
    """Formats a percentage with two decimals, as accuracies are printed in the field."""
    return DASH if number is None else f"{number:.2f} %"


def listed(names: Sequence[str], most: int = 30) -> str:
    """Lists names, and says how many more there are: `cat, dog and 8 more`."""
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def class_table(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Makes the table of classes: name, and the accuracy of each model.

    The class that the smallest model has lost most of comes first.
    """
    columns = list((summary.get("by_class") or {}).values())
    rows = list(zip(summary.get("classes") or (), *columns, strict=False)) if columns else []
    rows.sort(key=lambda row: (row[-1] or 0.0) - (row[1] or 0.0))
    return [(name, [percent(value) for value in values]) for name, *values in rows]


@dataclass(frozen=True)
class Row:
    """One line of the cost table, every cell as text."""

    name: str
    note: str
    accuracy: str
    cut_accuracy: str
    params: str
    macs: str
    macs_ratio: str
    latency: Sequence[tuple[str, str, str]]


STAGE_NAMES = {
    "dense": "Dense model",
    "search": "Search",
    "retrain": "Retraining",
    "compress": "Retraining without a search",
    "finetune": "Fine-tuning",
}
WHAT = {
    "run": "run",
    "compress": "compression",
    "search": "search",
    "retrain": "retraining",
    "dense": "training",
    "finetune": "fine-tuning",
}
NO_SLIM = {
    "run": "There is no finished slim model in this run folder yet",
    "compress": "There is no finished slim model in this folder yet",
    "search": "This folder holds a search: it learns what can be removed, and removes nothing yet",
    "retrain": "There is no finished slim model in this folder yet",
    "dense": "This folder holds the training of a dense model",
    "finetune": "This folder holds the fine-tuning of a model",
}


def opening(kind: str, summary: Mapping[str, Any]) -> str:
    """Says what a folder without a finished slim model holds."""
    text = f"{NO_SLIM[kind]}. Below is what can be shown so far."
    if kind == "search" and (accuracy := accuracy_of(summary.get("masked"))) is not None:
        text = f"{NO_SLIM[kind]}. With its masks on, the model reaches {percent(accuracy)}."
    if (accuracy := accuracy_of(summary.get("after"))) is not None:
        before = percent(accuracy_of(summary.get("before")))
        text = f"{NO_SLIM[kind]}. It reaches {percent(accuracy)}, and began at {before}."
    return text


def stage_title(name: str) -> str:
    """Writes the name of a stage for readers: `retrain/macs=60%` is `Retraining, macs=60%`."""
    stage, _, budget = name.partition("/")
    return STAGE_NAMES.get(stage, stage) + (f", {budget}" if budget else "")


def steps(progress: Sequence[Progress]) -> list[tuple[str, str, str]]:
    """Makes the table of stages: name, epochs done, and what that means."""
    now = _now(progress)
    return [
        (
            stage_title(step.name),
            epochs(step),
            _state(step, now),
        )
        for step in progress
    ]


def standing(progress: Sequence[Progress], read_at: float) -> str | None:
    """Says in a sentence what is going on and how far it is, or None if all stages are done."""
    step = _now(progress)
    if step is None:
        return None
    text = f"{stage_title(step.name)}: {epochs(step)} epochs done"
    if step.written is None and not step.epochs:
        return f"{text}; no checkpoint has been written yet."
    if step.of and step.seconds:
        text += f", about {duration((step.of - step.epochs) * step.seconds)} to go at this speed"
    if step.written is None:
        return f"{text}."
    age = max(0.0, read_at - step.written)
    text += f"; the last checkpoint was written {duration(age)} before this page."
    if step.seconds and age > 60 + 3 * step.seconds:
        text += " That is longer than it takes, so it has probably stopped: go on with --resume."
    return text


def _state(step: Progress, now: Progress | None) -> str:
    if step.finished:
        return "finished"
    begun = step.epochs > 0 or step.written is not None
    return "not begun" if step is not now else "going on" if begun else "next"


def _now(progress: Sequence[Progress]) -> Progress | None:
    """Returns the stage that is going on: the first that is not done, for they run in turn."""
    return next((step for step in progress if not step.finished), None)


def epochs(step: Progress) -> str:
    """Formats how far a stage is: `7.4 of 50`."""
    if step.finished and not step.epochs:
        return DASH
    done = f"{step.epochs:.1f}".removesuffix(".0")
    return done if step.of is None else f"{done} of {step.of}"


def duration(seconds: float) -> str:
    """Formats a time roughly: `40 seconds`, `3 minutes`, `2.5 hours`, `4 days`."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            digits = 1 if unit != "minutes" and seconds < 10 * size else 0
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} seconds"


def latency_sizes(summary: Mapping[str, Any]) -> list[str]:
    """Lists the measured batch sizes, smallest first."""
    models = [summary.get("dense"), summary.get("masked"), *slims(summary)]
    sizes = {size for model in models if model for size in model.get("latency_ms") or {}}
    return sorted(sizes, key=int)


def accuracy_of(entry: Mapping[str, Any] | None) -> float | None:
    """Reads the accuracy of an entry of summary.json, if it is there."""
    return (entry or {}).get("accuracy")


def slims(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Lists all slim models, those of one budget one after another: searched, then compressed."""
    searched, compressed = summary.get("slim") or [], summary.get("compressed") or []
    ordered = []
    for slim in searched:
        ordered += [slim, *(each for each in compressed if each["budget"] == slim["budget"])]
    return ordered


def is_compressed(slim: Mapping[str, Any]) -> bool:
    """Returns whether a slim model was cut without a search."""
    return slim.get("method") == "compressed"


def final_accuracy(slim: Mapping[str, Any]) -> float | None:
    """Returns the accuracy of a slim model as it is saved; None before it is retrained."""
    last = "retrained" if slim.get("retrained") or not is_compressed(slim) else "cut"
    return accuracy_of(slim.get(last))


def table(summary: Mapping[str, Any]) -> list[Row]:
    """Makes the cost table: dense, searched, and a line for every slim model."""
    dense = summary.get("dense") or {}
    entries: list[tuple[str, str, Mapping[str, Any], float | None, float | None]] = []
    if dense:
        entries.append(("dense", "the model before slimming", dense, accuracy_of(dense), None))
    if masked := summary.get("masked"):
        entries.append(
            ("searched", "masks still on, nothing removed", masked, accuracy_of(masked), None)
        )
    for slim in slims(summary):
        note = "really removed"
        if is_compressed(slim):
            note = "compressed, no search" if slim.get("retrained") else "compressed, not trained"
        elif summary.get("compressed"):
            note = "searched, really removed"
        cut = accuracy_of(slim.get("cut"))
        entries.append((f"slim {slim['budget']}", note, slim, final_accuracy(slim), cut))
    return [_row(summary, dense, *entry) for entry in entries]


def _row(
    summary: Mapping[str, Any],
    dense: Mapping[str, Any],
    name: str,
    note: str,
    model: Mapping[str, Any],
    accuracy: float | None,
    cut: float | None,
) -> Row:
    cells = []
    for size in latency_sizes(summary):
        milliseconds = (model.get("latency_ms") or {}).get(size)
        gain = speed_up(dense, model, size)
        ratio = macs_ratio(dense, model)
        # For a model of the same MACs there is no saving to realise.
        realised = gain / ratio if gain and ratio and ratio > 1.005 else None
        cells.append(
            (
                DASH if milliseconds is None else three_digits(milliseconds),
                DASH if gain is None else times(gain),
                DASH if realised is None else f"{100 * realised:.0f} %",
            )
        )
    ratio = macs_ratio(dense, model)
    return Row(
        name=name,
        note=note,
        accuracy=percent(accuracy),
        cut_accuracy=percent(cut),
        params=count(model["params"]) if model.get("params") else DASH,
        macs=count(model["macs"]) if model.get("macs") else DASH,
        macs_ratio=DASH if ratio is None else times(ratio),
        latency=cells,
    )


def macs_ratio(dense: Mapping[str, Any], model: Mapping[str, Any]) -> float | None:
    """How many times fewer MACs a model does than the dense one."""
    if dense.get("macs") and model.get("macs"):
        return float(dense["macs"]) / float(model["macs"])
    return None


def speed_up(dense: Mapping[str, Any], model: Mapping[str, Any], size: str) -> float | None:
    """How many times faster than the dense model a model was measured to be."""
    before = (dense.get("latency_ms") or {}).get(size)
    after = (model.get("latency_ms") or {}).get(size)
    return float(before) / float(after) if before and after else None


def outcome(summary: Mapping[str, Any]) -> list[str]:
    """Says in a sentence or three for each slim model what was won and what it cost."""
    dense, both = summary.get("dense") or {}, bool(summary.get("compressed"))
    told = [_outcome_of(dense, slim, latency_sizes(summary), both) for slim in slims(summary)]
    if told and summary.get("labelled") is False:
        told.append(
            "The images have no labels, so that accuracy was not measured: evaluate the slim "
            "model on labelled ones with `vitslim eval`."
        )
    return told


def _outcome_of(
    dense: Mapping[str, Any], slim: Mapping[str, Any], sizes: Sequence[str], both: bool
) -> str:
    way = ""
    if is_compressed(slim):
        way = ", cut without a search," if slim.get("retrained") else ", cut without training,"
    elif both:
        way = ", cut after a search,"
    text = f"With the budget {slim['budget']} the slim model{way} "
    ratio = macs_ratio(dense, slim)
    parts = []
    if ratio is not None:
        parts.append(
            f"does {times(ratio)} fewer multiply-accumulates "
            f"({count(dense['macs'])} → {count(slim['macs'])})"
        )
    if dense.get("params") and slim.get("params"):
        parts.append(
            f"has {times(dense['params'] / slim['params'])} fewer parameters "
            f"({count(dense['params'])} → {count(slim['params'])})"
        )
    gains = {size: speed_up(dense, slim, size) for size in sizes}
    faster = [f"{times(g)} faster at batch {s}" for s, g in gains.items() if g and g >= 1.02]
    if faster:
        parts.append("runs " + " and ".join(faster))
    after = final_accuracy(slim)
    if after is not None or not is_compressed(slim):
        parts.append(_accuracy_change(accuracy_of(dense), after))
    text += _list_of(parts) + "."
    for size, gain in gains.items():
        if gain is not None and gain < 1.02:
            how = "about as fast as" if gain >= 0.98 else f"{times(1 / gain)} slower than"
            text += (
                f" It is not faster at batch {size}: it was measured {how} the dense model, "
                "although it does less arithmetic."
            )
        elif gain and ratio and gain < 0.8 * ratio:
            text += (
                f" At batch {size} the speed-up is {100 * gain / ratio:.0f} % of what the saved "
                "arithmetic alone would give."
            )
    return text


def _accuracy_change(before: float | None, after: float | None) -> str:
    if after is None:
        return "has not been retrained yet"
    if before is None:
        return f"reaches {percent(after)} top-1 accuracy"
    numbers = f"({percent(before)} → {percent(after)})"
    if abs(before - after) < 0.005:
        return f"keeps the accuracy {numbers}"
    verb = "loses" if after < before else "gains"
    return f"{verb} {abs(before - after):.2f} points of accuracy {numbers}"


def _list_of(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
