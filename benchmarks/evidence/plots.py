"""A study as pictures: accuracy against what is kept, and against the time that was spent."""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vitslim.workflow.report.plots import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PINK,
    SKY,
    STYLE,
    VERMILION,
    new_figure,
    png,
)

from .methods import METHODS
from .results import Line, Range, Results

GROUPS = ("ours", "rival", "search")
COLOURS = {
    "ours": BLUE,
    "torch-pruning": VERMILION,
    "taylor": ORANGE,
    "magnitude": GREEN,
    "activation": SKY,
    "random": MUTED,
    "search": PINK,
    "scratch": INK,
}
MARKERS = {0: "D", 1: "o", 2: "^", 3: "s"}


@matplotlib.rc_context(STYLE)
def over_macs(results: Results) -> bytes:
    """Draws accuracy over the MACs that are kept: as cut, and refitted; ours refitted in both."""
    figure = new_figure(9.2, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    ours = results.lines("refitted", ("ours",))
    rivals = results.lines("cut", ("rival", "search"))
    _curves(left, results, [*rivals, *results.lines("cut", ("ours",))], "--")
    _curves(left, results, ours, "-")
    _curves(right, results, [*results.lines("refitted", ("rival", "search")), *ours], "-")
    left.set_title("Right after the cut; ours refitted")
    right.set_title("All refitted on the same images")
    left.set_ylabel("accuracy on held-out images, %")
    for axes in (left, right):
        _dense(axes, results)
        axes.set_xlabel("MACs kept, %")
        axes.set_xticks(results.budgets())
        axes.invert_xaxis()
        axes.set_ylim(0, 100)
        axes.grid(axis="y")
    names = [*dict.fromkeys(line.method for line in [*ours, *rivals])]
    handles = [_handle(name) for name in names]
    handles.append(Line2D([], [], color=BLUE, linestyle="--", label="ours, not refitted"))
    handles.append(Line2D([], [], color=INK, linestyle=":", label="dense"))
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=5)
    return png(figure)


@matplotlib.rc_context(STYLE)
def over_minutes(results: Results, budget: int) -> bytes:
    """Draws accuracy over the minutes that a method took in all, at one budget."""
    figure = new_figure(9.2, 4.6)
    axes = figure.subplots()
    names: list[str] = []
    for way, style in (("cut", "--"), ("refitted", "-")):
        retrained = results.lines(way, GROUPS, epochs=True)
        for line in dict.fromkeys([*results.lines(way, GROUPS), *retrained]):
            names.append(line.method)
            _path(axes, results, line, budget, style)
    _dense(axes, results)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 100)
    axes.set_xlabel("minutes of wall time after the dense model, search and retraining included")
    axes.set_ylabel("accuracy on held-out images, %")
    axes.set_title(f"{budget}% of the MACs: what the time buys")
    axes.grid()
    handles = [_handle(name) for name in METHODS if name in names]
    handles += [
        Line2D([], [], color=MUTED, linestyle="-", label="refitted"),
        Line2D([], [], color=MUTED, linestyle="--", label="as cut"),
        Line2D([], [], color=INK, linestyle=":", label="dense"),
    ]
    for epochs in results.epochs():
        what = f"{epochs} epoch{'s'[: epochs - 1]} more" if epochs else "no training"
        marker = MARKERS.get(epochs, "v")
        handles.append(Line2D([], [], color=MUTED, marker=marker, linestyle="", label=what))
    figure.tight_layout(rect=(0, 0, 0.78, 1))
    figure.legend(handles=handles, loc="center right")
    return png(figure)


def _curves(axes: Axes, results: Results, lines: list[Line], style: str) -> None:
    for line in lines:
        points = [(b, r) for b in results.budgets() if (r := results.accuracy(line, b))]
        wide = 2.4 if line.method == "ours" else 1.3
        budgets, means = [b for b, _ in points], [r.mean for _, r in points]
        colour = COLOURS[line.method]
        axes.errorbar(
            budgets,
            means,
            yerr=_whiskers([r for _, r in points]),
            color=colour,
            linestyle=style,
            linewidth=wide,
            elinewidth=0.9,
            marker="o",
            markersize=3.5,
        )


def _path(axes: Axes, results: Results, line: Line, budget: int, style: str) -> None:
    """Draws one method from the cut to its longest retraining."""
    found = [
        (spent, reached, epochs)
        for epochs in results.epochs()
        if (reached := results.accuracy(line, budget, epochs))
        and (spent := results.minutes(line, budget, epochs))
    ]
    if not found:
        return
    # Magnitude takes no time at all, which has no place on a logarithmic axis.
    minutes = [max(spent.mean, 0.05) for spent, _, _ in found]
    means = [reached.mean for _, reached, _ in found]
    colour = COLOURS[line.method]
    wide = 2.4 if line.method == "ours" else 1.3
    axes.errorbar(
        minutes,
        means,
        yerr=_whiskers([reached for _, reached, _ in found]),
        color=colour,
        linestyle=style,
        linewidth=wide,
        elinewidth=0.9,
    )
    for x, y, (_, _, epochs) in zip(minutes, means, found, strict=True):
        axes.plot(x, y, MARKERS.get(epochs, "v"), color=colour, markersize=5.5)


def _whiskers(found: list[Range]) -> list[list[float]]:
    """Returns how far least and most over seeds are from the mean."""
    return [[r.mean - r.least for r in found], [r.most - r.mean for r in found]]


def _dense(axes: Axes, results: Results) -> None:
    axes.axhline(results.dense["accuracy"], color=INK, linestyle=":", linewidth=1.1)


def _handle(method: str) -> Line2D:
    wide = 2.4 if method == "ours" else 1.3
    return Line2D([], [], color=COLOURS[method], linewidth=wide, label=METHODS[method].label)
