"""One update of the weights: batches, loss, penalty, gradient, clipping, step."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ...errors import VitslimError
from ..evaluate import autocast
from ..runtime.context import StageContext
from ..runtime.seeds import seed_everything
from .diagnosis import first_non_finite
from .distill import Distillation
from .optimise import make_mixup, make_optimizer
from .penalty import Penalty
from .prepare import classifier
from .sharded import shard, whole

Batches = Sequence[tuple[Tensor, Tensor]]


class Told(NamedTuple):
    """What an update tells: the mean loss without the penalty, and the penalty."""

    loss: float
    penalty: float


class Updater:
    """Everything that changes weights, and the one place where they change.

    Args:
        model: What is trained.
        context: How.
        num_classes: How many classes the data has.
        penalty: What is added for the masks; None trains without.
        teacher: A model to imitate, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        context: StageContext,
        num_classes: int,
        penalty: Penalty | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        settings, world = context.settings, context.world
        self.model, self.settings, self.world, self.penalty = model, settings, world, penalty
        net: nn.Module = model
        self.distillation = None
        if teacher is not None:
            net = self.distillation = Distillation(model, teacher.to(world.device), settings)
        self.trained = net.to(world.device)
        if settings.fsdp:
            shard(net, world, settings.compile)
        elif settings.compile:
            # Graphs of earlier stages count towards torch's limit for a function.
            torch.compiler.reset()
            net.compile(fullgraph=True)
        self.optimizer = make_optimizer(net, settings, settings.images_per_update(world.size))
        if penalty is not None:
            penalty.follow(model, self.optimizer)
        self.net = world.wrap(net)
        scaled = settings.amp and settings.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self.mixup = make_mixup(settings, num_classes)
        self.criterion: nn.Module = (
            SoftTargetCrossEntropy()
            if self.mixup
            else LabelSmoothingCrossEntropy(settings.smoothing)
        )

    def begin_epoch(self, epoch: int) -> None:
        """Goes to training mode; from some epoch on, batches may no longer be mixed."""
        self.net.train()
        if self.settings.freeze:
            # What is frozen neither drops anything nor gathers statistics.
            self.model.eval()
        if self.mixup is not None and 0 < self.settings.mixup_off_epoch <= epoch:
            self.mixup.mixup_enabled = False

    def __call__(self, batches: Batches, update: int, progress: float, where: str) -> Told:
        """Makes one update.

        Args:
            batches: The images and targets of this process, of equal sizes.
            update: How many were made before.
            progress: Epochs done, with fractions.
            where: Says which update this is, for an error.

        Raises:
            VitslimError: The loss or the gradient is not finite; the weights stay as they were.
        """
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.world.device)
        cost = None
        for number, (images, target) in enumerate(batches):
            # Mixup and stochastic depth draw for a batch, whichever process makes it.
            batch = number * self.world.size + self.world.rank
            seed_everything(self.settings.seed, update, batch)
            last = number == len(batches) - 1
            # Gradients of the processes are averaged once, with the last batch.
            with nullcontext() if last else self.world.apart(self.net):
                part = self._loss(images, target) / len(batches)
                loss = loss + part.detach()
                if last and self.penalty is not None:
                    cost = self.penalty(self.model, progress)
                    if self.penalty.in_loss:
                        part = part + cost
                self.scaler.scale(part).backward()
        told, clipped = self._step(loss, cost, batches[-1][0], where)
        if self.penalty is not None and clipped is not None:
            self.penalty.after_step(progress, clipped)
        return told

    def _loss(self, images: Tensor, target: Tensor) -> Tensor:
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        with autocast(self.world, self.settings):
            out = self.net(images)
        if self.distillation is None:
            return self.criterion(out.float(), target)
        with autocast(self.world, self.settings):
            imitation = self.distillation.imitation(images, out)
        labels = self.criterion(out.logits.float(), target)
        settings = self.settings
        return settings.task_loss_weight * labels + settings.distill_loss_weight * imitation

    def _step(
        self, loss: Tensor, cost: Tensor | None, images: Tensor, where: str
    ) -> tuple[Told, float | None]:
        """Checks, clips and steps; the device is waited for once.

        Returns:
            What there is to tell, and what clipping left of the gradient; None without a step.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.trained.parameters() if p.grad is not None]
        norm = whole(get_total_norm([p.grad for p in parameters]))
        penalty = loss.new_zeros(()) if cost is None else cost.detach()
        value, paid, length = torch.stack([loss, penalty, norm.to(loss.device)]).tolist()
        # A gradient too large for float16 is the scaler's business: it leaves this update out. The
        # scaler enlarges gradients, so at 1, its scale when there is none, it is not to blame.
        finite = math.isfinite(length) or self.scaler.get_scale() > 1
        if not (math.isfinite(value + paid) and finite):
            self._stop("loss" if not math.isfinite(value + paid) else "gradient", images, where)
        clip, mode = self.settings.clip_grad, self.settings.clip_mode
        if clip is not None and mode == "norm":
            clip_grads_with_norm_(parameters, clip, norm)
        elif clip is not None:
            # Adaptive clipping is for all but the classifier, as its paper says.
            exempt = classifier(self.model) if mode == "agc" else set()
            dispatch_clip_grad([p for p in parameters if p not in exempt], clip, mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        told = Told(value, paid)
        if not math.isfinite(length):
            return told, None
        by_norm = clip is not None and mode == "norm" and length > clip
        return told, clip / length if by_norm else 1.0

    def _stop(self, what: str, images: Tensor, where: str) -> None:
        # A compiled graph has no place for what looks at every layer.
        with torch.compiler.set_stance("force_eager"), autocast(self.world, self.settings):
            layer = first_non_finite(self.trained, images, backward=what == "gradient")
        raise VitslimError(
            f"The {what} is not finite in {where}, first in {layer}: "
            "lower --lr, set --clip-grad, or look at the data; the last checkpoint is kept."
        )

    def modules(self) -> dict[str, nn.Module]:
        """What is trained beside the model, by name."""
        distillation = self.distillation
        if distillation is None or not any(distillation.projection.parameters()):
            return {}
        return {"projection": distillation.projection}

    def state(self) -> dict[str, Any]:
        """What an update needs beside the weights and the optimiser; JSON."""
        return {"scaler": self.scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
