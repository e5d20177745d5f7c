"""Models too large for one GPU: FSDP2, and checkpoints that every process writes its part of.

The parts are safetensors, written and read by torch.distributed.checkpoint; they can be read by
another number of processes than wrote them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ...errors import VitslimError
from ..runtime.world import World


def shard(net: nn.Module, world: World, compiled: bool = False) -> None:
    """Shards a network over all processes in place: each block of its model, then the rest.

    Args:
        net: A timm vision transformer, or a module that holds one.
        world: The processes; torchrun must have started them.
        compiled: Whether to compile each block, which is a graph of its own: between two of them
            parameters are gathered.
    """
    if not dist.is_initialized():
        raise VitslimError("--fsdp shares a model among processes: start them with torchrun.")
    stacks = (getattr(module, "blocks", None) for module in net.modules())
    blocks = [block for stack in stacks if isinstance(stack, nn.Sequential) for block in stack]
    if compiled:
        _compile_each(blocks)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _compile_each(blocks: list[nn.Module]) -> None:
    # torch counts the graphs of a function, and blocks that all differ are many graphs of one; the
    # blocks of an earlier stage would count too. One is enough for each, and one is to spare.
    torch.compiler.reset()
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(blocks))
    for block in blocks:
        # Of a block's own sizes, instead of one graph for the sizes of all.
        block.compile(fullgraph=True, dynamic=False)


class Plain:
    """A whole copy of a model that is about to be sharded, to be filled when one is needed.

    Args:
        model: Not sharded yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copy = copy.deepcopy(model)

    @torch.no_grad()
    def of(self, model: nn.Module) -> nn.Module:
        """Gathers a sharded model's parameters and returns the whole model; all must call it."""
        values = model.state_dict()
        for name, mine in self._copy.state_dict().items():
            mine.copy_(whole(values[name]))
        return self._copy


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that every process has all of; all of them must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Writer(HuggingFaceStorageWriter):
    """Writes this process's parts; what the first process does at the end is part of the writing.

    So all processes learn alike of whatever fails, be it in one of them alone.
    """

    def __init__(self, folder: Path, seal: Callable[[], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._seal = seal

    def finish(self, metadata: Any, results: Any) -> None:
        """Is called in the first process, when the parts of all are on disk."""
        self._seal()


def save_parts(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], seal: Callable[[], None]
) -> Callable[[], None]:
    """Copies this process's parts and has them written in the background.

    Args:
        folder: The same in every process, empty or absent.
        tensors: By group and name, sharded or not.
        seal: Called in the first process, in the background, when the parts of all are on disk.

    Returns:
        A function that waits until all this is done. It raises OSError in every process if a disk
        failed one of them; none of them writes any longer then.
    """
    # A group of its own, so that the writing does not meet the training's messages.
    group = dist.new_group(backend="gloo")
    writing = dcp.async_save(
        _flat(tensors), storage_writer=_Writer(folder, seal), process_group=group
    )

    def wait() -> None:
        try:
            with _plain_errors():
                writing.result()
        finally:
            dist.destroy_process_group(group)

    return wait


def load_parts(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Fills tensors, sharded or not, with what `save_parts` wrote; all processes must call it."""
    with _plain_errors():
        dcp.load(_flat(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))


def empty_slots(
    optimizer: torch.optim.Optimizer, names: Mapping[str, list[int]]
) -> dict[str, Tensor]:
    """Makes the tensors of an optimiser's state, as sharded as its parameters are.

    Args:
        optimizer: Of the model to be loaded.
        names: Shapes by place, `.state.<index of the parameter>.<name>`, as they were packed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[str, Tensor] = {}
    for name, shape in names.items():
        kind, index = name.split(".")[1:3]
        parameter = parameters[int(index)] if kind == "state" else None
        alike = parameter is not None and list(parameter.shape) == shape
        slots[name] = torch.zeros_like(parameter) if alike else torch.zeros(shape)
    return slots


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises what went wrong in some process for what torch wraps it in, which is no Exception."""
    try:
        yield
    except CheckpointException as failed:
        errors = [error for error, _ in failed.failures.values()]
        # A full disk can be lived with, so it must not hide anything else.
        others = [error for error in errors if not isinstance(error, OSError)]
        raise (others or errors)[0] from failed


def _flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {
        f"{group}/{name}": tensor
        for group, content in tensors.items()
        for name, tensor in content.items()
    }
