"""The one epoch loop that dense training, search and retraining share."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..errors import VitslimError
from ..masks import mask_parameters
from .data import Data, open_data
from .diagnosis import first_non_finite
from .journal import Journal
from .settings import Settings
from .state import StageFolder, State, pack_optimizer, unpack_optimizer
from .world import World, cpu_threads, seed_everything

Penalty = Callable[[nn.Module], Tensor]


@dataclasses.dataclass
class Outcome:
    """What a stage came to: the trained model, accuracy in percent, seconds of training."""

    model: nn.Module
    accuracy: float
    seconds: float
    facts: dict[str, Any]


def train(
    model: nn.Module,
    settings: Settings,
    folder: StageFolder,
    world: World,
    journal: Journal,
    *,
    penalty: Penalty | None = None,
    teacher: nn.Module | None = None,
    before: Callable[[nn.Module, Data], dict[str, Any]] | None = None,
) -> Outcome:
    """Trains a model in place, or goes on from the newest state in the folder.

    Args:
        model: What to train; with a state in the folder, only its shapes matter.
        settings: How.
        folder: Where the state of every epoch goes.
        world: This process among all of them.
        journal: Where it is told.
        penalty: Added to the loss once per step, in float32, the same in every process.
        teacher: A model to imitate, weighted by `settings.distill_loss_weight`.
        before: Called once before the first epoch; what it returns is kept with the state.

    Raises:
        VitslimError: The loss or a gradient is not finite; the last state stays as it was.
    """
    loop = _Loop(model.to(world.device), settings, world, penalty, teacher)
    rows: list[dict[str, Any]] = []
    state, trouble = folder.latest()
    if trouble:
        journal.say(f"{trouble}; going on from the state before it.")
    if state is None:
        with cpu_threads(settings.threads):
            facts = before(model, loop.data) if before else {}
        start = 0
    else:
        loop.load(state)
        start, rows, facts = state.epoch, state.facts["rows"], state.facts["facts"]
        journal.say(f"going on after epoch {start} of {settings.epochs}.")
        journal.record(rows)
    done, total = start * loop.data.steps, settings.epochs * loop.data.steps
    with cpu_threads(settings.threads), journal.bar(done, total) as bar:
        for epoch in range(start, settings.epochs):
            row = loop.epoch(epoch, bar)
            rows.append({"stage": journal.stage, **row})
            if world.primary:
                folder.save(loop.state(epoch + 1, {"rows": rows, "facts": facts}))
            journal.row(rows, settings.epochs)
    world.wait()
    seconds = sum(row["seconds"] for row in rows)
    return Outcome(loop.result(), rows[-1]["accuracy"], seconds, facts)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, world: World, amp: bool = False) -> float:
    """Returns top-1 accuracy in percent over the held-out images, each counted once."""
    was_training = model.training
    model.eval()
    right = seen = 0.0
    for images, target in data.held_out():
        with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
            logits = model(images)
        right += float((logits.argmax(1) == target).sum())
        seen += len(target)
    model.train(was_training)
    right, seen = world.total([right, seen])
    return 100 * right / seen


class _Loop:
    """Model, optimiser, schedule, average and data of one stage, and one epoch of it."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        world: World,
        penalty: Penalty | None,
        teacher: nn.Module | None,
    ) -> None:
        self.model, self.settings, self.world, self.penalty = model, settings, world, penalty
        self.teacher = teacher.to(world.device).eval() if teacher is not None else None
        self.data = open_data(settings, model, world)
        self.net = world.wrap(model)
        self.optimizer = _optimizer(model, settings, world)
        self.scheduler = _scheduler(self.optimizer, settings, self.data.steps)
        self.average = ModelEmaV3(model, settings.model_ema_decay) if settings.model_ema else None
        self.mixup = _mixup(settings, self.data.num_classes)
        self.criterion: nn.Module = (
            SoftTargetCrossEntropy()
            if self.mixup
            else LabelSmoothingCrossEntropy(settings.smoothing)
        )

    def result(self) -> nn.Module:
        """The model of the stage: the averaged one where there is one."""
        return self.model if self.average is None else self.average.module

    def epoch(self, epoch: int, bar: Any) -> dict[str, Any]:
        """Trains one epoch and evaluates; returns the row that tells of it."""
        began = time.perf_counter()
        seed_everything(self.settings.seed, epoch, self.world.rank)
        self.net.train()
        losses, penalty, images_seen = AverageMeter(), 0.0, 0
        for step, (images, target) in enumerate(self.data.epoch(epoch)):
            update = epoch * self.data.steps + step
            if self.scheduler is not None:
                self.scheduler.step_update(update)
            loss, penalty = self._step(images, target, epoch, step)
            if self.average is not None:
                self.average.update(self.model, update)
            losses.update(loss, len(images))
            images_seen += len(images)
            bar.update()
            bar.set_postfix(loss=f"{losses.avg:.3f}", refresh=False)
        trained = time.perf_counter() - began
        accuracy = evaluate(self.result(), self.data, self.world, self.settings.amp)
        total, seen = self.world.total([losses.sum, images_seen])
        return {
            "epoch": epoch + 1,
            "loss": total / seen,
            "penalty": penalty,
            "accuracy": accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": seen / trained,
            "seconds": time.perf_counter() - began,
        }

    def _step(self, images: Tensor, target: Tensor, epoch: int, step: int) -> tuple[float, float]:
        """One step; returns the loss without the penalty, and the penalty."""
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.amp):
            logits = self.net(images)
        logits = logits.float()
        loss = self.criterion(logits, target)
        if self.teacher is not None:
            loss = loss + self.settings.distill_loss_weight * self._imitation(images, logits)
        total, penalty = loss, 0.0
        if self.penalty is not None:
            cost = self.penalty(self.model)
            total, penalty = loss + cost, float(cost.detach())
        value = float(loss.detach())
        self.optimizer.zero_grad()
        if not math.isfinite(value + penalty):
            self._stop("loss", images, epoch, step)
        total.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            self._stop("gradient", images, epoch, step)
        if self.settings.clip_grad is not None:
            clip_grads_with_norm_(self.model.parameters(), self.settings.clip_grad, norm)
        self.optimizer.step()
        return value, penalty

    def _imitation(self, images: Tensor, logits: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(images).float(), dim=1)
        return F.kl_div(logits.log_softmax(1), wanted, reduction="batchmean", log_target=True)

    def _stop(self, what: str, images: Tensor, epoch: int, step: int) -> None:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.amp):
            where = first_non_finite(self.model, images)
        raise VitslimError(
            f"The {what} is not finite in epoch {epoch + 1}, step {step + 1}, first in {where}: "
            "lower --lr, set --clip-grad, or look at the data; the last state is kept."
        )

    def state(self, epoch: int, facts: Mapping[str, Any]) -> State:
        """Everything needed to go on after an epoch."""
        slots, plain = pack_optimizer(self.optimizer)
        tensors = {"model": self.model.state_dict(), "optimizer": slots}
        if self.average is not None:
            tensors["ema"] = self.average.module.state_dict()
        return State(epoch, tensors, {**facts, "optimizer": plain})

    def load(self, state: State) -> None:
        """Goes back to a saved state."""
        try:
            self.model.load_state_dict(state.tensors["model"])
            if self.average is not None:
                self.average.module.load_state_dict(state.tensors["ema"])
            unpack_optimizer(self.optimizer, state.tensors["optimizer"], state.facts["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise VitslimError(
                "The saved state is of another model: start again with another --output "
                f"({str(error).splitlines()[0]})."
            ) from error


def _optimizer(model: nn.Module, settings: Settings, world: World) -> torch.optim.Optimizer:
    lr = settings.lr
    if lr is None:
        lr = settings.lr_base * settings.batch_size * world.size / 512
    groups = param_groups_weight_decay(
        model, settings.weight_decay, no_weight_decay_list=_undecayed(model)
    )
    masks = {id(parameter) for _, parameter in mask_parameters(model)}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in masks]
    if masks:
        # Not `lr_scale`, which timm's schedules would apply on top of the rate they start from.
        groups.append(
            {
                "params": [p for _, p in mask_parameters(model)],
                "weight_decay": 0.0,
                "lr": lr * settings.mask_lr_scale,
            }
        )
    try:
        return create_optimizer_v2(groups, settings.opt, lr=lr)
    except (AssertionError, ValueError, KeyError) as error:
        raise VitslimError(f"timm has no optimiser {settings.opt!r}.") from error


def _undecayed(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "no_weight_decay", None)
    return tuple(names()) if callable(names) else ()


def _scheduler(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> Any:
    if settings.sched == "none":
        return None
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.warmup_lr,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except ValueError:
        scheduler = None
    # Older timm answers None for a name it does not know.
    if scheduler is None or settings.sched == "plateau":
        raise VitslimError(f"There is no schedule {settings.sched!r}: use cosine, step or none.")
    return scheduler


def _mixup(settings: Settings, num_classes: int) -> Mixup | None:
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        settings.mixup,
        settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )


def stage_args(settings: Settings, world: World, **more: Any) -> dict[str, Any]:
    """What must not change when a stage goes on: its settings, the processes, and `more`."""
    chosen = dataclasses.asdict(settings)
    for name in ("device", "data_dir"):
        chosen.pop(name)
    return {**chosen, "processes": world.size, **more}


def journal_for(stage: str, folder: Path | None, world: World) -> Journal:
    """Makes the journal of a stage that writes into `folder`/summary.csv."""
    summary = None if folder is None else folder / "summary.csv"
    return Journal(stage, summary, quiet=not world.primary)
