"""Tries the Triton kernels' configurations on this GPU and keeps the fastest on file.

A training step of a model says which kernels run, in which cases and on which tensors. Each call is
then timed alone, with the table's choice and with every candidate.
"""

import logging
import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import VitslimError
from ..ops import LAYER_OPS, use_backend, why_not
from ..ops._dispatch import find
from .latency import evaluating, example_input

logger = logging.getLogger(__name__)

# A candidate takes the table's place only where it is this much faster: less is noise.
WORTHWHILE = 0.97
AUTOCAST = (None, torch.bfloat16)

Timer = Callable[[Callable[[], object]], float]


class Tuned(NamedTuple):
    """What was found for one case of one kernel: seconds of the table's choice and of the best."""

    kernel: str
    key: str
    before: float
    after: float
    config: dict[str, int]


def tune(model: nn.Module, batch_size: int, timer: Timer | None = None) -> list[Tuned]:
    """Tunes every kernel that `model` would run, and stores what wins.

    Args:
        model: On the GPU to be tuned for. Its gradients are dropped.
        batch_size: Images of a step.
        timer: Returns the seconds of a call; by default triton's, on the GPU.

    Returns:
        What was found for each case; nothing for a dense model, which runs no kernel of ours.

    Raises:
        VitslimError: The Triton backend cannot run on the model's device.
    """
    parameter = next(model.parameters())
    device = parameter.device
    reasons = [why_not("triton", op, device, parameter.dtype) for op in LAYER_OPS]
    if any(reasons):
        raise VitslimError(f"--tune has nothing to tune here: {next(filter(None, reasons))}")
    done: dict[tuple[str, str], Tuned] = {}
    with use_backend("triton"):
        backend = find(LAYER_OPS[0], device, parameter.dtype)
        for call in _calls(model, batch_size):
            with backend.configs.watched() as seen:
                expected = call()
            for kernel, key in dict.fromkeys(seen):
                if (kernel, key) not in done:
                    each = _best(backend, kernel, key, call, expected, timer or _seconds)
                    done[kernel, key] = each
                    logger.info("%s %s: %.2fx", kernel, key, each.before / each.after)
    changed = {f"{t.kernel} {t.key}": t.config for t in done.values() if t.config}
    if changed:
        backend.tuned.store(device, changed)
    return list(done.values())


def _best(
    backend: ModuleType, kernel: str, key: str, call: Callable[[], Any], expected: Any, timer: Timer
) -> Tuned:
    before = after = timer(call)
    best: dict[str, int] = {}
    for config in backend.CANDIDATES[kernel]:
        with backend.configs.forced(kernel, key, config):
            try:
                agrees = _agree(call(), expected)
            except Exception as error:  # too large for this GPU, in one of Triton's many ways
                logger.debug("%s %s %s: %s", kernel, key, config, error)
                continue
            if not agrees:
                logger.warning("%s %s gives another result with %s", kernel, key, config)
                continue
            seconds = timer(call)
        if seconds < WORTHWHILE * before and seconds < after:
            after, best = seconds, config
    return Tuned(kernel, key, before, after, best)


def _agree(actual: Any, expected: Any) -> bool:
    """Returns whether two configurations' results differ by rounding alone."""
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    for a, b in pairs:
        if b.numel() == 0:
            continue
        size = b.abs().max().item()
        tolerance = 1e-3 if b.dtype == torch.float32 else 3e-2
        if not (a.float() - b.float()).abs().max().item() <= tolerance * max(size, 1e-6):
            return False
    return True


class _Recorder(TorchDispatchMode):
    """Keeps one call of every op for each combination of shapes and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], Callable[[], Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "vitslim":
            said = tuple(
                (tuple(a.shape), a.dtype) if isinstance(a, Tensor) else str(a) for a in args
            )
            kept = [a.detach() if isinstance(a, Tensor) else a for a in args]
            self.calls.setdefault((str(func), *said), lambda: func(*kept))
        return func(*args, **(kwargs or {}))


def _calls(model: nn.Module, batch_size: int) -> list[Callable[[], Any]]:
    """Returns the op calls of a training step in the model's dtype and under autocast."""
    images = example_input(model, batch_size)
    recorder = _Recorder()
    for dtype in AUTOCAST:
        autocast = torch.autocast(images.device.type, dtype, enabled=dtype is not None)
        with evaluating(model), autocast, recorder:
            model(images).float().square().mean().backward()
        model.zero_grad(set_to_none=True)
    return list(recorder.calls.values())


def _seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return 1e-3 * statistics.median(do_bench(call, warmup=5, rep=30, return_mode="all"))


def format_tuned(found: list[Tuned]) -> str:
    """Returns a line for each case."""
    return "\n".join(
        f"{t.kernel} {t.key}: {t.before * 1e6:.1f} -> {t.after * 1e6:.1f} us "
        f"({t.before / t.after:.2f}x), {t.config or 'the table is best'}"
        for t in found
    )
