"""A dense model cut to budgets without training, one after another, and trained on if asked."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import load, save
from ..cost import cost
from ..errors import VitslimError
from ..oneshot import Prepared, prepare
from ..plan import Plan
from .data.batches import open_data
from .data.calibration import calibration, folder_without_labels
from .evaluate import evaluate_at_rest
from .finetune import train_on
from .latency_budget import plan_for
from .models import open_plan
from .options.choices import CompressOptions, PlanOptions
from .options.settings import OF_THE_RUN, Settings
from .runtime.context import StageContext
from .runtime.journal import Journal
from .runtime.seeds import seed_everything
from .runtime.world import World
from .training.state import StageFolder


def evaluated_like(settings: Settings, world: World) -> dict[str, Any]:
    """Returns the settings that an accuracy depends on, and the choice of images to look at."""
    names = {*OF_THE_RUN, "crop_pct", "amp", "amp_dtype"}
    binding = settings.binding(world.size)
    return {name: value for name, value in binding.items() if name in names}


def accuracy_at_rest(model: nn.Module, settings: Settings, world: World) -> float | None:
    """Returns the accuracy of a model that is not being trained; None where there are no labels."""
    if folder_without_labels(settings) is not None:
        return None
    with closing(open_data(settings, model, world)) as data:
        return evaluate_at_rest(model.to(world.device), data, world, settings)


@dataclasses.dataclass
class Cutting:
    """A dense model on its way to any number of budgets.

        plans/NAME.json  slim/NAME/         what was kept, and the model, refitted or retrained
        cut/NAME/  retrain/NAME/            results, and checkpoints of the retraining

    What is done already is read from there. The model is looked at once, when that is needed.

    Attributes:
        dense: The model; it stays as it is.
        base: Which model it is, for the record.
        output: The folder of all these.
        settings: Of the images, and of the retraining.
        world: The processes that share the work.
        kinds: What may be cut.
        plans: How plans are made.
        options: How the model is looked at and refitted.
    """

    dense: nn.Module
    base: str
    output: Path
    settings: Settings
    world: World
    kinds: tuple[str, ...]
    plans: PlanOptions
    options: CompressOptions

    def __post_init__(self) -> None:
        self.journal = Journal("cut", None, quiet=not self.world.primary)

    def all(self, budgets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Cuts to every budget and returns what summary.json says of each slim model."""
        # All plans before the first cut: one may be out of reach.
        for name, budget in budgets.items():
            if self._stage(name).result() is None:
                self._plan(name, budget)
        return list(self._entries(budgets))

    def _entries(self, budgets: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for name, budget in budgets.items():
            result = self._cut(name)
            yield {
                "name": name,
                "budget": budget,
                "method": "compressed",
                "plan": f"plans/{name}.json",
                "folder": f"slim/{name}",
                **{key: result[key] for key in ("cut", "params", "macs", "images")},
            }

    def retrain(
        self, name: str, stage: str, run_folder: Path, teacher: nn.Module | None
    ) -> dict[str, Any]:
        """Trains a slim model on, which is then the one in slim/NAME.

        Args:
            name: Of its budget.
            stage: What it is called in summary.csv.
            run_folder: Where that is.
            teacher: A model to imitate.
        """
        slim, folder = self.output / "slim" / name, self.output / "retrain" / name
        context = StageContext(stage, self.settings, self.world, folder, run_folder, resume=True)
        identity = {**self._identity, "plan": _digest(open_plan(self._path(name)))}
        names = ("cut", "retrained")
        build = lambda: load(slim)  # noqa: E731
        return train_on(build, context, identity, names, teacher=teacher, output=slim).result

    @cached_property
    def images(self) -> Any:
        """What is looked at: (images, labels), or images alone."""
        found = calibration(self.settings, self.dense, self.world, self.options.calibration_images)
        labels = "with labels" if found.labels is not None else "without labels"
        self.journal.say(f"looking at {len(found.images)} images {labels}")
        return found.images if found.labels is None else tuple(found)

    @cached_property
    def prepared(self) -> Prepared:
        """The model, rotated and scored."""
        images = self.images
        began = time.perf_counter()
        prepared = prepare(
            self.dense.to(self.world.device).eval(),
            images,
            criterion=self.options.criterion,
            kinds=self.kinds,
            rotation=self.options.rotate,
            refitted=self.options.refit,
            seed=self.settings.seed,
            quiet=not self.world.primary,
        )
        path = self.output / "scores.safetensors"
        if self.world.primary and ("token" in self.kinds or not path.exists()):
            prepared.scores.save(path)
        took = time.perf_counter() - began
        how = "rotated and scored" if self.options.rotate else "scored"
        self.journal.say(f"{self.base} {how} in {took:.1f} s")
        return prepared

    def _plan(self, name: str, budget: Mapping[str, Any]) -> None:
        options = {n: getattr(self.plans, n) for n in ("round_to", "floor", "ranking")}
        if "latency" in budget:
            model, scores = self.prepared.model, self.prepared.scores
            plan = plan_for(model, budget, scores, **options) if self.world.primary else None
        else:
            plan = self.prepared.plan(budget, **options)
        if plan is not None and self.world.primary:
            plan.save(self._path(name))
        self.world.wait()

    def _cut(self, name: str) -> dict[str, Any]:
        """Cuts to a plan and evaluates, or reads what that came to."""
        stage = self._stage(name)
        if (done := stage.result()) is not None:
            return done
        prepared, began = self.prepared, time.perf_counter()
        seed_everything(self.settings.seed, 0)
        slim = prepared.cut(open_plan(self._path(name))).eval()
        took = time.perf_counter() - began
        accuracy = accuracy_at_rest(slim, self.settings, self.world)
        told = "" if accuracy is None else f", accuracy {accuracy:.2f} %"
        self.journal.say(f"{name} cut and refitted in {took:.1f} s{told}")
        if self.world.primary:
            params, macs = cost(slim)
            seconds, images = time.perf_counter() - began, len(_images(self.images))
            save(slim, self.output / "slim" / name, ignore_hooks=True)
            result = {"cut": {"accuracy": accuracy}, "params": params, "macs": macs}
            stage.finish({**result, "images": images, "seconds": seconds})
        self.world.wait()
        return stage.read_result()

    def _path(self, name: str) -> Path:
        return self.output / "plans" / f"{name}.json"

    def _stage(self, name: str) -> StageFolder:
        args = {**evaluated_like(self.settings, self.world), **self._identity}
        return StageFolder(self.output / "cut" / name, args)

    @property
    def _identity(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.options)
        del options["compress"]
        plans = {n: getattr(self.plans, n) for n in ("round_to", "floor", "ranking")}
        return {"model": self.base, "kinds": self.kinds, **plans, **options}


def _images(data: Any) -> Any:
    return data[0] if isinstance(data, tuple) else data


def _digest(plan: Plan) -> str:
    return hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]


def refuse_without_labels(settings: Settings) -> None:
    """Raises VitslimError where images are in no classes, so that nothing learns from them."""
    if folder_without_labels(settings) is not None:
        raise VitslimError(
            f"{settings.data} has no labels to retrain with: leave --retrain-epochs out, or give "
            "PATH/train and PATH/val with one folder of images per class."
        )
