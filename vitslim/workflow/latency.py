"""Latency of several models, measured side by side so that their ratios can be trusted.

A machine drifts: it heats up, it is shared, its clock changes. The models therefore take turns,
many short turns each, and the median is reported. What disturbs one disturbs the others as often.
"""

import itertools
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import VitslimError
from .aligned import aligned

logger = logging.getLogger(__name__)

MIN_ROUNDS = 5
# On a disturbed machine a model is measured longer, up to this many times as long.
PATIENCE = 4
# Samples whose upper quartile is more than this many times the lower one are disturbed.
STEADY = 1.5
TURN_SECONDS = 0.02
MAX_CALLS_PER_TURN = 10


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """Reads the size of one image [channels, height, width] from a timm vision transformer."""
    patch_embed = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    channels = getattr(getattr(patch_embed, "proj", None), "in_channels", None)
    if size is None or channels is None:
        raise VitslimError(
            f"{type(model).__name__} does not say which images it takes: "
            "a timm vision transformer with `patch_embed.img_size` is needed"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def example_input(model: nn.Module, batch_size: int) -> Tensor:
    """Makes the same random images on every call, in the dtype and on the device of the model."""
    parameter = _first_tensor(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *input_shape(model), generator=generator)
    return images.to(parameter.device, parameter.dtype)


def _first_tensor(model: nn.Module) -> Tensor:
    """Returns a tensor that says where a model is; a packed one may have buffers alone."""
    return next(itertools.chain(model.parameters(), model.buffers()))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models into eval mode and gives every submodule its own mode back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def measure(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int] = (1, 32),
    *,
    seconds: float = 1.0,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, float]]:
    """Measures the forward pass of several models in turns.

    Args:
        models: What to measure, by name. Each model keeps its mode, its device and its gradients.
        batch_sizes: Numbers of images per call.
        seconds: About how long to time each model at each batch size, warm-up not counted; longer
            while something else disturbs the machine.
        device: Where to measure; by default each model is measured where it is.

    Returns:
        Median milliseconds per call, `{name: {str(batch_size): ms}}`.
    """
    homes = {name: _first_tensor(model).device for name, model in models.items()}
    try:
        if device is not None:
            for model in models.values():
                model.to(device)
        with evaluating(*models.values()), torch.inference_mode():
            columns = {str(size): _one_batch_size(models, size, seconds) for size in batch_sizes}
    finally:
        if device is not None:
            for name, model in models.items():
                model.to(homes[name])
    return {name: {size: column[name] for size, column in columns.items()} for name in models}


def _one_batch_size(
    models: Mapping[str, nn.Module], batch_size: int, seconds: float
) -> dict[str, float]:
    inputs = {name: example_input(model, batch_size) for name, model in models.items()}
    calls = {}
    for name, model in models.items():
        # The first call pays for lazy initialisation, the second one says how long a call takes.
        _timed_call(model, inputs[name])
        milliseconds = _timed_call(model, inputs[name])
        calls[name] = min(MAX_CALLS_PER_TURN, max(1, round(TURN_SECONDS * 1e3 / milliseconds)))
    samples: dict[str, list[float]] = {name: [] for name in models}
    began, share = time.perf_counter(), seconds * len(models)
    for turn in itertools.count():
        spent = time.perf_counter() - began
        if turn >= MIN_ROUNDS and spent >= share:
            disturbed = [name for name, values in samples.items() if _spread(values) > STEADY]
            if not disturbed or spent >= PATIENCE * share:
                break
        # Every other round runs backwards, so that no model always follows the same neighbour.
        for name in list(models)[:: -1 if turn % 2 else 1]:
            for _ in range(calls[name]):
                samples[name].append(_timed_call(models[name], inputs[name]))
    if disturbed:
        logger.warning(
            "latency at batch %d is uncertain for %s: single calls differ by more than %.1fx, "
            "so something else was using the machine",
            batch_size,
            ", ".join(disturbed),
            STEADY,
        )
    return {name: statistics.median(values) for name, values in samples.items()}


def _spread(values: Sequence[float]) -> float:
    lower, _, upper = statistics.quantiles(values, n=4)
    return upper / lower


def _timed_call(model: nn.Module, images: Tensor) -> float:
    """Runs the model once and returns milliseconds, the device's own clock on CUDA."""
    if images.is_cuda:
        start, end = _event(), _event()
        torch.cuda.synchronize(images.device)
        start.record()
        model(images)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    began = time.perf_counter()
    model(images)
    return (time.perf_counter() - began) * 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def format_table(latency: Mapping[str, Mapping[str, float]]) -> str:
    """Lays measured latencies out as text, with each model's speed-up over the first one.

    Args:
        latency: What `measure` returned.
    """
    names, sizes = list(latency), list(next(iter(latency.values()), {}))
    rows = [["model"]]
    for size in sizes:
        rows[0] += [f"batch {size}, ms", "images/s", "speed-up"]
    for name in names:
        row = [name]
        for size in sizes:
            milliseconds = latency[name][size]
            row += [
                f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}",
                f"{int(size) / milliseconds * 1e3:.0f}",
                f"{latency[names[0]][size] / milliseconds:.2f}x",
            ]
        rows.append(row)
    return aligned(rows)
