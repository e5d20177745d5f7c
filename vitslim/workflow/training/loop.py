"""The loop of a stage: epochs of updates, and checkpoints from which it goes on to the bit."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from torch import nn

from ...errors import VitslimError
from ..data.batches import Data, open_data
from ..evaluate import evaluate
from ..runtime.context import StageContext
from ..runtime.interrupt import Interrupt, Interrupted, Stopped, resume_command
from .background import Background
from .learner import Learner
from .optimise import make_scheduler
from .penalty import Penalty
from .state import StageFolder, State

After = Callable[[nn.Module, Data, Mapping[str, Any]], None]


class Loop:
    """A model, its data and schedule, and how far it is.

    Args:
        model: What is trained, on the device already.
        context: How, and where it is told.
        folder: Where checkpoints go.
        penalty: Penalty of a search.
        teacher: A model to imitate, or None.

    Attributes:
        learner: The model, its average and what updates them.
        rows: What summary.csv says of every epoch that is done.
        facts: What the stage wants kept with its checkpoints.
        done: Updates made so far.
    """

    def __init__(
        self,
        model: nn.Module,
        context: StageContext,
        folder: StageFolder,
        penalty: Penalty | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        settings, world = context.settings, context.world
        self.settings, self.world, self.journal = settings, world, context.journal
        self.folder = folder
        self.data = open_data(settings, model, world)
        self.learner = Learner(model, context, self.data.num_classes, penalty, teacher)
        if (taught := self.learner.update.distillation) is not None and taught.teacher.note:
            self.journal.say(taught.teacher.note)
        self.updates = self.data.steps // settings.grad_accum_steps
        if not self.updates:
            raise VitslimError(
                f"An epoch has {self.data.steps} batches, fewer than the "
                f"{settings.grad_accum_steps} of one update: lower --grad-accum-steps."
            )
        optimizer = self.learner.update.optimizer
        self.scheduler = make_scheduler(optimizer, settings, self.updates)
        self.background = Background(self._not_written)
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.done = 0
        self.written = True
        # Running sums of this epoch over the images of this process; the penalty is the last one.
        self.loss = self.images = self.seconds = self.penalty = 0.0

    def at(self, epoch: int) -> nn.Module | None:
        """Returns the model as it was after an epoch, None if that checkpoint is gone."""
        return self.learner.at(self.folder.at(epoch * self.updates))

    def run(self, after: After | None = None) -> None:
        """Trains to the end, or until it is interrupted.

        Args:
            after: Called after every epoch with the result so far, the data, and its row.

        Raises:
            Stopped: SIGTERM or SIGINT came; the update was finished and saved.
        """
        total = self.settings.epochs * self.updates
        with Interrupt() as interrupt, self.journal.bar(self.done, total) as bar:
            try:
                while self.done < total or not self._evaluated:
                    if self._evaluated:
                        self._epoch(bar, interrupt)
                    with suppress(Interrupted):
                        self._end_epoch(after)
                    self._heed(interrupt, saved=self._evaluated)
            finally:
                self.background.wait()

    @property
    def _evaluated(self) -> bool:
        """Whether nothing is left to be done of the epochs whose updates are all made."""
        return len(self.rows) == self.done // self.updates

    def _epoch(self, bar: Any, interrupt: Interrupt) -> None:
        """Makes the updates that are left of an epoch."""
        epoch, first = divmod(self.done, self.updates)
        size, every = self.settings.grad_accum_steps, self.settings.checkpoint_steps
        images = self.settings.images_per_update(self.world.size)
        began = time.perf_counter() - self.seconds
        self.learner.update.begin_epoch(epoch)
        batches = self.data.epoch(epoch, first * size)
        for step in range(first, self.updates):
            self._update(list(islice(batches, size)), epoch, step)
            self.seconds = time.perf_counter() - began
            bar.update()
            mean = self.loss / self.images
            self.journal.show(bar, loss=mean, penalty=self.penalty, images=images)
            if step + 1 < self.updates:
                self._heed(interrupt, saved=False)
                if every and self.done % every == 0:
                    self._save()

    def _update(self, batches: list[Any], epoch: int, step: int) -> None:
        if not batches:
            raise VitslimError(
                f"The training data ended after {step} of {self.updates} updates of the epoch: "
                "give the true number of images with --train-num-samples."
            )
        if self.scheduler is not None:
            self.scheduler.step_update(self.done)
        where = f"epoch {epoch + 1}, step {step + 1}"
        told = self.learner.step(batches, self.done, epoch + step / self.updates, where)
        images = sum(len(target) for _, target in batches)
        self.loss += told.loss * images
        self.images += images
        self.penalty = told.penalty
        self.done += 1

    def _end_epoch(self, after: After | None) -> None:
        """Evaluates; an interruption leaves everything as it was after the epoch's last update."""
        began = time.perf_counter()
        # Evaluation may fork workers, which is safe with one thread only.
        self.background.wait()
        result = self.learner.result()
        accuracy = evaluate(result, self.data, self.world, self.settings)
        loss, seen = self.world.total([self.loss, self.images])
        row = {
            "stage": self.journal.stage,
            "epoch": self.done // self.updates,
            "loss": loss / seen,
            "penalty": self.penalty,
            "accuracy": accuracy,
            "lr": self._rate(),
            "images_per_second": seen / self.seconds,
            "seconds": self.seconds + time.perf_counter() - began,
        }
        rows = [*self.rows, row]
        self.journal.row(rows, self.settings.epochs)
        # Before the checkpoint: whatever a kill leaves out here is done again with the epoch.
        if after is not None:
            after(result, self.data, row)
        self.rows = rows
        self.loss = self.images = self.seconds = 0.0
        self._save(accuracy)

    def _rate(self) -> float:
        """Returns the learning rate of the weights, before it is scaled by layer."""
        group = self.learner.update.optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))

    def _heed(self, interrupt: Interrupt, saved: bool) -> None:
        """Saves and stops, if any process was asked to."""
        if not self.world.any(interrupt.asked):
            return
        if not saved:
            self._save()
        self.background.wait()
        after = f"stopped after update {self.done} of {self.settings.epochs * self.updates}"
        # Unsharded, one process writes for all; whatever it came to, all end alike.
        if self.world.any(not self.written):
            raise VitslimError(
                f"{after}, which could not be saved; the checkpoints before it are kept: make room "
                f"on the disk and go on with\n  {resume_command()}"
            )
        raise Stopped(
            f"{after}, which is saved in {self.folder.path}; go on with\n  {resume_command()}"
        )

    def _save(self, accuracy: float | None = None) -> None:
        """Takes a copy of everything needed to go on, and has it written in the background."""
        loss, images = self.world.total([self.loss, self.images])
        tensors, learnt = self.learner.pack()
        facts = {
            **learnt,
            "rows": self.rows,
            "facts": self.facts,
            "updates_per_epoch": self.updates,
            "epoch": [loss, images, self.seconds, self.penalty],
        }
        state = State(self.done, tensors, facts, accuracy)
        self.background.wait()
        self.written = True
        if self.settings.fsdp:
            self.background.submit(self.folder.parts_writer(state, self.world))
        elif self.world.primary:
            self.background.submit(self.folder.writer(state))

    def _not_written(self, error: OSError) -> None:
        self.written = False
        self.journal.say(
            f"a checkpoint could not be written ({error.strerror or error}); training goes on, the "
            "checkpoints before it are kept, and the next one is tried: make room on the disk."
        )

    def load(self, state: State) -> None:
        """Goes back to a saved state."""
        facts = state.facts
        if facts["updates_per_epoch"] != self.updates:
            raise VitslimError(
                f"The training data has changed: an epoch had {facts['updates_per_epoch']} updates "
                f"and has {self.updates}; bring the data back, or start with another --output."
            )
        self.learner.unpack(state)
        self.done, self.rows, self.facts = state.update, facts["rows"], facts["facts"]
        loss, images, self.seconds, self.penalty = facts["epoch"]
        # The sums are those of all processes; one of them carries on with them.
        if self.world.primary:
            self.loss, self.images = loss, images
