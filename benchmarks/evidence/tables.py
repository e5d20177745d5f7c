"""A study as tables in Markdown, and its plots.

    python -m benchmarks.evidence.tables runs/evidence/evidence-NAME.json [--into FOLDER]

Writes evidence-NAME.json, .md, .png and -time.png into the folder, which is the benchmarks' own
for results.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import records
from vitslim.files import atomic_write

from . import plots
from .results import Line, Range, Results

GROUPS = ("ours", "rival", "search")
WAYS = {"cut": "as it is after the cut", "refitted": "refitted"}


def sections(results: Results) -> Iterator[str]:
    """Yields the paragraphs and tables of a study."""
    about = results.about
    yield f"# Cut without training: {about['data']}"
    yield _made_of(results)
    yield "## Right after the cut, nothing refitted: accuracy in percent"
    yield _over_budgets(results, results.lines("cut", GROUPS))
    yield "## Refitted on the same images, no training"
    yield _over_budgets(results, results.lines("refitted", GROUPS))
    parts = results.lines("refitted", ("ablation",))
    if parts:
        yield "## Ours with one thing changed, refitted"
        yield _over_budgets(results, [*results.lines("refitted", ("ours",)), *parts])
    for budget in results.retrained_budgets():
        yield f"## Retrained at {budget}% of the MACs: accuracy in percent, minutes"
        yield _retrained(results, budget)


def _made_of(results: Results) -> str:
    about, dense = results.about, results.dense
    looked = about["calibration_images"]
    return (
        f"{about['classes']} classes, {about['train_images']} training images, "
        f"{about['held_out_images']} held out ({about['held_out']}); {looked} training images are "
        f"looked at by all methods. Dense: **{dense['accuracy']:.1f}%**, "
        f"{about['macs'] / 1e9:.2f} G MACs, {about['params'] / 1e6:.1f} M parameters. Mean over "
        "seeds, least and most in brackets. Rivals but Torch-Pruning and the search choose units "
        "by `vitslim.importance`, but give every layer one fraction and every head one width. A "
        "minute is wall time of all that a method does, after the dense model was trained; "
        f"machine {about['machine']}, {about['threads']} threads, torch {about['torch']}, commit "
        f"{about['commit']}, {about['date']}."
    )


def _over_budgets(results: Results, lines: Sequence[Line]) -> str:
    budgets = results.budgets()
    rows = []
    for line in lines:
        minutes = [r for b in budgets if (r := results.minutes(line, b)) is not None]
        longest = f"{max(each.mean for each in minutes):.1f}"
        cells = [_text(results.accuracy(line, budget)) for budget in budgets]
        rows.append([line.label, *cells, longest])
    return _table(["MACs", *(f"{each}%" for each in budgets), "minutes at most"], rows)


def _retrained(results: Results, budget: int) -> str:
    lengths = results.epochs()
    rows = []
    for way in WAYS:
        for line in results.lines(way, GROUPS, epochs=True):
            row, rates = [line.label, WAYS[way]], set[float]()
            for each in lengths:
                found, spent = (f(line, budget, each) for f in (results.accuracy, results.minutes))
                row.append("-" if found is None else f"{found.text()}, {spent.mean:.1f} min")
                rates |= {c["lr"] for c in results.cells(line, budget, each) if "lr" in c}
            rows.append([*row, ", ".join(f"{rate:g}" for rate in sorted(rates))])
    heads = ["no epoch" if not each else f"{each} epoch{'s'[: each - 1]}" for each in lengths]
    return _table(["method", "start", *heads, "rate"], rows)


def _text(found: Range | None) -> str:
    return "-" if found is None else found.text()


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON that a study has gathered")
    parser.add_argument("--into", type=Path, default=records.FOLDER, help="where all is written")
    args = parser.parse_args()
    for path in args.results:
        whole = json.loads(path.read_text())
        results = Results(whole)
        into = args.into / path.stem
        atomic_write(into.with_suffix(".json"), json.dumps(whole, indent=1) + "\n")
        atomic_write(into.with_suffix(".md"), "\n\n".join(sections(results)) + "\n")
        atomic_write(into.with_suffix(".png"), plots.over_macs(results))
        for budget in results.retrained_budgets()[:1]:
            picture = plots.over_minutes(results, budget)
            atomic_write(into.with_name(f"{path.stem}-time.png"), picture)
        print(into.with_suffix(".md"))


if __name__ == "__main__":
    main()
