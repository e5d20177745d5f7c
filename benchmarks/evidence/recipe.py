"""How everything of a study is trained and judged: the library's own loop, one set of settings."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vitslim import VitslimError, cost, pack
from vitslim.workflow.options.settings import Settings, settings_for
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.runtime.seeds import seed_everything
from vitslim.workflow.runtime.world import World
from vitslim.workflow.training.train import open_stage, train

from .photos import Labelled

WORLD = World(torch.device("cpu"))
# Photos of one thing each: flips and crops of most of the image.
LIGHT: dict[str, Any] = {
    "scale": (0.7, 1.0),
    "ratio": (0.9, 1.1),
    "color_jitter": 0.0,
    "drop_path": 0.0,
    "layer_decay": None,
    "smoothing": 0.1,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "warmup_epochs": 0,
    "workers": 0,
    "device": "cpu",
}
# Half of the loss is the dense model's answer, half the label.
TAUGHT = {"teacher": "dense", "distill_loss_weight": 0.5, "task_loss_weight": 0.5}
# Masks start at 1 and have to go all their way in two epochs.
SEARCH: dict[str, Any] = {
    "epochs": 2,
    "lr": 5e-5,
    "mask_lr_scale": 100.0,
    "l1_attention": 1e-3,
    "l1_mlp": 2e-4,
    "sched": "none",
    "aa": None,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "forecast": False,
}
# Compensated weights are near their goal; the others have further to go, random ones furthest.
RATES = {"refitted": 2e-5, "cut": 5e-5, "scratch": 5e-4}
RECIPE = [LIGHT, TAUGHT, SEARCH, RATES]


class Trained(NamedTuple):
    """A trained model and the wall time it took, evaluation after every epoch included."""

    model: nn.Module
    seconds: float


def search_settings(links: Path, seed: int, batch_size: int) -> Settings:
    """Returns the settings of the paper's search."""
    given = {**LIGHT, **SEARCH, "data": f"folder:{links}", "seed": seed, "batch_size": batch_size}
    return settings_for("search", given)


def tuning_settings(links: Path, seed: int, batch_size: int, **more: Any) -> Settings:
    """Returns the settings of fine-tuning and of retraining, which are the library's own."""
    given = {**LIGHT, "data": f"folder:{links}", "seed": seed, "batch_size": batch_size, **more}
    return settings_for("finetune", given)


def fit(model: nn.Module, settings: Settings, folder: Path, teacher: nn.Module | None) -> Trained:
    """Trains anything with a timm vision transformer's attributes by the loop of the library.

    Args:
        model: Trained in place.
        settings: How.
        folder: For checkpoints; training that was stopped goes on from there. Gone when done.
        teacher: The dense model.
    """
    seed_everything(settings.seed, 0)
    context = StageContext("evidence", settings, WORLD, folder, resume=True)
    done = train(model, context, open_stage(context, {}), teacher=teacher)
    shutil.rmtree(folder, ignore_errors=True)
    return Trained(done.model, done.seconds)


@torch.no_grad()
def judged(model: nn.Module, held_out: Labelled, batch_size: int = 64) -> dict[str, Any]:
    """Returns accuracy in percent, mean cross-entropy, cost, and seconds of the evaluation.

    The model is packed in float32 where it packs.
    """
    began = time.perf_counter()
    model.eval()
    params, macs = cost(model)
    try:
        fast, packed = pack(model), True
    except VitslimError:
        fast, packed = model, False
    right = loss = 0.0
    images, labels = held_out
    for some, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        logits = fast(some)
        right += float((logits.argmax(1) == target).sum())
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
    return {
        "accuracy": 100 * right / len(labels),
        "cross_entropy": loss / len(labels),
        "packed": packed,
        "params": params,
        "macs": macs,
        "evaluated_in": round(time.perf_counter() - began, 1),
    }


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns wall times to a tenth of a second."""
    return {step: round(each, 1) for step, each in seconds.items()}
