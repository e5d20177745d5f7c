"""The pictures of a report, each with a caption for readers who have not read the paper."""

import base64
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...plan import Plan
from . import kept, plots, story, structure
from .record import Record

_SHOWN_DPI = 96


@dataclass(frozen=True)
class Picture:
    """One figure of the page: a PNG, what it shows, and the words below it."""

    file: str
    content: bytes
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The picture as a data URI, so that the page needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.content).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the page; the PNG itself is finer."""
        width, height = struct.unpack(">II", self.content[16:24])
        return width * _SHOWN_DPI // plots.DPI, height * _SHOWN_DPI // plots.DPI


@dataclass(frozen=True)
class Section:
    """What one budget keeps: a sentence, and pictures shown side by side or below each other."""

    name: str
    text: str
    widths: list[Picture]
    tokens: list[Picture]


def accuracy(summary: Mapping[str, Any]) -> list[Picture]:
    """Draws accuracy against MACs and against every measured latency."""
    models = [summary.get("dense"), summary.get("masked"), *story.slims(summary)]
    macs = [model["macs"] for model in models if model and model.get("macs")]
    unit, letter = (1e6, "M") if macs and max(macs) < 0.5e9 else (1e9, "G")
    panels = {"macs": f"MACs ({letter} multiply-accumulates for one image)"} if macs else {}
    for size in story.latency_sizes(summary):
        images = "1 image" if size == "1" else f"{size} images"
        panels[size] = f"Latency, {images} at a time (ms)"
    points: list[plots.Point] = []

    def add(kind: str, model: Mapping[str, Any] | None, percent: float | None) -> None:
        if model and percent is not None:
            cost = {"macs": model["macs"] / unit if model.get("macs") else None}
            cost |= model.get("latency_ms") or {}
            points.append(plots.Point(kind, model.get("budget", kind), percent, cost))

    for kind, name in (("dense", "dense"), ("searched", "masked")):
        add(kind, summary.get(name), story.accuracy_of(summary.get(name)))
    for slim in story.slims(summary):
        for stage in ("cut", "retrained"):
            kind = f"compressed, {stage}" if story.is_compressed(slim) else stage
            add(kind, slim, story.accuracy_of(slim.get(stage)))
    if not points or not panels:
        return []
    caption = "Further left is cheaper, further up is better."
    if any(slim.get("retrained") for slim in story.slims(summary)):
        caption += (
            " A slim model stands twice at the same cost: right after the cut, and after "
            "retraining."
        )
    if summary.get("masked"):
        caption += " The searched model still carries its masks, so nothing is saved yet."
    caption += (
        " A number beside a triangle at the lower edge is the accuracy of a model that lies below "
        "the axis."
    )
    content = plots.png(plots.accuracy_against_cost(points, panels))
    alt = "Scatter plots of top-1 accuracy against MACs and measured latency"
    return [Picture("accuracy.png", content, alt, caption)]


def section(record: Record, name: str, plan: Plan) -> Section:
    """Draws what one plan keeps."""
    sizes = kept.dense_sizes(record.masks or record.scores, plan)
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    widths, tokens = [], []
    if heads := kept.head_widths(plan, sizes):
        caption = (
            "Each row is a layer, each cell a head, the number is how many of its "
            f"{max(map(max, heads[1]))} dimensions were kept. Bright is wide, dark is narrow; "
            "a head with 0 is gone altogether."
        )
        content = plots.png(structure.head_widths(*heads))
        alt = f"Heat map of the dimensions kept per layer and head for {name}"
        widths.append(Picture(f"heads-{slug}.png", content, alt, caption))
    if units := kept.mlp_widths(plan, sizes):
        caption = (
            "Each bar is the MLP of a layer: the blue part was kept, the grey part was removed."
        )
        content = plots.png(structure.mlp_widths(*units))
        alt = f"Bars of the MLP hidden units kept per layer for {name}"
        widths.append(Picture(f"mlp-{slug}.png", content, alt, caption))
    if patches := kept.kept_tokens(plan, sizes):
        # Of an oblong image, an older summary tells the height alone.
        model = plan.base.get("args", {})
        img_size = model.get("img_size") or record.summary.get("img_size")
        grid = kept.grid_of(sizes.patches or 0, img_size, model.get("patch_size"))
        caption = (
            f"Each square is the image, cut into {grid[0]} x {grid[1]} patches, as one layer sees "
            "it; it is the same for every image. A dropped patch stays away from all later "
            "layers. The class token is not a patch and is never dropped."
        )
        content = plots.png(structure.kept_tokens(patches, grid))
        alt = f"Grids of the image patches kept per layer for {name}"
        tokens.append(Picture(f"tokens-{slug}.png", content, alt, caption))
    return Section(name, kept.sentence(plan, sizes), widths, tokens)


def masks(record: Record) -> list[Picture]:
    """Draws histograms of what the search learned, with the threshold of every plan."""
    values = kept.scores(record.masks) if record.masks else {}
    if record.masks is None or not values:
        return []
    lines: dict[str, dict[str, float]] = {name: {} for name in record.plans}
    moved = []
    for name, plan in record.plans.items():
        for kind, flags in kept.keeps(plan, record.masks).items():
            if found := kept.threshold(values[kind], flags):
                lines[name][kind], blurred = found
                if blurred:
                    moved.append(f"{name}: {blurred} of {len(flags)} {kind} masks")
    when = "ended the search at" if record.masks_at is None else f"were after {record.masks_at} at"
    caption = (
        f"How many masks {when} which value: near 1 means needed as in the dense model, near 0 "
        "means not needed."
    )
    if record.plans:
        caption += " A vertical line is the threshold of a budget; what lies to its left is cut."
    if "token" in values:
        caption += (
            " A patch counts with its smallest gate up to the layer, since a dropped patch does "
            "not come back."
        )
    if moved:
        caption += (
            " The lines are blurred: rounding widths and keeping every layer alive let some masks "
            f"left of a line stay and cut as many right of it ({'; '.join(moved)})."
        )
    content = plots.png(plots.mask_histograms(values, lines))
    alt = "Histograms of the mask values with the threshold of each budget"
    return [Picture("masks.png", content, alt, caption)]


def curves(record: Record) -> list[Picture]:
    """Draws loss and accuracy of every stage."""
    if not record.stages:
        return []
    caption = (
        "Above the training loss, below the accuracy on held-out images, after each epoch. The "
        "sparsity penalty is the weighted sum of all masks that presses them towards zero during "
        "the search."
    )
    content = plots.png(plots.training_curves(record.stages))
    return [Picture("curves.png", content, "Loss and accuracy by epoch and stage", caption)]


def forecast(record: Record) -> list[Picture]:
    """Draws what cutting at once would have given after every epoch of the search."""
    some = [row for rows in record.forecasts.values() for row in rows if "accuracy" in row]
    if not some:
        return []
    caption = (
        "What cutting the model to a budget after an epoch of the search would have given on the "
        "held-out images, before any retraining"
    )
    caption += "." if record.dense_accuracy is None else "; dashed, the model before slimming."
    absent = [name for name, rows in record.forecasts.items() if "accuracy" not in rows[-1]]
    if absent:
        caption += f" Out of reach as the masks stand last: {', '.join(absent)}."
    content = plots.png(plots.forecast_curves(record.forecasts, record.dense_accuracy))
    alt = "Accuracy of the model cut to each budget by epoch of the search"
    return [Picture("forecast.png", content, alt, caption)]
