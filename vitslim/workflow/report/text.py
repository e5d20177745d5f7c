"""The table that a run ends with, as text: what every model costs and what it gets right."""

from collections.abc import Mapping
from typing import Any

from ..aligned import aligned
from ..runtime.journal import budget_text
from . import story


def text_table(summary: Mapping[str, Any]) -> str:
    """Lays out the models of summary.json, those of one budget below each other."""
    both = bool(summary.get("compressed"))
    summary = dict(summary) | {
        name: [each | {"budget": budget_text(each["budget"])} for each in summary.get(name) or ()]
        for name in ("slim", "compressed")
    }
    sizes = story.latency_sizes(summary)
    rows = [
        ["model", "MACs", "parameters", "right after the cut", "accuracy"]
        + [f"batch {size}, ms" for size in sizes]
    ]
    for row in story.table(summary):
        way = row.note.partition(",")[0]
        name = f"{row.name}, {way}" if both and row.name.startswith("slim ") else row.name
        numbers = [row.macs, row.params, row.cut_accuracy, row.accuracy]
        rows.append([name, *numbers, *(cell[0] for cell in row.latency)])
    return aligned(rows)
