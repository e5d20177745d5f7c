"""The figures of what a run measured: plain numbers in, matplotlib figures out.

Colours stay apart for colour-blind readers: cividis for amounts, the Okabe-Ito palette for kinds.
One inch is shown as 96 pixels.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, FAINT = "#1f2328", "#5b6470", "#e4e7eb"
BLUE, ORANGE, GREEN, VERMILION, PINK, SKY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
)
SERIES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
DPI = 192


@dataclass(frozen=True)
class Point:
    """One model in a figure of accuracy against cost; `x` has one value per panel."""

    kind: str
    name: str
    accuracy: float
    x: Mapping[str, float | None]


MARKERS = {
    "dense": ("s", INK, "dense model"),
    "searched": ("D", PINK, "searched: same size, soft masks"),
    "cut": ("v", ORANGE, "slim, right after the cut"),
    "retrained": ("o", BLUE, "slim, retrained"),
    "compressed, cut": ("^", GREEN, "compressed without training"),
    "compressed, retrained": ("P", SKY, "compressed, retrained"),
}
CURVES = ("retrained", "compressed, cut", "compressed, retrained")


def png(figure: Figure) -> bytes:
    """Renders a figure at twice the resolution at which the page shows it."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


@matplotlib.rc_context(STYLE)
def mask_histograms(
    scores: Mapping[str, np.ndarray], thresholds: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Histograms of the mask values, a panel per kind, with the threshold of every budget.

    Args:
        scores: Mask values per kind: `attention`, `mlp`, `token`.
        thresholds: `{budget: {kind: value}}`.
    """
    titles = {
        "attention": ("Attention masks", "head dimensions"),
        "mlp": ("MLP masks", "hidden units"),
        "token": ("Token gates", "patches in all layers"),
    }
    figure = new_figure(3.4 * len(scores), 3.3 + 0.18 * len(thresholds))
    subplots = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (kind, values) in zip(subplots, scores.items(), strict=True):
        # A short search leaves all masks near 1; an axis from 0 would squeeze them into one bar.
        least, most = float(values.min()), float(values.max())
        zoomed = least > 0.4 * most
        margin = 0.05 * (most - least) + 1e-4
        limits = (least - margin, most + margin) if zoomed else (0.0, max(1.0, most))
        counts, edges = np.histogram(values, bins=40, range=limits)
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="#9db7cf")
        # A search that pushes most masks to one place hides the others on a linear scale.
        crowded = counts.max() > 25 * np.median(counts[counts > 0])
        if crowded:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.01)
        for colour, (budget, values_by_kind) in zip(
            _cycle(len(thresholds)), thresholds.items(), strict=True
        ):
            if kind in values_by_kind:
                value = values_by_kind[kind]
                axes.axvline(
                    value, color=colour, linewidth=1.8, label=f"{budget}: cut below {value:.3g}"
                )
        title, unit = titles[kind]
        axes.set_title(title)
        axes.set_xlabel("size of the mask value" + (", axis not from 0" if zoomed else ", no unit"))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel(f"number of {unit}" + ("\n(log scale)" if crowded else ""))
        axes.grid(axis="y")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2))
    figure.tight_layout()
    return figure


def _cycle(number: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(number)]


@matplotlib.rc_context(STYLE)
def accuracy_against_cost(points: Sequence[Point], panels: Mapping[str, str]) -> Figure:
    """Scatter of accuracy against each cost.

    Args:
        points: The models.
        panels: `{key of Point.x: label of the axis}`.
    """
    figure = new_figure(max(3.4 * len(panels), 5.2), 3.7)
    subplots = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    shown = [p.accuracy for p in points if p.kind != "cut"] or [p.accuracy for p in points]
    room = max(1.0, 0.25 * (max(shown) - min(shown)))
    low, high = min(shown) - 2 * room, min(max(shown) + room, 100.5)
    lowest = min(p.accuracy for p in points)
    if lowest > low - 6 * room:
        low = min(low, lowest - room)
    for axes, (key, label) in zip(subplots, panels.items(), strict=True):
        _cost_panel(axes, [p for p in points if p.x.get(key) is not None], key, low)
        axes.set_xlabel(label)
        axes.set_title(label.split(" (")[0])
        axes.set_xlim(left=0)
        axes.set_xlim(right=axes.get_xlim()[1] * 1.06)
        axes.grid()
    subplots[0].set_ylim(low, high)
    subplots[0].set_ylabel("top-1 accuracy (%)")
    handles: dict[str, Any] = {}
    for axes in subplots:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    lines = -(-len(handles) // 4)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.03 + 0.05 * lines, 1, 1))
    return figure


def _cost_panel(axes: Axes, points: Sequence[Point], key: str, low: float) -> None:
    # One curve has the names of the budgets, which stand at the same cost on all of them.
    named = next((kind for kind in CURVES if any(p.kind == kind for p in points)), None)
    for kind, (marker, colour, label) in MARKERS.items():
        some = sorted((p for p in points if p.kind == kind), key=lambda p: p.x[key] or 0)
        if not some:
            continue
        axes.plot(
            [p.x[key] or 0 for p in some],
            [max(p.accuracy, low) for p in some],
            marker,
            linestyle="-" if kind in CURVES and len(some) > 1 else "none",
            linewidth=1,
            markersize=7,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=label,
            clip_on=False,
            zorder=3,
        )
        for p in some:
            at = (p.x[key] or 0, max(p.accuracy, low))
            note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "color": MUTED}
            if kind.endswith("cut") and p.accuracy < low:
                # Too far down for the axis: the marker sits on its edge and says the number.
                axes.annotate(f"{p.accuracy:.0f} %", at, xytext=(0, 6), ha="center", **note)
            if kind == named and len(some) > 1:
                # The curve rises to the right, so the free side of a point is its upper left.
                name = p.name.replace(",", ",\n")
                axes.annotate(name, at, xytext=(-5, 5), ha="right", **note)


@matplotlib.rc_context(STYLE)
def training_curves(stages: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss and accuracy by epoch, a column for each kind of stage, a line for each stage.

    Args:
        stages: Rows of `summary.csv` per stage; a name such as `retrain/60%` shares the column
            of `retrain`.
    """
    titles = {"dense": "Dense model", "search": "Search", "retrain": "Retraining"}
    titles["compress"] = "Without a search"
    columns: dict[str, dict[str, Sequence[Mapping[str, float]]]] = {}
    for name, rows in stages.items():
        column, _, line = name.partition("/")
        columns.setdefault(column, {})[line or "loss"] = rows
    figure = new_figure(max(3.4 * len(columns), 5.2), 4.8)
    subplots = figure.subplots(2, len(columns), squeeze=False, sharex="col", sharey="row")
    for (upper, lower), (column, lines) in zip(subplots.T, columns.items(), strict=True):
        for colour, (line, rows) in zip(_cycle(len(lines)), lines.items(), strict=True):
            style = {"color": colour, "marker": ".", "markersize": 4, "linewidth": 1.4}
            for axes, key in ((upper, "loss"), (lower, "accuracy")):
                some = [row for row in rows if key in row]
                axes.plot(
                    [row["epoch"] for row in some], [row[key] for row in some], label=line, **style
                )
            some = [row for row in rows if row.get("penalty")]
            if some:
                upper.plot(
                    [row["epoch"] for row in some],
                    [row["penalty"] for row in some],
                    "--",
                    color=colour,
                    linewidth=1.2,
                    label="sparsity penalty",
                )
        upper.set_title(titles.get(column, column))
        lower.set_xlabel("epoch")
        lower.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axes in (upper, lower):
            axes.grid()
        if len(upper.get_legend_handles_labels()[0]) > 1:
            upper.legend()
    subplots[0, 0].set_ylabel("training loss (no unit)")
    subplots[0, 0].set_ylim(bottom=0)
    subplots[1, 0].set_ylabel("held-out top-1 accuracy (%)")
    figure.align_ylabels()
    figure.tight_layout()
    return figure


@matplotlib.rc_context(STYLE)
def forecast_curves(
    forecasts: Mapping[str, Sequence[Mapping[str, float]]], dense: float | None
) -> Figure:
    """Accuracy of the model cut to each budget, by epoch of the search.

    Args:
        forecasts: Rows of forecast.csv per budget; a line has a gap where a row has no accuracy.
        dense: Accuracy of the dense model in percent, if known.
    """
    figure = new_figure(6.4, 3.5)
    axes = figure.subplots()
    for colour, (budget, rows) in zip(_cycle(len(forecasts)), forecasts.items(), strict=True):
        axes.plot(
            [row["epoch"] for row in rows],
            [row.get("accuracy", np.nan) for row in rows],
            color=colour,
            marker=".",
            markersize=5,
            linewidth=1.4,
            label=budget.replace(",", ",\n")
            + ("" if any("accuracy" in row for row in rows) else "\n(out of reach)"),
        )
    if dense is not None:
        axes.axhline(dense, color=INK, linestyle="--", linewidth=1.2, label="dense model")
    axes.set_title("If the search stopped here")
    axes.set_xlabel("epoch of the search")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylabel("top-1 accuracy when cut (%)")
    axes.grid()
    # Beside the lines, which may be anywhere and on top of each other.
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), labelspacing=0.8)
    figure.tight_layout()
    return figure
