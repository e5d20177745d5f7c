"""The table that a run ends with, as text: what every model costs and what it gets right."""

from collections.abc import Mapping
from typing import Any

from . import story


def text_table(summary: Mapping[str, Any]) -> str:
    """Lays out the models of summary.json, those of one budget below each other."""
    sizes = story.latency_sizes(summary)
    rows = [
        ["model", "MACs", "parameters", "right after the cut", "accuracy"]
        + [f"batch {size}, ms" for size in sizes]
    ]
    for row in story.table(summary):
        numbers = [row.macs, row.params, row.cut_accuracy, row.accuracy]
        rows.append([row.name, *numbers, *(cell[0] for cell in row.latency)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
