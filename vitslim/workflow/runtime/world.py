"""The processes that share a run, one or many; torchrun's environment says how many."""

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ...errors import VitslimError


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all of them, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def primary(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wraps the model so that gradients are averaged over processes; alone, does nothing."""
        if self.size == 1 or isinstance(model, FSDPModule):
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # Buffers are constants: what a slim layer has kept, and how it weighs tokens.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    @contextmanager
    def apart(self, net: nn.Module) -> Iterator[None]:
        """Lets gradients of a wrapped model pile up here, without averaging them yet."""
        if isinstance(net, nn.parallel.DistributedDataParallel):
            with net.no_sync():
                yield
        elif isinstance(net, FSDPModule):
            net.set_requires_gradient_sync(False)
            yield
            net.set_requires_gradient_sync(True)
        else:
            yield

    def total(self, values: list[float]) -> list[float]:
        """Sums numbers over all processes."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def any(self, said: bool) -> bool:
        """Returns whether any process says so."""
        return self.total([said])[0] > 0

    def agree(self, number: int) -> bool:
        """Returns whether all processes give the same number."""
        if self.size == 1:
            return True
        both = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(both, dist.ReduceOp.MIN)
        smallest, largest = both.tolist()
        return smallest == -largest

    def wait(self) -> None:
        """Waits for every process, so that files of the primary one are there to be read."""
        if self.size > 1:
            dist.barrier()


def open_world(device: str = "auto") -> World:
    """Finds the device and, under torchrun, joins the other processes.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise VitslimError("There is no CUDA device here: use --device cpu.")
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and not dist.is_initialized():
        _join_attempt(device)
    if dist.is_available() and dist.is_initialized():
        return World(_local(device), dist.get_rank(), dist.get_world_size())
    args = argparse.Namespace(device=device)
    init_distributed_device(args)
    return World(torch.device(args.device), args.rank, args.world_size)


def _join_attempt(device: str) -> None:
    """Joins the processes that torchrun started, under keys of this attempt alone.

    After a restart its store still has the addresses of processes that are gone, and one that is
    quicker than the others would take theirs for alive.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _local(device: str) -> torch.device:
    if device.startswith("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Uses so many CPU threads inside the block; None leaves torch's choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
