"""The study as tables in Markdown, with a sentence on each that follows from the figures by rule.

    python -m benchmarks.ablation.tables [benchmarks/results/ablation-digits.json]

The rule: a setting is better or worse than its reference where the 95% interval of the paired
difference in held-out cross-entropy leaves zero out. Accuracy is shown, but 360 images are too few
to judge by it.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cells import VARIANTS
from .plot import draw
from .spread import BETTER, SAME, WORSE, Cell, Difference, Spread, column, paired
from .study import RESULTS

REFERENCE = "paper"
QUESTIONS = {
    "a": "the penalty as a proximal step, against a subgradient",
    "b": "masks discarded at the cut, against folded into the weights",
    "c": "penalties spread per unit or per MAC, against per kind",
    "d": "the penalty growing over the first third of the search, against full from the start",
    "e": "token gates as a log-bias on the keys, against scaling the input",
    "f": "one global ranking by score per MAC, against equal fractions of each kind",
    "g": "the best units of every layer in equal number, against one ranking over all layers",
    "h": "any units in the number that the search gives a head or an MLP, against its best",
    "i": "heads rotated before the search, against as they come",
    "j": "what is kept refitted to the dense model after the cut, against cut alone",
}
WAYS = {
    "at once": "cut at once, retrained longer",
    "after": "trained longer, then cut",
    "same": "epochs of search and retraining",
    "all": "those and the dense model's",
}


@dataclass(frozen=True)
class Row:
    """One setting at one budget, over all seeds.

    Attributes:
        label: How it is called.
        question: The letter of the ablation, or the rival; empty where neither.
        cells: One for each seed.
        against: Its difference to the reference, None where it is one.
        way: How a rival was trained, a key of `WAYS`.
    """

    label: str
    question: str
    cells: Sequence[Cell]
    against: Difference | None
    way: str = ""

    def spread(self, moment: str, what: str) -> Spread:
        return Spread.of(column(self.cells, moment, what).values())


def ablation(cells: Sequence[Cell], budget: str) -> list[Row]:
    """Returns a row of every variant at a budget."""
    there = _by_name(cells, "ablation", budget)
    return [
        Row(name, variant.question, there[name, ""], _against(there[name, ""], there, variant))
        for name, variant in VARIANTS.items()
        if (name, "") in there
    ]


def baselines(cells: Sequence[Cell], budget: str) -> list[Row]:
    """Returns a row of every rival, in both ways of training it, each against the paper."""
    paper = _by_name(cells, "ablation", budget)[REFERENCE, ""]
    reference = _losses(paper)
    rivals = _by_name(cells, "baselines", budget)
    rows = [Row("ViT-Slim", "", paper, None)]
    for (name, way), found in rivals.items():
        label = f"{name}, {WAYS[way]}"
        rows.append(Row(label, name, found, paired(_losses(found), reference), way))
    uncut = _by_name(cells, "baselines", None)["uncut", ""]
    rows.append(Row("not cut", "", uncut, paired(_losses(uncut), reference)))
    return rows


def best_ways(rows: Sequence[Row]) -> list[Row]:
    """Returns of every rival the way that ends with the smaller mean loss."""
    best: dict[str, Row] = {}
    for row in rows:
        other = best.get(row.question)
        if row.question and (other is None or _mean(row) < _mean(other)):
            best[row.question] = row
    return list(best.values())


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the lines of a table with a row per setting."""
    yield "| | accuracy after the cut, % | retrained, % | cross-entropy | difference | |"
    yield "|---" * 6 + "|"
    for row in rows:
        letter = f"({row.question}) " if row.question in QUESTIONS else ""
        figures = [
            row.spread("cut", "accuracy").text(1),
            row.spread("retrained", "accuracy").text(1),
            row.spread("retrained", "cross_entropy").text(3),
            row.against.text() if row.against else "",
            row.against.verdict if row.against else "reference",
        ]
        yield f"| {letter}{row.label} | {' | '.join(figures)} |"
    yield ""


