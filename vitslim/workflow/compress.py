"""A trained model made smaller without training, in one folder: evaluate, cut, measure, report.

    args.yaml  summary.json  scores.safetensors
    dense/                                         the model and its accuracy
    plans/NAME.json  cut/NAME/  slim/NAME/         one per budget, e.g. macs-60
    summary.csv  retrain/NAME/                     only with --retrain-epochs
    report/

A budget that is done is skipped, so the same command finishes what was killed, and more budgets
can be added.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import load, save
from ..errors import VitslimError
from ..files import atomic_write
from ..planning.threshold import budget_name, parse_budget
from ..surgery.classes import MaskedModel, SlimModel
from .classifier import fit_classifier, has_new_classifier
from .cut import Cutting, accuracy_at_rest, evaluated_like, refuse_without_labels
from .data.calibration import folder_without_labels
from .image_size import image_size
from .latency import measure
from .models import open_model, open_teacher
from .options.choices import CompressOptions, PlanOptions
from .options.settings import Settings
from .report.page import report
from .report.text import text_table
from .run_folder import begin, write_args
from .runtime.context import StageContext
from .runtime.journal import Journal, budget_text
from .runtime.seeds import seed_everything
from .runtime.world import World, open_world
from .summary import by_class, class_names, entry, environment
from .training.state import StageFolder, read_json


@dataclasses.dataclass(frozen=True)
class CompressJob:
    """What is asked for.

    Attributes:
        output: Where everything goes.
        budgets: Such as `macs=60%`; one slim model for each.
        settings: Of the images, and of the retraining.
        model: A timm name or a saved folder.
        pretrained: Whether timm loads weights. A folder always brings its own.
        model_kwargs: timm's arguments for the constructor.
        kinds: What may be cut.
        plans: How plans are made.
        options: How the model is looked at and refitted.
        retrain: Whether the slim models are trained on.
        resume: Whether to go on with what is in the folder.
        given: The whole merged recipe, for args.yaml.
    """

    output: Path
    budgets: tuple[str, ...]
    settings: Settings
    model: str
    pretrained: bool = False
    model_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kinds: tuple[str, ...] = ("attention", "mlp")
    plans: PlanOptions = dataclasses.field(default_factory=lambda: PlanOptions(ranking="macs"))
    options: CompressOptions = dataclasses.field(default_factory=CompressOptions)
    retrain: bool = False
    resume: bool = False
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def compress(job: CompressJob) -> dict[str, Any]:
    """Does the whole job and returns what summary.json holds."""
    began = time.perf_counter()
    budgets = {budget_name(parse_budget(text)): parse_budget(text) for text in job.budgets}
    if job.retrain:
        refuse_without_labels(job.settings)
    world = open_world(job.settings.device)
    _claim(job, world)
    journal = Journal("compress", None, quiet=not world.primary)
    dense, accuracy = _dense(job, world, journal)
    cutting = Cutting(
        dense, job.model, job.output, job.settings, world, job.kinds, job.plans, job.options
    )
    earlier = _earlier(job)
    slims = cutting.all({**earlier, **budgets})
    teacher = _teacher(job, dense, world) if job.retrain else None
    for slim in slims:
        name = slim["name"]
        path = job.output / "retrain" / name / "result.json"
        if job.retrain and name in budgets:
            result = cutting.retrain(name, f"retrain/{name}", job.output, teacher)
            slim["retrained"] = result["retrained"]
        elif path.exists():
            slim["retrained"] = read_json(path)["retrained"]
    summary: dict[str, Any] = {}
    labelled = accuracy is not None
    folders = {slim["name"]: job.output / slim["folder"] for slim in slims}
    classes = by_class(dense, folders, job.settings, world) if labelled else {}
    if world.primary:
        journal.say("measuring latency")
        models: dict[str, nn.Module] = {"dense": dense}
        models |= {name: load(folder) for name, folder in folders.items()}
        latency = measure({name: model.to(world.device) for name, model in models.items()})
        summary = {
            "model": job.model,
            "data": job.settings.data,
            "img_size": image_size(dense),
            "classes": class_names(dense),
            "by_class": classes,
            "seconds": time.perf_counter() - began,
            "environment": environment(world),
            "images": max(slim["images"] for slim in slims),
            "labelled": labelled,
            "dense": entry(dense, accuracy, latency["dense"]),
            "slim": [each | {"latency_ms": latency[each["name"]]} for each in slims],
        }
        asked = {"budget": [budget_text(slim["budget"]) for slim in slims]}
        write_args(job.output, {**job.given, **asked})
        atomic_write(job.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        page = report(job.output)
        print(text_table(summary))
        journal.say(f"done in {summary['seconds']:.0f} s, report in {page}")
    world.wait()
    return summary


def _claim(job: CompressJob, world: World) -> None:
    """Refuses a folder that holds something else, and writes args.yaml."""
    for room in ("search", "model.safetensors"):
        if (job.output / room).exists():
            what = "the folder of a whole run" if room == "search" else "the folder of a model"
            raise VitslimError(f"{job.output} is {what}: give another --output.")
    begin(job.output, job.given, world, job.resume)


def _earlier(job: CompressJob) -> dict[str, Any]:
    """Returns the budgets that are done already, by name: they stay in tables and report."""
    path = job.output / "summary.json"
    slims = read_json(path).get("slim", []) if path.exists() else []
    return {slim["name"]: slim["budget"] for slim in slims}


def _dense(job: CompressJob, world: World, journal: Journal) -> tuple[nn.Module, float | None]:
    """Returns the model and its accuracy, None where there are no labels."""
    settings, folder = job.settings, job.output / "dense"
    identity = {"model": job.model, "model_kwargs": dict(job.model_kwargs)}
    stage = StageFolder(folder, {**evaluated_like(settings, world), **identity})
    if stage.result() is None:
        seed_everything(settings.seed, 0)
        model = _open(job, world)
        accuracy = accuracy_at_rest(model, settings, world)
        if accuracy is None:
            journal.say(
                f"{settings.data} has no train and val of classes: its images are looked at "
                "without labels, and no accuracy is measured"
            )
        else:
            journal.say(f"{job.model} has accuracy {accuracy:.2f} %")
        if world.primary:
            save(model, folder, ignore_hooks=True)
            stage.finish({"accuracy": accuracy, "seconds": 0.0})
        world.wait()
    return load(folder), stage.read_result()["accuracy"]


def _open(job: CompressJob, world: World) -> nn.Module:
    """Opens the model, or refuses one that has not learned the data or is no dense one."""
    if not (job.pretrained or Path(job.model).is_dir()):
        raise VitslimError(
            f"{job.model} comes without weights, so there is nothing to keep: add --pretrained, "
            "or give the folder of a trained model."
        )
    model = open_model(job.model, job.pretrained, job.model_kwargs)
    if isinstance(model, MaskedModel | SlimModel):
        raise VitslimError(
            f"{job.model} is masked or slim already: give the dense model that it was made of."
        )
    if has_new_classifier(model):
        raise VitslimError(
            f"{job.model} has a classifier that was never trained: fine-tune it first with "
            "`vitslim finetune`."
        )
    if folder_without_labels(job.settings) is None:
        context = StageContext("compress", job.settings, world, job.output)
        fit_classifier(model, context, may_renew=False)
    return model


def _teacher(job: CompressJob, dense: nn.Module, world: World) -> nn.Module | None:
    settings = job.settings
    if not settings.distill_loss_weight:
        return None
    classes = None if settings.distill_type == "feature" else dense.num_classes
    return open_teacher(settings.teacher or "dense", dense, world.device, classes)
