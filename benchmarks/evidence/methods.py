"""The ways to a smaller model: each prepares once for a seed, then cuts to any budget."""

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import LayerScale
from torch import nn

from benchmarks.ablation import uniform
from vitslim import cost, importance, slim, threshold
from vitslim.oneshot import prepare
from vitslim.workflow.options.choices import MaskOptions
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.runtime.seeds import seed_everything
from vitslim.workflow.search import search

from .photos import Labelled, Shown
from .recipe import WORLD, search_settings
from .widths import even_widths

# Cuts to a percentage of MACs; `refitted` says whether what is kept makes up for what is cut.
Cut = Callable[[int, bool], nn.Module]


@dataclass
class Bench:
    """What the methods work on.

    Attributes:
        dense: The model that is cut; never changed.
        photos: As it takes them.
        calibration: How many training images are looked at.
        batch_size: Of training.
        links: Folder of the images that are trained on.
        folder: Of the study.
    """

    dense: nn.Module
    photos: Shown
    calibration: int
    batch_size: int
    links: Path
    folder: Path

    def images(self, seed: int) -> Labelled:
        """Returns the calibration images of a seed and their labels."""
        return self.photos.calibration(self.calibration, seed)


@dataclass(frozen=True)
class Ready:
    """A method that can cut: how, and the wall seconds of what it did for that."""

    cut: Cut
    seconds: Mapping[str, float]


def ours(bench: Bench, seed: int, ranking: str | None = None, **options: Any) -> Ready:
    """`vitslim.compress` as it comes, or with something taken away."""
    planning = {} if ranking is None else {"ranking": ranking}
    began = time.perf_counter()
    prepared = prepare(bench.dense, bench.images(seed), seed=seed, quiet=True, **options)

    def cut(budget: int, refitted: bool) -> nn.Module:
        plan = prepared.plan(f"macs={budget}%", **planning)
        return prepared.cut(plan) if refitted else slim(prepared.model, plan)

    return Ready(cut, {"rotation and scores": time.perf_counter() - began})


def even(bench: Bench, seed: int, criterion: str) -> Ready:
    """Units chosen by a criterion, in equal widths."""
    began = time.perf_counter()
    images = bench.images(seed)
    scores = importance(bench.dense, images, criterion, seed=seed, quiet=True)

    def cut(budget: int, refitted: bool) -> nn.Module:
        plan = even_widths(bench.dense, scores, budget)
        return slim(bench.dense, plan, calibrate=images if refitted else None)

    return Ready(cut, {"scores": time.perf_counter() - began})


def torch_pruning(bench: Bench, seed: int) -> Ready:
    """Torch-Pruning's own Taylor importance and own cut; what it gives cannot be refitted here."""
    images, labels = bench.images(seed)
    batches = list(zip(images.split(32), labels.split(32), strict=True))

    def cut(budget: int, refitted: bool) -> nn.Module:
        macs = budget / 100 * cost(bench.dense).macs
        return uniform.prune(copy.deepcopy(bench.dense), macs, batches)

    return Ready(cut, {})


def searched(bench: Bench, seed: int) -> Ready:
    """The paper's search: masks and weights are trained together, then cut by the masks."""
    folder = bench.folder / f"search-{seed}"
    settings = search_settings(bench.links, seed, bench.batch_size)
    context = StageContext("search", settings, WORLD, folder, resume=True)
    masked = search(bench.dense, context, masks=MaskOptions(kinds=("attention", "mlp"))).eval()
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    images = bench.images(seed)

    def cut(budget: int, refitted: bool) -> nn.Module:
        plan = threshold(masked, f"macs={budget}%")
        if not refitted:
            return slim(masked, plan)
        return slim(masked, plan, calibrate=images, target=bench.dense)

    return Ready(cut, {"search": seconds})


def scratch(bench: Bench, seed: int) -> Ready:
    """Our plan with random weights, whose layer scales are 1, for they are to learn in epochs."""
    prepared = ours(bench, seed)

    def cut(budget: int, refitted: bool) -> nn.Module:
        small: Any = prepared.cut(budget, False)
        base = small.plan.base
        seed_everything(seed, 0)
        fresh = timm.create_model(base["model"], **base["args"])
        with torch.no_grad():
            for module in fresh.modules():
                if isinstance(module, LayerScale):
                    module.gamma.fill_(1.0)
        return slim(fresh, small.plan)

    return Ready(cut, prepared.seconds)


@dataclass(frozen=True)
class Method:
    """A line of the study.

    Attributes:
        label: How tables and plots call it.
        make: Prepares it for a seed.
        ways: What is evaluated at every budget: "cut", right after it, and "refitted".
        group: "ours", "ablation", "rival" or "search", which is a rival that takes long.
    """

    label: str
    make: Callable[[Bench, int], Ready]
    ways: tuple[str, ...] = ("cut", "refitted")
    group: str = "rival"


def _changed(what: str, **options: Any) -> Method:
    """Returns ours with one thing changed."""
    return Method(f"ours, {what}", partial(ours, **options), ("refitted",), "ablation")


METHODS: dict[str, Method] = {
    "ours": Method("ours", ours, ("refitted", "cut"), "ours"),
    "torch-pruning": Method("Torch-Pruning", torch_pruning, ("cut",)),
    "taylor": Method("Taylor, even widths", partial(even, criterion="taylor")),
    "magnitude": Method("magnitude, even widths", partial(even, criterion="magnitude")),
    "activation": Method("activation, even widths", partial(even, criterion="activation")),
    "random": Method("random, even widths", partial(even, criterion="random")),
    "no-rotation": _changed("heads not rotated", rotation=False),
    "by-taylor": _changed("scored by Taylor", criterion="taylor"),
    "by-fisher": _changed("scored by Fisher", criterion="fisher"),
    "fractions": _changed("one fraction of each kind", ranking="fractions"),
    "search": Method("the paper's search", searched, group="search"),
    "scratch": Method("from scratch", scratch, ()),
}
