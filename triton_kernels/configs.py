"""Which block sizes a kernel runs with: a table per generation of GPU, refined by tuning.

Nothing is tried out when a model runs. Every op keeps its table beside its kernels; `choose` reads
it, or what `vitslim bench --tune` measured on this very GPU (tuned.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch

from . import tuned

# Block sizes by the names of the kernel's constexprs, and num_warps and num_stages.
Config = dict[str, int]
# Generation -> key (what distinguishes the cases of a kernel: dtype, width) -> configuration.
Table = Mapping[str, Mapping[str, Config]]

# What sets generations apart is how much shared memory one program may take, and wgmma.
SHARED_MEMORY = {"sm80": 163 * 1024, "sm86": 99 * 1024, "sm90": 227 * 1024, "gfx942": 64 * 1024}
_forced: dict[str, Config] = {}
_watchers: list[list[tuple[str, str]]] = []


@cache
def generation(device: torch.device) -> str:
    """Returns which column of the tables a device belongs to."""
    if device.type != "cuda":
        return "sm80"  # the interpreter's
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] in (9, 10, 11):
        return "sm90"
    return "sm80" if capability in ((8, 0), (8, 7)) else "sm86"


@cache
def processors(device: torch.device) -> int:
    """Returns how many multiprocessors a device has; elsewhere an A100's number stands in."""
    if device.type != "cuda":
        return 108
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose(kernel: str, table: Table, key: str, device: torch.device) -> Config:
    """Returns the configuration of a kernel for one of its cases.

    Args:
        kernel: Its name without the underscores around, e.g. "ragged_attention_forward".
        table: The op's.
        key: The case.
        device: Where it will run.
    """
    name = f"{kernel} {key}"
    for seen in _watchers:
        seen.append((kernel, key))
    if name in _forced:
        return _forced[name]
    if device.type == "cuda" and (found := tuned.load(device).get(name)) is not None:
        return found
    return table[generation(device)][key]


@contextmanager
def forced(kernel: str, key: str, config: Config) -> Iterator[None]:
    """Makes `choose` return `config` inside a `with` block, for tuning and tests."""
    name = f"{kernel} {key}"
    before = dict(_forced)
    _forced[name] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Collects which (kernel, key) `choose` is asked for inside a `with` block."""
    seen: list[tuple[str, str]] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)
