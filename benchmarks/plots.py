"""Draws how the packed encoder's time grows with the batch and with the tokens.

python benchmarks/plots.py [benchmarks/results/<machine>.json]     # PNGs beside it
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import records
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

from vitslim.workflow.report.plots import BLUE, GREEN, MUTED, STYLE, VERMILION, new_figure, png

NAME = re.compile(r"vit_encoder (batch size|tokens) (\w+) (\d+)")
LOOKS = {
    "timm dense": (VERMILION, "s"),
    "packed dense": (GREEN, "D"),
    "packed slim": (BLUE, "o"),
}

Entry = Mapping[str, Any]


def series(entries: Mapping[str, Entry], what: str) -> tuple[str, list[Entry]]:
    """Returns the model's name and its entries over "batch size" or "tokens", in order."""
    found, model = {}, ""
    for name, entry in entries.items():
        match = NAME.fullmatch(name)
        if match and match[1] == what:
            model, found[int(match[3])] = f"DeiT-{match[2]}", entry
    return model, [found[key] for key in sorted(found)]


@matplotlib.rc_context(STYLE)
def over_batch_size(model: str, entries: list[Entry]) -> Figure:
    """Time of an image and images per second, over the batch."""
    figure = new_figure(7.2, 3.3)
    left, right = figure.subplots(1, 2)
    sizes = [entry["batch"] for entry in entries]
    for name, (colour, marker) in LOOKS.items():
        ms = [entry["us"][name] / 1e3 / entry["batch"] for entry in entries]
        style = {"color": colour, "marker": marker, "label": name, "markersize": 4.5}
        left.plot(sizes, ms, **style)
        right.plot(sizes, [1e3 / each for each in ms], **style)
    left.set_title("Time of an image (flat: linear)")
    left.set_ylabel("ms an image")
    right.set_title("Throughput")
    right.set_ylabel("images a second")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("images in the batch")
        _powers(axes, sizes)
    return _finished(figure, left, model, entries)


@matplotlib.rc_context(STYLE)
def over_tokens(model: str, entries: list[Entry]) -> Figure:
    """Time over the tokens beside what the MACs predict, and the rate of MACs."""
    figure = new_figure(7.2, 3.3)
    left, right = figure.subplots(1, 2)
    tokens = [entry["tokens"] for entry in entries]
    # The prediction goes through the entry nearest to the model's own size of image.
    own = min(entries, key=lambda entry: abs(entry["tokens"] - 197))
    for name, (colour, marker) in LOOKS.items():
        ms = [entry["us"][name] / 1e3 for entry in entries]
        macs = [entry["macs_of"][name] for entry in entries]
        style = {"color": colour, "marker": marker, "markersize": 4.5}
        left.plot(tokens, ms, label=name, **style)
        predicted = [own["us"][name] / 1e3 / own["macs_of"][name] * each for each in macs]
        left.plot(tokens, predicted, color=MUTED, linestyle=":", linewidth=1.2, zorder=3)
        rates = [count / 1e6 / each for count, each in zip(macs, ms, strict=True)]
        right.plot(tokens, rates, **style)
    left.plot(
        [],
        [],
        color=MUTED,
        linestyle=":",
        linewidth=1.2,
        label=f"predicted by MACs from {own['tokens']}",
    )
    left.set_title("Time of an image")
    left.set_ylabel("ms")
    right.set_title("Rate (flat: time is as MACs predict)")
    right.set_ylabel("10⁹ MACs a second")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of an image")
        axes.set_xlim(left=0)
        axes.grid()
    return _finished(figure, left, model, entries)


def _powers(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid()


def _finished(figure: Figure, axes: Axes, model: str, entries: list[Entry]) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels))
    threads = entries[0]["threads"]
    figure.suptitle(
        f"{model}, float32, {threads} thread{'s' if threads > 1 else ''}, {entries[0]['machine']}",
        fontsize=8.5,
        color=MUTED,
        x=0.01,
        ha="left",
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def main(path: Path) -> None:
    entries = json.loads(path.read_text())
    for what, draw in (("batch size", over_batch_size), ("tokens", over_tokens)):
        model, some = series(entries, what)
        if not some:
            print(f"{path.name} has no entry of vit_encoder over the {what}; make bench-cpu")
            continue
        target = path.with_name(f"{path.stem}-vit_encoder-{what.replace(' ', '-')}.png")
        target.write_bytes(png(draw(model, some)))
        print(f"written: {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else records.FOLDER / f"{records.machine_name()}.json")
