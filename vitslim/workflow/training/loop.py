"""The loop of a stage: epochs of updates, and checkpoints from which it goes on to the bit."""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn

from ...errors import VitslimError
from ..data.batches import Data, open_data
from ..options.settings import Settings
from ..report.journal import Journal
from .background import Background
from .evaluate import evaluate
from .interrupt import Interrupt, Interrupted, Stopped, resume_command
from .optimise import make_scheduler
from .packing import pack_optimizer, unpack_optimizer
from .penalty import Penalty
from .prepare import prepare
from .sharded import Plain, empty_slots, load_parts, shard
from .state import StageFolder, State
from .update import Updater
from .world import World

After = Callable[[nn.Module, Data, Mapping[str, Any]], None]


class Loop:
    """Model, optimiser, schedule, average and data of one stage.

    Args:
        model: What is trained, on the device already.
        settings: How; the batch size is that of one process.
        folder: Where checkpoints go.
        world: This process among all of them.
        journal: Where it is told.
        penalty: Of a search.
        teacher: A model to imitate, or None.

    Attributes:
        rows: What summary.csv says of every epoch that is done.
        facts: What the stage wants kept with its checkpoints.
        done: Updates made so far.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        folder: StageFolder,
        world: World,
        journal: Journal,
        penalty: Penalty | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.world, self.journal = world, journal
        prepare(model, settings)
        self.average = None
        if settings.model_ema:
            decay, warmup = settings.model_ema_decay, settings.model_ema_warmup
            self.average = ModelEmaV3(model, decay, use_warmup=warmup)
        self.plain = Plain(model) if settings.fsdp else None
        self.data = open_data(settings, model, world)
        self.update = Updater(model, settings, world, self.data.num_classes, penalty, teacher)
        if (taught := self.update.distillation) is not None and taught.teacher.note:
            journal.say(taught.teacher.note)
        if self.average is not None and settings.fsdp:
            shard(self.average.module, world)
        self.updates = self.data.steps // settings.grad_accum_steps
        if not self.updates:
            raise VitslimError(
                f"An epoch has {self.data.steps} batches, fewer than the "
                f"{settings.grad_accum_steps} of one update: lower --grad-accum-steps."
            )
        self.scheduler = make_scheduler(self.update.optimizer, settings, self.updates)
        self.background = Background(self._not_written)
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.done = 0
        self.written = True
        # Of the epoch that is going on: summed over the images of this process, and the last one.
        self.loss = self.images = self.seconds = self.penalty = 0.0

    def result(self) -> nn.Module:
        """Returns the model of the stage, whole: the averaged one where there is one."""
        model = self.model if self.average is None else self.average.module
        return model if self.plain is None else self.plain.of(model)

    def at(self, epoch: int) -> nn.Module | None:
        """Returns the model as it was after an epoch, None if that checkpoint is gone.

        A model that is sharded is overwritten with it, so ask for the result first.
        """
        state = self.folder.at(epoch * self.updates)
        if self.world.any(state is None) or state is None or state.folder is None:
            return None
        name = "model" if self.average is None else "ema"
        model = copy.deepcopy(self.result())
        if self.settings.fsdp:
            module = self._modules()[name]
            load_parts(state.folder, {name: module.state_dict()})
            return Plain(model).of(module)
        model.load_state_dict(state.tensors[name])
        return model

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
        self.update.begin_epoch(epoch)
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
        told = self.update(batches, self.done, epoch + step / self.updates, where)
        if self.average is not None:
            # timm counts the update just made.
            self.average.update(self.model, self.done + 1)
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
        result = self.result()
        accuracy = evaluate(result, self.data, self.world, self.settings)
        loss, seen = self.world.total([self.loss, self.images])
        row = {
            "stage": self.journal.stage,
            "epoch": self.done // self.updates,
            "loss": loss / seen,
            "penalty": self.penalty,
            "accuracy": accuracy,
            "lr": self.update.optimizer.param_groups[0]["lr"],
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
        slots, plain = pack_optimizer(self.update.optimizer)
        tensors = {name: module.state_dict() for name, module in self._modules().items()}
        tensors["optimizer"] = slots
        facts = {
            "rows": self.rows,
            "facts": self.facts,
            "optimizer": plain,
            "slots": {name: list(slot.shape) for name, slot in slots.items()},
            "updater": self.update.state(),
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

    def _modules(self) -> dict[str, nn.Module]:
        """Returns everything that is trained, by the name of its file."""
        averaged = {} if self.average is None else {"ema": self.average.module}
        return {"model": self.model, **averaged, **self.update.modules()}

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
        optimizer, modules = self.update.optimizer, self._modules()
        try:
            if self.settings.fsdp and state.folder is not None:
                slots = empty_slots(optimizer, facts["slots"])
                content = {name: module.state_dict() for name, module in modules.items()}
                load_parts(state.folder, {**content, "optimizer": slots})
            else:
                slots = state.tensors["optimizer"]
                for name, module in modules.items():
                    module.load_state_dict(state.tensors[name])
            unpack_optimizer(optimizer, slots, facts["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise VitslimError(
                "The saved state is of another model: start again with another --output "
                f"({str(error).splitlines()[0]})."
            ) from error
        self.update.load(facts["updater"])
        self.done, self.rows, self.facts = state.update, facts["rows"], facts["facts"]
        loss, images, self.seconds, self.penalty = facts["epoch"]
        # The sums are those of all processes; one of them carries on with them.
        if self.world.primary:
            self.loss, self.images = loss, images
