"""The packed encoder's results as tables, in Markdown: printed, and written beside the results.

    python benchmarks/tables.py [benchmarks/results/<machine>.json]

Where a cell has two figures, the first is of batch 1, the second of batch 8.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import records

CELL = re.compile(r"vit_encoder (slim|dense) (\w+) batch (\d+) threads (\d+)")
MISSING = "-"

Entry = Mapping[str, Any]
Column = Callable[[Entry], str]
# (model, threads) -> its cells by batch.
Rows = dict[tuple[str, int], dict[int, Entry]]


def rows_of(entries: Mapping[str, Entry], kind: str) -> Rows:
    """Returns the cells of the "slim" or the "dense" model, smallest first."""
    found: Rows = {}
    for name, entry in entries.items():
        match = CELL.fullmatch(name)
        if match and match[1] == kind:
            found.setdefault((match[2], int(match[4])), {})[int(match[3])] = entry
    return {key: found[key] for key in sorted(found, key=lambda key: ("TSB".index(key[0]), key[1]))}


def table(rows: Rows, columns: Mapping[str, Column]) -> Iterator[str]:
    """Yields the lines of a table with a row per model and number of threads."""
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for (model, threads), cells in rows.items():
        figures = [
            " / ".join(column(cells[batch]) for batch in sorted(cells))
            for column in columns.values()
        ]
        plural = "s" if threads > 1 else ""
        yield f"| DeiT-{model}, {threads} thread{plural} | {' | '.join(figures)} |"


def times(*names: str) -> Column:
    """How many times as long as "packed" the best of these takes."""

    def column(entry: Entry) -> str:
        us = entry["us"]
        there = [us[name] for name in names if name in us]
        return f"{min(there) / us['packed']:.2f}" if there else MISSING

    return column


def figure(what: str, name: str, form: Callable[[Any], str]) -> Column:
    """A figure of the entry, of the contender `name`."""

    def column(entry: Entry) -> str:
        value = entry.get(what, {}).get(name)
        return MISSING if value is None else form(value)

    return column


def runtime(name: str, forms: Sequence[str] = ("padded", "looped", "grouped")) -> Column:
    return times(name, *(f"{name}, {form}" for form in forms))


def sections(entries: Mapping[str, Entry]) -> Iterator[str]:
    """Yields the lines of all tables."""
    slim, dense = rows_of(entries, "slim"), rows_of(entries, "dense")
    ours = {
        "packed, ms": figure("us", "packed", lambda us: f"{us / 1e3:.1f}"),
        "of peak": figure("fraction_of_peak", "packed", lambda part: f"{100 * part:.0f}%"),
    }
    rivals = {"ONNX Runtime": runtime("ONNX Runtime"), "OpenVINO": runtime("OpenVINO")}
    timm = {
        "timm dense": times("timm dense"),
        "timm dense, compiled": times("timm dense, torch.compile"),
    }
    unpacked = {"slim": times("slim"), "slim, compiled": times("slim, torch.compile")}
    memory = {
        name: figure("peak_mib", name, lambda mib: f"{mib:.1f}")
        for name in ("packed", "timm dense")
    }
    if slim:
        ratio = max(cell["macs_ratio"] for cells in slim.values() for cell in cells.values())
        yield f"**Slim**, 60% of the MACs (ratio {ratio}): times as long as packed, batch 1 / 8"
        yield ""
        best = {f"{name}, best form": column for name, column in rivals.items()}
        yield from table(slim, {**ours, **timm, **unpacked, **best})
        yield ""
    if dense:
        yield "**Dense**: times as long as packed, batch 1 / 8"
        yield ""
        yield from table(dense, {**ours, **timm, **rivals})
        yield ""
    if slim:
        yield "**Forms** of the slim model in other runtimes: times as long as packed, batch 1 / 8"
        yield ""
        forms = [f"{name}, {form}" for name in rivals for form in ("padded", "looped", "grouped")]
        yield from table(slim, {form: times(form) for form in forms})
        yield ""
        yield "**bfloat16**, slim: speed-up over packed in float32, and the largest error"
        yield ""
        packed = ("packed", "packed, bfloat16 weights", "packed, bfloat16 products")
        columns: dict[str, Column] = {f"{name}, speed": _speed(name) for name in packed[1:]}
        columns |= {f"{name}, error": figure("error", name, "{:.1e}".format) for name in packed}
        yield from table(slim, columns)
        yield ""
    for kind, rows in (("slim", slim), ("dense", dense)):
        some = {
            key: cells
            for key, cells in rows.items()
            if any(cell.get("peak_mib") for cell in cells.values())
        }
        if some:
            yield f"**Memory** beyond the weights at the peak, packed {kind}, MiB, batch 1 / 8"
            yield ""
            yield from table(some, memory)
            yield ""
    yield from _aims(entries)


def _speed(name: str) -> Column:
    def column(entry: Entry) -> str:
        us = entry["us"].get(name)
        return MISSING if us is None else f"{entry['us']['packed'] / us:.2f}"

    return column


def _aims(entries: Mapping[str, Entry]) -> Iterator[str]:
    aims = [
        (name, aim)
        for name, entry in entries.items()
        if CELL.fullmatch(name)
        for aim in entry["aims"]
        if aim["met"] is not None
    ]
    yield f"**Aims**: {sum(aim['met'] for _, aim in aims)} of {len(aims)} met; missed are"
    yield ""
    for name, aim in aims:
        if not aim["met"]:
            cell = name.removeprefix("vit_encoder ")
            yield f"- {cell}: {aim['aim']}: {aim['reached']:.2f} of {aim['at_least']:.2f}"


def main(path: Path) -> None:
    entries = json.loads(path.read_text())
    text = "\n".join(sections(entries)) + "\n"
    path.with_name(f"{path.stem}-vit_encoder.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else records.FOLDER / f"{records.machine_name()}.json")
