"""The whole job in one folder: dense if needed, search, threshold, retrain, measure, report.

    args.yaml  summary.csv  summary.json
    dense/  search/                 models; search/ also masks.safetensors
    plans/NAME.json  retrain/NAME/  slim/NAME/     one per budget, e.g. macs-60
    compress/                                      the same without a search, with --compress
    report/

Every stage that is done is skipped, so the same command finishes a run that was killed, and
more budgets can be added to a run without searching again.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import load
from ..errors import VitslimError
from ..files import atomic_write
from ..masks import Masks
from ..plan import Plan
from ..planning.threshold import budget_name, parse_budget
from .classifier import fit_classifier, has_new_classifier
from .cut import Cutting
from .image_size import image_size
from .latency import measure
from .latency_budget import plan_for
from .models import open_model, open_plan, open_teacher
from .options.choices import CompressOptions, MaskOptions, PlanOptions
from .options.settings import Settings
from .report.page import report
from .report.text import text_table
from .retrain import retrain
from .run_folder import begin, write_args
from .runtime.context import StageContext
from .runtime.journal import Journal
from .runtime.world import World, open_world
from .search import search
from .stage import run_stage
from .summary import by_class, class_names, entry, environment
from .training.state import StageFolder, read_json


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run is asked to do.

    Attributes:
        output: The run folder.
        budgets: Such as `macs=60%`; one slim model for each.
        stages: Settings of dense, search and retrain.
        model: A timm name or a saved folder; `digits` is the small ViT for the digits.
        pretrained: Whether timm loads weights. A folder always brings its own.
        model_kwargs: timm's arguments for the constructor.
        masks: Which masks the search learns.
        plans: How plans are made and the model is cut to them.
        looking: Whether heads are rotated before the search, and whether and how the dense model is
            compressed too.
        train_dense: Whether the dense model is trained although its weights fit the data.
        resume: Whether to go on with what is in the folder.
        given: The whole merged recipe, for args.yaml.
    """

    output: Path
    budgets: tuple[str, ...]
    stages: Mapping[str, Settings]
    model: str = "digits"
    pretrained: bool = False
    model_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    masks: MaskOptions = dataclasses.field(default_factory=MaskOptions)
    plans: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    looking: CompressOptions = dataclasses.field(default_factory=CompressOptions)
    train_dense: bool = False
    resume: bool = False
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(job: Job) -> dict[str, Any]:
    """Does the whole job and returns what summary.json holds."""
    began = time.perf_counter()
    budgets = {budget_name(parse_budget(text)): parse_budget(text) for text in job.budgets}
    world = open_world(job.stages["search"].device)
    _claim(job, world)
    journal = Journal("run", None, quiet=not world.primary)

    dense, dense_accuracy = _dense(job, world)
    masked = search(
        dense,
        _context(job, "search", world),
        masks=job.masks,
        rotate=job.looking.calibration_images if job.looking.rotate else None,
        teacher=_teacher(job, "search", dense, world),
        budgets=budgets,
        plans=job.plans,
        base=job.model,
    )
    # All of them before the first is retrained: one may be out of reach.
    plans = {name: _plan(job, masked, name, budget, world) for name, budget in budgets.items()}
    slims = []
    for name, budget in budgets.items():
        result = retrain(
            masked,
            plans[name],
            _context(job, f"retrain/{name}", world),
            fold=job.plans.fold,
            teacher=_teacher(job, "retrain", dense, world),
            output=job.output / "slim" / name,
        )
        slims.append(
            {
                "name": name,
                "budget": budget,
                "method": "searched",
                "plan": f"plans/{name}.json",
                "folder": f"slim/{name}",
                **{key: result[key] for key in ("cut", "retrained", "params", "macs")},
            }
        )
    compressed = _compressed(job, dense, budgets, world) if job.looking.compress else []
    summary: dict[str, Any] = {}
    folders = {each["folder"]: job.output / each["folder"] for each in (*slims, *compressed)}
    classes = _by_class(job, dense, slims, compressed, world)
    if world.primary:
        trained = time.perf_counter()
        journal.say("measuring latency")
        searched = read_json(job.output / "search" / "result.json")
        models: dict[str, nn.Module] = {"dense": dense, "masked": masked}
        models |= {name: load(folder) for name, folder in folders.items()}
        latency = measure({name: model.to(world.device) for name, model in models.items()})
        summary = {
            "model": job.model,
            "data": job.stages["search"].data,
            "img_size": image_size(dense),
            "classes": class_names(dense),
            "by_class": classes,
            "seconds": _seconds(job.output, *(time.perf_counter() - t for t in (began, trained))),
            "environment": environment(world),
            "dense": entry(dense, dense_accuracy, latency["dense"]),
            "masked": entry(masked, searched["accuracy"], latency["masked"]),
            "slim": [each | {"latency_ms": latency[each["folder"]]} for each in slims],
        }
        if job.looking.compress:
            summary["images"] = max(each["images"] for each in compressed)
            summary["compressed"] = [
                each | {"latency_ms": latency[each["folder"]]} for each in compressed
            ]
        write_args(job.output, job.given)
        atomic_write(job.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        page = report(job.output)
        print(text_table(summary))
        journal.say(f"done in {summary['seconds']:.0f} s, report in {page}")
    world.wait()
    return summary


def _compressed(
    job: Job, dense: nn.Module, budgets: Mapping[str, Mapping[str, Any]], world: World
) -> list[dict[str, Any]]:
    """Takes the dense model the other way, and retrains in the same manner, but more gently.

    Tokens are cut where a budget names them.
    """
    found, settings = [], job.stages["retrain"].gentler()
    for tokens in (False, True):
        some = {name: budget for name, budget in budgets.items() if ("token" in budget) == tokens}
        cutting = Cutting(
            dense,
            job.model,
            job.output / "compress",
            settings,
            world,
            compressed_kinds(job.masks.kinds, tokens),
            dataclasses.replace(job.plans, ranking="macs"),
            dataclasses.replace(job.looking, rotate=True),
        )
        for each in cutting.all(some):
            name, teacher = each["name"], _teacher(job, "retrain", dense, world)
            result = cutting.retrain(name, f"compress/{name}", job.output, teacher)
            each["retrained"] = result["retrained"]
            each["retrain"] = {"epochs": settings.epochs, "lr": settings.lr}
            found.append(each | {key: f"compress/{each[key]}" for key in ("plan", "folder")})
    return sorted(found, key=lambda each: list(budgets).index(each["name"]))


def compressed_kinds(kinds: tuple[str, ...], tokens: bool) -> tuple[str, ...]:
    """Returns what is cut without a search: of what the search may cut, tokens only where named."""
    return tuple(kind for kind in kinds if kind != "token" or tokens) or kinds


def _by_class(
    job: Job,
    dense: nn.Module,
    slims: list[dict[str, Any]],
    compressed: list[dict[str, Any]],
    world: World,
) -> dict[str, list[float | None]]:
    """Returns the accuracy of every class, of the dense model and after each retraining."""
    folders = {each["name"]: job.output / each["folder"] for each in slims}
    folders |= {f"{each['name']}, compressed": job.output / each["folder"] for each in compressed}
    return by_class(dense, folders, _context(job, "dense", world).settings, world)


def _claim(job: Job, world: World) -> None:
    """Refuses a folder that holds something else, and writes args.yaml."""
    if StageFolder(job.output, {}).started:
        raise VitslimError(
            f"{job.output} is the folder of a search or a retraining: give another --output."
        )
    begin(job.output, job.given, world, job.resume)


def _dense(job: Job, world: World) -> tuple[nn.Module, float]:
    """Returns the dense model and its accuracy, trained unless it came with weights that fit."""
    context = _context(job, "dense", world)
    why = ""

    def build() -> nn.Module:
        nonlocal why
        model = open_model(job.model, job.pretrained, job.model_kwargs)
        # Also one that --model-kwargs num_classes made.
        new = has_new_classifier(model) | fit_classifier(model, context)
        why = _why_trained(job, new)
        return model

    def trains(_: nn.Module) -> bool:
        doing = f"is trained first: {why}" if why else "has weights and is evaluated as it is"
        context.journal.say(f"{job.model} {doing}")
        return bool(why)

    identity = {
        "model": job.model,
        "model_kwargs": dict(job.model_kwargs),
        "train_dense": job.train_dense,
    }
    done = run_stage(context, identity, build, trains=trains)
    return done.model, float(done.result["accuracy"])


def _why_trained(job: Job, new_classifier: bool) -> str:
    """Says why the dense model is trained; empty where its weights fit the data."""
    if not (job.pretrained or Path(job.model).is_dir()):
        return "it came without weights"
    if new_classifier:
        return "its classifier is new"
    return "as --train-dense or --dense-epochs ask" if job.train_dense else ""


def _context(job: Job, name: str, world: World) -> StageContext:
    """Returns the context of a stage of a run, which always goes on with what is there."""
    settings = job.stages[name.partition("/")[0]]
    return StageContext(name, settings, world, job.output / name, job.output, resume=True)


def _teacher(job: Job, stage: str, dense: nn.Module, world: World) -> nn.Module | None:
    settings = job.stages[stage]
    if not settings.distill_loss_weight:
        return None
    classes = None if settings.distill_type == "feature" else dense.num_classes
    return open_teacher(settings.teacher or "dense", dense, world.device, classes)


def _plan(job: Job, masked: nn.Module, name: str, budget: Mapping[str, Any], world: World) -> Plan:
    """Plans a budget, or reads the plan of an earlier run, which must be the same."""
    path = job.output / "plans" / f"{name}.json"
    if world.primary and not (path.exists() and "latency" in budget):
        masks = Masks.load(job.output / "search/masks.safetensors")
        plan = plan_for(masked, budget, masks, **job.plans.threshold_arguments)
        if path.exists() and open_plan(path) != plan:
            raise VitslimError(
                f"{path} was planned otherwise: give the --round-to, --token-rule and --floor "
                "of then, or another --output."
            )
        plan.save(path)
    world.wait()
    return open_plan(path)


def _seconds(folder: Path, now: float, since_trained: float) -> float:
    """Seconds of the whole run, also where this process only went on with it."""
    results = [folder / "dense/result.json", folder / "search/result.json"]
    results += (folder / "retrain").glob("*/result.json")
    results += (folder / "compress").glob("*/*/result.json")
    trained = sum(float(read_json(path)["seconds"]) for path in results)
    return max(now, trained + since_trained)
