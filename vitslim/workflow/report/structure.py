"""The figures of what a plan keeps: widths of heads and MLPs, and tokens on the image grid."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .plots import BLUE, FAINT, INK, MUTED, ORANGE, STYLE, new_figure

# In inches: height of a layer, and room above, below and left of the layers.
ROW, TOP, BOTTOM, LEFT = 0.3, 0.4, 0.55, 0.55  # inches


def _axes_in_inches(figure: Figure, left: float, width: float, layers: int) -> Axes:
    """Places axes with one row of fixed height per layer, so that figures side by side line up."""
    full_width, full_height = figure.get_size_inches()
    height = layers * ROW
    return figure.add_axes(
        (left / full_width, BOTTOM / full_height, width / full_width, height / full_height)
    )


def _layer_axis(axes: Axes, layers: int) -> None:
    axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axes.set_ylim(layers - 0.5, -0.5)
    axes.set_ylabel("layer (1 = next to the image)" if layers > 5 else "layer")
    axes.tick_params(length=0)


@matplotlib.rc_context(STYLE)
def head_widths(kept: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> Figure:
    """Heat map of the dimensions that each head of each layer keeps.

    Args:
        kept: Dimensions kept, per layer and head.
        dense: Dimensions of the dense model, likewise.
    """
    layers, heads = len(kept), max(map(len, kept))
    width = max(heads * 0.5, 2.6)
    figure = new_figure(LEFT + width + 1.15, TOP + BOTTOM + layers * ROW)
    axes = _axes_in_inches(figure, LEFT, width, layers)
    grid = np.full((layers, heads), np.nan)
    for layer, row in enumerate(kept):
        grid[layer, : len(row)] = row
    widest = max(max(row) for row in dense)
    axes.imshow(grid, cmap="cividis", vmin=0, vmax=widest, aspect="auto")
    for layer, row in enumerate(kept):
        for head, dims in enumerate(row):
            colour = "white" if dims < 0.55 * widest else INK
            axes.text(head, layer, str(dims), ha="center", va="center", color=colour)
        share = sum(row) / sum(dense[layer])
        axes.text(
            heads - 0.38,
            layer,
            f"{sum(row)}  ({100 * share:.0f} %)",
            va="center",
            color=MUTED,
            fontsize=8,
        )
    axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.set_xticks(range(heads), [str(head + 1) for head in range(heads)])
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("head")
    axes.set_title(f"Attention: dimensions kept of {widest} per head")
    axes.text(heads - 0.38, layers - 0.1, "layer total", color=MUTED, fontsize=8, va="top")
    for spine in axes.spines.values():
        spine.set_visible(False)
    _layer_axis(axes, layers)
    return figure


@matplotlib.rc_context(STYLE)
def mlp_widths(kept: Sequence[int], dense: Sequence[int]) -> Figure:
    """Bars of the MLP units that each layer keeps, inside the outline of the dense width."""
    layers, widest = len(kept), max(dense)
    figure = new_figure(LEFT + 3.3 + 0.95, TOP + BOTTOM + layers * ROW)
    axes = _axes_in_inches(figure, LEFT, 3.3, layers)
    rows = range(layers)
    axes.barh(rows, dense, height=0.72, color=FAINT, label="dense model")
    axes.barh(rows, kept, height=0.72, color=BLUE, label="kept")
    for layer in rows:
        text = f"{kept[layer]}  ({100 * kept[layer] / dense[layer]:.0f} %)"
        axes.text(widest * 1.025, layer, text, va="center", color=MUTED, fontsize=8)
    axes.set_xlim(0, widest)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("hidden units (grey: dense model)")
    axes.set_title(f"MLP: hidden units kept of {widest} per layer")
    axes.spines["left"].set_visible(False)
    _layer_axis(axes, layers)
    return figure


@matplotlib.rc_context(STYLE)
def kept_tokens(kept: Sequence[Sequence[int]], grid: tuple[int, int]) -> Figure:
    """Small pictures of the image grid, one per layer: what it still sees, loses here, lost before.

    Args:
        kept: Indices of the kept patches per layer, row by row.
        grid: Patches per column and per row of the image.
    """
    columns = min(6, len(kept))
    rows = math.ceil(len(kept) / columns)
    side = 1.4
    width, height = columns * (side + 0.17) + 0.1, rows * (side * grid[0] / grid[1] + 0.5) + 0.75
    figure = new_figure(max(width, 5.2), height)
    subplots = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.1 / max(width, 5.2),
        right=width / max(width, 5.2) - 0.1 / max(width, 5.2),
        top=1 - 0.62 / height,
        bottom=0.38 / height,
        wspace=0.1,
        hspace=0.34,
    )
    colours = ListedColormap([FAINT, ORANGE, BLUE])
    before = np.ones(grid[0] * grid[1], dtype=bool)
    for layer, axes in enumerate(subplots.flat):
        axes.set_axis_off()
        if layer >= len(kept):
            continue
        now = np.zeros_like(before)
        now[list(kept[layer])] = True
        state = np.where(now, 2, np.where(before, 1, 0)).reshape(grid)
        axes.pcolormesh(state, cmap=colours, vmin=0, vmax=2, edgecolors="white", linewidth=0.6)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_title(
            f"layer {layer + 1}: {now.sum()} of {now.size}",
            fontsize=8.5,
            fontweight="normal",
            pad=4,
        )
        before = now
    figure.text(
        0.1 / max(width, 5.2),
        1 - 0.24 / height,
        "Tokens kept on the image grid",
        fontsize=10,
        fontweight="bold",
    )
    swatches = [Patch(color=c) for c in (BLUE, ORANGE, FAINT)]
    figure.legend(
        swatches,
        ["kept", "dropped in this layer", "dropped before"],
        loc="lower left",
        ncols=3,
        bbox_to_anchor=(0, 0),
    )
    return figure