def widths(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the lines of a table of what each layer keeps, attention / hidden, mean over seeds."""
    depth = len(rows[0].cells[0]["hidden"])
    yield f"| | {' | '.join(f'layer {layer + 1}' for layer in range(depth))} |"
    yield "|---" * (depth + 1) + "|"
    for row in rows:
        kept = [
            " / ".join(
                f"{statistics.fmean(cell[kind][layer] for cell in row.cells):.0f}"
                for kind in ("attention", "hidden")
            )
            for layer in range(depth)
        ]
        yield f"| {row.label} | {' | '.join(kept)} |"
    yield ""


def searches(cells: Sequence[Cell]) -> Iterator[str]:
    """Yields the lines of a table of the searches themselves."""
    yield "| search | accuracy, % | cross-entropy | masks at exactly zero, % |"
    yield "|---" * 4 + "|"
    names = dict.fromkeys(cell["name"] for cell in cells if "masked" in cell)
    for name in names:
        found = [cell for cell in cells if cell["name"] == name and "masked" in cell]
        accuracy, loss = (
            Spread.of(column(found, "masked", what).values())
            for what in ("accuracy", "cross_entropy")
        )
        zero = Spread.of(100 * cell["zero"] for cell in found)
        yield f"| {name} | {accuracy.text(1)} | {loss.text(3)} | {zero.text(1)} |"
    yield ""


def sentences(rows: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yields a line for every setting: at which budget it is better, worse or neither.

    Args:
        rows: Of every budget.
    """
    for label, variant in VARIANTS.items():
        if not variant.question:
            continue
        found = {
            budget: row.against
            for budget, each in rows.items()
            for row in each
            if row.label == label
        }
        said = "; ".join(
            f"{each.verdict} at {budget}" + ("" if each.verdict == SAME else f" ({each.text()})")
            for budget, each in found.items()
            if each is not None
        )
        yield f"- **{label}** ({variant.question}: {QUESTIONS[variant.question]}): {said}."
    yield ""


def standing(where: str, rivals: Sequence[Row]) -> str:
    """Returns the line that says against whom ViT-Slim wins, and against whom not."""
    names: dict[str, list[str]] = {WORSE: [], SAME: [], BETTER: []}
    for row in rivals:
        assert row.against is not None
        names[row.against.verdict].append(row.question)
    said = {
        "wins against": names[WORSE],
        "shows no difference to": names[SAME],
        "loses against": names[BETTER],
    }
    parts = [f"{how} {', '.join(some)}" for how, some in said.items() if some]
    return f"- At {where}: ViT-Slim {'; '.join(parts)}."


def sections(results: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of all tables."""
    cells, about = results["cells"], results["about"]
    budgets = _budgets(cells)
    seeds = len({cell["seed"] for cell in cells})
    epochs, model = about["epochs"], about["model"]
    yield "# Ablations and baselines on digits"
    yield ""
    yield (
        f"{seeds} seeds, mean ± standard deviation; differences are paired by seed, with the 95% "
        f"interval of their mean. A ViT of {model['depth']} layers, {model['num_heads']} heads and "
        f"{model['embed_dim']} channels; {epochs['dense']} epochs dense, {epochs['search']} of "
        f"search, {epochs['retrain']} of retraining; widths are not rounded. Of some "
        f"{2 * len(VARIANTS)} comparisons at 95%, one is expected to stand out by chance."
    )
    yield ""
    variants = {budget: ablation(cells, budget) for budget in budgets}
    rivals = {budget: baselines(cells, budget) for budget in budgets}
    yield "## Ablations"
    yield ""
    yield from sentences(variants)
    for budget, rows in variants.items():
        yield f"**{budget} of the MACs**"
        yield ""
        yield from table(rows)
    yield "**The searches**, before any cut"
    yield ""
    yield from searches(cells)
    yield "## Baselines"
    yield ""
    yield "Every rival has the training steps of ViT-Slim, search and retraining together."
    yield ""
    for budget, rows in rivals.items():
        own = [row for row in rows if row.way == "after"]
        yield standing(
            f"{budget}, rivals trained in the way that suits them better", best_ways(rows)
        )
        yield standing(f"{budget}, rivals on ViT-Slim's schedule, the cut at its time", own)
    yield ""
    for budget, rows in rivals.items():
        yield f"**{budget} of the MACs**"
        yield ""
        yield from table(rows)
    yield "## What the layers keep"
    yield ""
    for budget in budgets:
        yield f"**{budget} of the MACs**: attention dimensions / hidden units, mean over seeds"
        yield ""
        yield from widths([*variants[budget], *rivals[budget][1:]])


def picture(cells: Sequence[Cell]) -> bytes:
    """Draws the differences of both tables."""
    budgets = _budgets(cells)
    rows = {
        "Ablations": {budget: ablation(cells, budget) for budget in budgets},
        "Baselines": {budget: baselines(cells, budget) for budget in budgets},
    }
    return draw(
        {
            title: {
                budget: {row.label: row.against for row in some if row.against}
                for budget, some in each.items()
            }
            for title, each in rows.items()
        }
    )


def main(path: Path) -> None:
    results = json.loads(path.read_text())
    text = "\n".join(sections(results)).rstrip() + "\n"
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".png").write_bytes(picture(results["cells"]))
    print(text, end="")


def _budgets(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell["budget"] for cell in cells if cell.get("budget")))


def _mean(row: Row) -> float:
    return row.spread("retrained", "cross_entropy").mean


def _by_name(
    cells: Sequence[Cell], table: str, budget: str | None
) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell["table"] == table and cell.get("budget") == budget:
            found.setdefault((cell["name"], cell.get("way", "")), []).append(cell)
    return found


def _against(found: Sequence[Cell], there: Mapping[Any, Sequence[Cell]], variant: Any) -> Any:
    if not variant.question:
        return None
    return paired(_losses(found), _losses(there[variant.reference, ""]))


def _losses(cells: Sequence[Cell]) -> dict[int, float]:
    return column(cells, "retrained", "cross_entropy")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else RESULTS)
