"""How a call is timed: on a GPU by its own clock, and often enough that gaps do not count."""

import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Returns the seconds that one of `repeats` calls takes.

    A GPU's caches are not flushed in between: what is small enough stays in them, for every
    contender alike, as it does inside a model.
    """
    if device == "cuda":
        return _gpu_seconds(call, repeats)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def repeats_for(call: Callable[[], object], slice_s: float, device: str) -> int:
    """Returns how often a warmed-up call fits into about `slice_s` seconds, at least once."""
    once = seconds(call, 1, device)
    if once > slice_s:
        return 1
    # A first guess, then one over a tenth of the slice, in which start-up no longer counts.
    guess = max(1, int(0.1 * slice_s / max(once, 1e-7)))
    return max(1, int(slice_s / max(seconds(call, guess, device), 1e-7)))


def peak_mib(call: Callable[[], object]) -> float:
    """Returns the MiB that a call takes on the GPU at its peak, beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _gpu_seconds(call: Callable[[], object], repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats
