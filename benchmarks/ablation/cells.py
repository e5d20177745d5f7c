"""What is trained: one function for each kind of cell, from what lies in the folder of the study.

A cell is one model of one seed. What it writes is JSON: how good the model is right after the cut
and after training, and what it costs. Rivals have no search, so they get its epochs in two ways:
cut at once and retrained for as long as search and retraining take together, or trained on as the
dense model for as long as the search takes, and cut then.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitslim import Masks, cost, importance, load, save, slim, threshold
from vitslim.masks import mask_parameters
from vitslim.oneshot import prepare
from vitslim.workflow.data.batches import open_data
from vitslim.workflow.data.calibration import calibration
from vitslim.workflow.options.choices import MaskOptions
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.search import search

from . import criteria, uniform
from .recipe import EPOCHS, WORLD, fit, fresh, renew, scores, stage_settings

WIDTHS = ("attention", "mlp")
ALL = 1_000_000  # calibration images: all there are


@dataclass(frozen=True)
class Search:
    """A search: what differs from the paper's settings, and which masks take part.

    Attributes:
        settings: Of training.
        mask: Arguments of `vitslim.mask`.
        rotated: Whether the heads are rotated before it, see `vitslim.rotate`.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    mask: Mapping[str, Any] = field(default_factory=lambda: {"kinds": WIDTHS})
    rotated: bool = False


SEARCHES = {
    "paper": Search(),
    "proximal": Search({"l1_step": "proximal"}),
    "per unit": Search({"l1_per": "unit"}),
    "per MAC": Search({"l1_per": "mac"}),
    "warm-up": Search({"l1_warmup_epochs": EPOCHS["search"] / 3}),
    "rotated": Search(rotated=True),
    "tokens": Search(mask={}),
    "tokens on keys": Search(mask={"token_gate": "keys"}),
}


@dataclass(frozen=True)
class Variant:
    """A way to go from a search to a slim model.

    Attributes:
        question: The letter of the ablation; empty for a setting that others are compared with.
        search: Its name.
        fold: Whether the masks' values are multiplied into the weights.
        threshold: More arguments of `vitslim.threshold`.
        scores: What is made of the search's masks before they are ranked, with the seed.
        refitted: Whether what is kept is refitted to the dense model, see `vitslim.slim`.
        reference: The variant that it is compared with.
    """

    question: str
    search: str = "paper"
    fold: bool = True
    threshold: Mapping[str, Any] = field(default_factory=dict)
    scores: Callable[[Masks, int], Masks] = lambda masks, seed: masks
    refitted: bool = False
    reference: str = "paper"


VARIANTS = {
    "paper": Variant(""),
    "proximal step": Variant("a", "proximal"),
    "masks discarded": Variant("b", fold=False),
    "penalty per unit": Variant("c", "per unit"),
    "penalty per MAC": Variant("c", "per MAC"),
    "penalty warm-up": Variant("d", "warm-up"),
    "tokens too": Variant("", "tokens"),
    "token gate on keys": Variant("e", "tokens on keys", reference="tokens too"),
    "score per MAC": Variant("f", threshold={"ranking": "macs"}),
    "even layers": Variant("g", scores=criteria.even_layers),
    "random units": Variant("h", scores=criteria.random_units),
    "rotated heads": Variant("i", "rotated"),
    "refitted after the cut": Variant("j", refitted=True),
}
CRITERIA = ("random", "magnitude", "Taylor")
RIVALS = (*CRITERIA, "Torch-Pruning", "vitslim.compress")


def dense(folder: Path, seed: int) -> dict[str, Any]:
    """Trains the dense model that everything of a seed starts from."""
    settings = stage_settings("dense", seed)
    return _kept(fit(fresh(seed), settings), folder / f"models/dense-{seed}", settings)


def longer(folder: Path, seed: int) -> dict[str, Any]:
    """Trains the dense model on as a search does, but with neither masks nor penalty."""
    settings = stage_settings("search", seed)
    model = fit(load(folder / f"models/dense-{seed}"), settings)
    return _kept(model, folder / f"models/longer-{seed}", settings)


def searched(folder: Path, seed: int, name: str) -> dict[str, Any]:
    """Searches, and counts the masks that are exactly zero."""
    chosen = SEARCHES[name]
    settings = stage_settings("search", seed, **chosen.settings)
    model = search(
        load(folder / f"models/dense-{seed}"),
        StageContext("search", settings, WORLD, folder / f"models/{name}-{seed}", resume=True),
        masks=MaskOptions(**chosen.mask),
        rotate=ALL if chosen.rotated else None,
    )
    masks = [parameter for _, parameter in mask_parameters(model)]
    zeros = sum(int((each == 0).sum()) for each in masks)
    return {
        "masked": scores(model, settings),
        "zero": zeros / sum(each.numel() for each in masks),
    }


def cut(folder: Path, seed: int, budget: str, name: str) -> dict[str, Any]:
    """Cuts what a search learned, and retrains."""
    variant = VARIANTS[name]
    masked = load(folder / f"models/{variant.search}-{seed}")
    masks = variant.scores(Masks.of(masked), seed)
    plan = threshold(masked, {"macs": budget}, masks=masks, round_to=1, **variant.threshold)
    if variant.refitted:
        target = load(folder / f"models/dense-{seed}").eval()
        images = _images(target, stage_settings("retrain", seed))
        small = slim(masked.eval(), plan, calibrate=images, target=target)
    else:
        small = slim(masked, plan, fold=variant.fold)
    return _retrained(small, seed, EPOCHS["retrain"])


def rival(folder: Path, seed: int, budget: str, name: str, at_once: bool) -> dict[str, Any]:
    """Cuts the dense model by another criterion, and retrains."""
    model = load(folder / f"models/{'dense' if at_once else 'longer'}-{seed}")
    settings = stage_settings("retrain", seed)
    data = open_data(settings, model, WORLD)
    if name in CRITERIA:
        masks = _scored(name, model, seed, data)
        small = slim(model, threshold(model, {"macs": budget}, masks=masks, round_to=1))
    elif name == "vitslim.compress":
        prepared = prepare(model.eval(), _images(model, settings), seed=seed, quiet=True)
        small = prepared.cut(prepared.plan({"macs": budget}, round_to=1))
    else:
        macs = float(budget.rstrip("%")) / 100 * cost(model).macs
        small = uniform.prune(model, macs, data.epoch(0))
    epochs = EPOCHS["retrain"] + (EPOCHS["search"] if at_once else 0)
    return _retrained(small, seed, epochs)


def scratch(folder: Path, seed: int, budget: str, pretraining: bool) -> dict[str, Any]:
    """Trains the architecture that the paper's setting found, from random weights.

    Args:
        folder: Of the study.
        seed: Of the search and of the weights.
        budget: Of the plan.
        pretraining: Whether the epochs of the dense model are added to those of search and
            retraining, which makes it all the training that the searched model ever had.
    """
    masked = load(folder / f"models/paper-{seed}")
    model = slim(masked, threshold(masked, {"macs": budget}, round_to=1))
    epochs = EPOCHS["search"] + EPOCHS["retrain"] + (EPOCHS["dense"] if pretraining else 0)
    return _retrained(renew(model, seed), seed, epochs)


def uncut(folder: Path, seed: int) -> dict[str, Any]:
    """Retrains the dense model as it is: the most that could be hoped for."""
    return _retrained(load(folder / f"models/longer-{seed}"), seed, EPOCHS["retrain"])


def _images(model: nn.Module, settings: Any) -> torch.Tensor:
    """Returns all training images as they are evaluated, without augmentation."""
    return calibration(settings, model, WORLD, ALL).images


def _scored(name: str, model: nn.Module, seed: int, data: Any) -> Masks:
    if name == "Taylor":
        return criteria.taylor(model, data.epoch(0))
    return importance(model, criterion=name, seed=seed)


def _kept(model: nn.Module, folder: Path, settings: Any) -> dict[str, Any]:
    save(model, folder)
    return scores(model, settings)


def _retrained(model: nn.Module, seed: int, epochs: int) -> dict[str, Any]:
    settings = stage_settings("retrain", seed, epochs=epochs)
    params, macs = cost(model)
    before = scores(model, settings)
    after = scores(fit(model, settings), settings)
    return {
        "cut": before,
        "retrained": after,
        "params": params,
        "macs": macs,
        "attention": [block.attn.proj.in_features for block in model.blocks],
        "hidden": [block.mlp.fc2.in_features for block in model.blocks],
    }
