"""Everything that training changes: a model, the moving average of it, and what updates them."""

import copy
from collections.abc import Mapping
from typing import Any

from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ...errors import VitslimError
from ..runtime.context import StageContext
from .packing import pack_optimizer, unpack_optimizer
from .penalty import Penalty
from .prepare import prepare
from .sharded import Plain, empty_slots, load_parts, shard
from .state import State
from .update import Batches, Told, Updater


class Learner:
    """What is trained, and how it is taken to a checkpoint and back.

    Args:
        model: What is trained, on the device already.
        context: How.
        num_classes: How many classes the data has.
        penalty: Penalty of a search.
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
        self.model, self.world, self.sharded = model, world, settings.fsdp
        prepare(model, settings)
        self.average = None
        if settings.model_ema:
            decay, warmup = settings.model_ema_decay, settings.model_ema_warmup
            self.average = ModelEmaV3(model, decay, use_warmup=warmup)
        self.plain = Plain(model) if self.sharded else None
        self.update = Updater(model, context, num_classes, penalty, teacher)
        if self.average is not None and self.sharded:
            shard(self.average.module, world)

    def step(self, batches: Batches, done: int, progress: float, where: str) -> Told:
        """Makes an update of the model, and of its average; arguments are those of `Updater`."""
        told = self.update(batches, done, progress, where)
        if self.average is not None:
            # timm counts the update just made.
            self.average.update(self.model, done + 1)
        return told

    def result(self) -> nn.Module:
        """Returns the model, whole: the averaged one where there is one."""
        model = self.model if self.average is None else self.average.module
        return model if self.plain is None else self.plain.of(model)

    def pack(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Returns everything needed to go on: tensors by the name of their file, and JSON."""
        slots, plain = pack_optimizer(self.update.optimizer)
        tensors = {name: module.state_dict() for name, module in self._modules().items()}
        shapes = {name: list(slot.shape) for name, slot in slots.items()}
        facts = {"optimizer": plain, "slots": shapes, "updater": self.update.state()}
        return {**tensors, "optimizer": slots}, facts

    def unpack(self, state: State) -> None:
        """Takes back what `pack` gave.

        Raises:
            VitslimError: It is of another model.
        """
        facts, optimizer, modules = state.facts, self.update.optimizer, self._modules()
        try:
            if self.sharded and state.folder is not None:
                slots: Mapping[str, Tensor] = empty_slots(optimizer, facts["slots"])
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

    def at(self, state: State | None) -> nn.Module | None:
        """Returns the model of a checkpoint, whole; None where a process has none.

        A model that is sharded is overwritten with it, so ask for the result first.
        """
        if self.world.any(state is None) or state is None or state.folder is None:
            return None
        name = "model" if self.average is None else "ema"
        model = copy.deepcopy(self.result())
        if self.sharded:
            module = self._modules()[name]
            load_parts(state.folder, {name: module.state_dict()})
            return Plain(model).of(module)
        model.load_state_dict(state.tensors[name])
        return model

    def _modules(self) -> dict[str, nn.Module]:
        """Returns everything that is trained, by the name of its file."""
        averaged = {} if self.average is None else {"ema": self.average.module}
        return {"model": self.model, **averaged, **self.update.modules()}
