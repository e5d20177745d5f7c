"""The verbs that train: what was asked for is put together, recorded, and handed on."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .cli_verbs import COMPRESSING
from .errors import VitslimError
from .files import atomic_write
from .workflow.options.asked import Asked, ask, record
from .workflow.options.choices import Choices
from .workflow.options.option import OF_A_RUN

if TYPE_CHECKING:
    from .workflow.runtime.world import World

# torch and timm are imported inside the verbs, where they are needed.


def run_verb(given: dict[str, Any]) -> None:
    from .workflow.run import Job, run

    if "dense_epochs" in given:
        given.setdefault("train_dense", True)
    resume, asked = _resume(given), asked_by(given)
    choices, stages = asked.choices, asked.stages(*OF_A_RUN)
    if not choices.budget:
        raise VitslimError("--budget is needed.")
    output = _output(choices)
    model = choices.model or ("digits" if stages["search"].data == "digits" else None)
    if model is None:
        raise VitslimError("--model is needed: a timm name or a saved folder.")
    choices = dataclasses.replace(choices, model=model)
    _check_supported(choices)
    job = Job(
        output=output,
        budgets=choices.budget,
        stages=stages,
        model=model,
        pretrained=choices.pretrained,
        model_kwargs=choices.model_kwargs,
        masks=choices.masks,
        plans=choices.plans,
        looking=choices.compression,
        train_dense=choices.train_dense,
        resume=resume,
        given=record(dataclasses.asdict(choices), stages),
    )
    run(job)


def search_verb(given: dict[str, Any]) -> None:
    from .planning.threshold import budget_name, parse_budget
    from .workflow.classifier import has_new_classifier
    from .workflow.models import open_model, open_teacher
    from .workflow.runtime.context import StageContext
    from .workflow.runtime.seeds import seed_everything
    from .workflow.runtime.world import open_world
    from .workflow.search import search

    resume, asked = _resume(given), asked_by(given)
    choices, stages = asked.choices, asked.stages("search")
    name, output, settings = model_of(choices), _output(choices), stages["search"]
    budgets = [parse_budget(text) for text in choices.budget]
    _check_supported(choices)
    weights = choices.pretrained or Path(name).is_dir()
    if settings.teacher == "dense" and not (weights or settings.synthetic):
        raise VitslimError(
            f"--teacher dense is {name} before the search, which has no weights: add --pretrained, "
            "or give a saved folder."
        )
    world = open_world(settings.device)
    seed_everything(settings.seed, 0)
    dense = open_model(name, choices.pretrained, choices.model_kwargs)
    if settings.teacher == "dense" and weights and has_new_classifier(dense):
        raise VitslimError(
            f"--teacher dense is {name} with a classifier that was never trained: train it first "
            "with `vitslim finetune`."
        )
    teacher = None
    if settings.teacher is not None:
        classes = None if settings.distill_type == "feature" else dense.num_classes
        teacher = open_teacher(settings.teacher, dense, world.device, classes)
    with _recorded(output, record(dataclasses.asdict(choices), stages), world):
        search(
            dense,
            StageContext("search", settings, world, output, resume=resume),
            masks=choices.masks,
            rotate=choices.calibration_images if choices.rotate else None,
            teacher=teacher,
            budgets={budget_name(budget): budget for budget in budgets},
            plans=choices.plans,
            base=name,
        )


def retrain_verb(given: dict[str, Any]) -> None:
    from .checkpoint import load
    from .workflow.models import open_dense, open_plan, open_teacher
    from .workflow.retrain import retrain
    from .workflow.runtime.context import StageContext
    from .workflow.runtime.world import open_world

    folder, path, base = given.pop("search"), given.pop("plan"), given.pop("dense", None)
    resume, asked = _resume(given), asked_by(given)
    choices, stages = asked.choices, asked.stages("retrain")
    output, settings = _output(choices), stages["retrain"]
    if settings.distill_loss_weight and asked.chosen["retrain"].get("teacher") is None:
        raise VitslimError(
            "--distill-loss-weight needs --teacher: dense, a timm name or a saved folder."
        )
    if base is not None and settings.teacher != "dense":
        raise VitslimError("--dense tells what --teacher dense means, and needs it.")
    folder, plan = search_folder(folder), open_plan(path)
    masked = load(folder)
    world = open_world(settings.device)
    teacher = None
    if settings.teacher is not None:
        dense = open_dense(folder, base) if settings.teacher == "dense" else None
        classes = None if settings.distill_type == "feature" else masked.num_classes
        teacher = open_teacher(settings.teacher, dense, world.device, classes)
    with _recorded(output, record(choices.some(("output", "fold")), stages), world):
        result = retrain(
            masked,
            plan,
            StageContext("retrain", settings, world, output, resume=resume),
            fold=choices.fold,
            teacher=teacher,
        )
    if world.primary:
        print(f"{output}: accuracy {result['retrained']['accuracy']:.2f} %")


def finetune_verb(given: dict[str, Any]) -> None:
    from .workflow.finetune import finetune
    from .workflow.models import open_model, open_teacher
    from .workflow.runtime.context import StageContext
    from .workflow.runtime.seeds import seed_everything
    from .workflow.runtime.world import open_world

    size = given.pop("img_size", None)
    resume, asked = _resume(given), asked_by(given)
    choices, stages = asked.choices, asked.stages("finetune")
    name, output, settings = model_of(choices), _output(choices), stages["finetune"]
    if settings.distill_loss_weight and settings.teacher == "dense":
        raise VitslimError(
            "--distill-loss-weight needs --teacher: a timm name or a saved folder of a model that "
            "knows the classes of the data."
        )
    if size is not None:
        choices = dataclasses.replace(
            choices, model_kwargs={**choices.model_kwargs, "img_size": size}
        )
    world = open_world(settings.device)
    seed_everything(settings.seed, 0)
    model = open_model(name, choices.pretrained, choices.model_kwargs)
    teacher = None
    if settings.teacher is not None:
        # Its classes are compared when the student has those of the data.
        teacher = open_teacher(settings.teacher, None, world.device, None)
    recipe = record(choices.some(("model", "pretrained", "model_kwargs", "output")), stages)
    with _recorded(output, recipe, world):
        done = finetune(
            model,
            StageContext("finetune", settings, world, output, resume=resume),
            teacher=teacher,
            base=name,
        )
    if world.primary:
        print(f"{output}: accuracy {done.result['after']['accuracy']:.2f} %")


def compress_verb(given: dict[str, Any]) -> None:
    from .workflow.compress import CompressJob, compress

    resume, asked = _resume(given), asked_by(given, "compress")
    choices = asked.choices
    name, output = model_of(choices), _output(choices)
    epochs = int(asked.chosen["retrain"].get("epochs", 0))
    if epochs < 0:
        raise VitslimError(f"--retrain-epochs must be at least 0, not {epochs}.")
    # A stage has one epoch at least; this one is left out.
    chosen = {**asked.chosen, "retrain": {**asked.chosen["retrain"], "epochs": max(epochs, 1)}}
    stages = dataclasses.replace(asked, chosen=chosen).stages("retrain")
    if not choices.budget:
        raise VitslimError("--budget is needed.")
    if "token" not in choices.kinds and any("token" in text for text in choices.budget):
        raise VitslimError("A budget names token: add --kinds attention mlp token.")
    _check_supported(dataclasses.replace(choices, compress=False))
    recipe = record(choices.some(COMPRESSING), stages)
    recipe["retrain"]["epochs"] = epochs
    compress(
        CompressJob(
            output=output,
            budgets=choices.budget,
            settings=stages["retrain"],
            model=name,
            pretrained=choices.pretrained,
            model_kwargs=choices.model_kwargs,
            kinds=choices.kinds,
            plans=choices.plans,
            options=choices.compression,
            retrain=epochs > 0,
            resume=resume,
            given=recipe,
        )
    )


def asked_by(given: dict[str, Any], recipe: str | None = None) -> Asked:
    """Lays the flags over the recipes of -c, and those over the recipe of the verb."""
    return ask(given.pop("config", ()), given, recipe)


def _resume(given: dict[str, Any]) -> bool:
    return given.pop("resume", None) == "auto"


def _output(choices: Choices) -> Path:
    if not choices.output:
        raise VitslimError("--output is needed.")
    return Path(choices.output)


def model_of(choices: Choices) -> str:
    if choices.model is None:
        raise VitslimError(
            "MODEL is needed: a timm name or a saved folder, or a recipe of -c that names one."
        )
    return choices.model


def _check_supported(choices: Choices) -> None:
    """Refuses what cannot be masked or met before weights are fetched or any data is read."""
    from .families import family_of
    from .planning.threshold import check_budget, parse_budget
    from .workflow.models import meta_model
    from .workflow.run import compressed_kinds

    model = meta_model(model_of(choices), choices.model_kwargs)
    family_of(model, "masked").check(model, tuple(choices.kinds), "masked")
    planning = choices.threshold_arguments
    for budget in map(parse_budget, choices.budget):
        check_budget(model, budget, choices.kinds, **planning)
        if choices.compress:
            kinds = compressed_kinds(choices.kinds, "token" in budget)
            check_budget(model, budget, kinds, **planning | {"ranking": "macs"})


@contextmanager
def _recorded(output: Path, recipe: dict[str, Any], world: "World") -> Iterator[None]:
    """Writes args.yaml of a stage: before one that begins, and after one that went on and could."""
    from .workflow.training.state import StageFolder

    if (output / "search").is_dir():
        raise VitslimError(f"{output} is the folder of a whole run: give another --output.")
    text = yaml.safe_dump(recipe, sort_keys=False)
    started = StageFolder(output, {}).started
    if not started and (output / "model.safetensors").exists():
        raise VitslimError(f"{output} holds a model, which would be lost: give another --output.")
    if world.primary and not started:
        atomic_write(output / "args.yaml", text)
    yield
    if world.primary:
        atomic_write(output / "args.yaml", text)


def search_folder(name: str) -> Path:
    """Accepts a search's folder or the run folder around it."""
    folder = Path(name)
    inner = folder / "search"
    return inner if (inner / "masks.safetensors").exists() else folder
