"""The study as a picture: the difference of every setting to its reference, seed by seed."""

from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes

from vitslim.workflow.report.plots import BLUE, MUTED, STYLE, VERMILION, new_figure, png

from .spread import BETTER, SAME, WORSE, Difference

COLOURS = {BETTER: BLUE, WORSE: VERMILION, SAME: MUTED}


@matplotlib.rc_context(STYLE)
def draw(panels: Mapping[str, Mapping[str, Mapping[str, Difference]]]) -> bytes:
    """Draws a row of panels for each table and a column for each budget.

    Args:
        panels: {title of the table: {budget: {label: difference}}}.
    """
    heights = [max(len(rows) for rows in budgets.values()) + 2 for budgets in panels.values()]
    columns = max(len(budgets) for budgets in panels.values())
    figure = new_figure(9.6, 0.23 * sum(heights) + 0.5)
    grid = figure.subplots(len(panels), columns, squeeze=False, sharex="row", height_ratios=heights)
    for line, (title, budgets) in zip(grid, panels.items(), strict=True):
        for axes, (budget, rows) in zip(line, budgets.items(), strict=True):
            _panel(axes, rows, labels=axes is line[0])
            axes.set_title(f"{title}, {budget} of the MACs")
    for axes in grid[-1]:
        axes.set_xlabel("difference in held-out cross-entropy (left is better)")
    figure.tight_layout()
    return png(figure)


def _panel(axes: Axes, rows: Mapping[str, Difference], labels: bool) -> None:
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for place, difference in enumerate(rows.values()):
        colour = COLOURS[difference.verdict]
        axes.plot(difference.pairs, [place] * len(difference.pairs), "|", color=colour, alpha=0.5)
        axes.errorbar(
            difference.mean,
            place,
            xerr=difference.half,
            fmt="o",
            color=colour,
            markersize=4.5,
            linewidth=1.4,
        )
    axes.set_yticks(range(len(rows)), list(rows) if labels else [""] * len(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
