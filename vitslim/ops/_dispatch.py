"""Which backend runs an op: their order, why one cannot, and the force of the user's choice."""

import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.library import Library

from ..errors import VitslimError

BACKENDS = {
    "triton": "vitslim.triton_kernels",
    "native": "vitslim.native",
    "reference": "vitslim.reference",
}
# On a GPU the order of the first two is a guess: native is not measured yet.
ORDER = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}
# What layers are made of, and what a packed model is.
LAYER_OPS = ("ragged_attention", "masked_mlp", "gated_layer_norm")
PACKED_OPS = ("packed_linear", "vit_encoder")
OPS = LAYER_OPS + PACKED_OPS

LIBRARY = Library("vitslim", "DEF")
_forced: dict[str, str] = {}


class BackendError(VitslimError, RuntimeError):
    """A backend was asked for that cannot run."""


class use_backend:  # noqa: N801 (reads as a function, and as a context manager)
    """Forces a backend, for good or inside a `with` block.

    A forced backend runs or raises with the reason; it never gives way to another one.

    Args:
        name: "triton", "native", "reference", or None for the automatic choice.
        op: The op it holds for; every op if absent.
    """

    def __init__(self, name: str | None, op: str | None = None) -> None:
        ops = OPS if op is None else (_known(op, OPS, "op"),)
        self._before = dict(_forced)
        for each in ops:
            if name is None:
                _forced.pop(each, None)
            else:
                _forced[each] = _known(name, tuple(BACKENDS), "backend")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc: object) -> None:
        _forced.clear()
        _forced.update(self._before)


def why_not(backend: str, op: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Returns in one phrase why `backend` cannot run `op` there, or None if it can."""
    module = _load(_known(backend, tuple(BACKENDS), "backend"))
    kind = torch.device(device).type
    if isinstance(module, str):
        return module
    if not hasattr(module, f"{op}_forward"):
        return f"{backend} has no {op} yet"
    # A backend may limit an op to some of its devices and dtypes, and say why it has no GPU.
    devices, dtypes = getattr(module, "LIMITS", {}).get(op, (None, module.DTYPES))
    if devices is not None and kind not in devices:
        return f"{backend} runs {op} on {' and '.join(devices)}, not on {kind}"
    if module.DEVICES is not None and kind not in module.DEVICES:
        reason = getattr(module, "NO_CUDA", None) if kind == "cuda" else None
        return reason or f"{backend} runs on {' and '.join(module.DEVICES)}, not on {kind}"
    if dtype not in dtypes:
        names = ", ".join(str(each).removeprefix("torch.") for each in dtypes)
        return f"{backend} takes {names}, not {str(dtype).removeprefix('torch.')}"
    return None


def find(op: str, device: torch.device | str, dtype: torch.dtype) -> ModuleType:
    """Returns the backend module that runs `op`: the forced one, or the first that can."""
    name = backend_of(op, torch.device(device).type, dtype)
    reason = why_not(name, op, device, dtype) if is_forced(op) else None
    if reason is not None:
        raise BackendError(f"{op}: backend {name!r} was asked for but cannot run: {reason}")
    return importlib.import_module(BACKENDS[name])


def is_forced(op: str) -> bool:
    """Returns whether the user forces a backend for `op`."""
    return op in _forced


def backend_of(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Returns the name of the backend that `op` goes to, forced or chosen."""
    return _forced.get(op) or choose(op, device_type, dtype)


@cache
def choose(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Returns the name of the first backend that can run `op`, by device and dtype alone."""
    for name in ORDER.get(device_type, ("reference",)):
        if why_not(name, op, device_type, dtype) is None:
            return name
    raise TypeError(f"{op}: no backend takes {dtype} on {device_type}; use a floating-point dtype")


def define(op: str, name: str, schema: str) -> None:
    """Defines `vitslim::<name>` with a kernel that asks `find` at every call.

    Autocast is off inside: what a backend accumulates in is its own decision.
    """

    def kernel(*args: Any) -> Any:
        device = args[0].device
        run: Callable[..., Any] = getattr(find(op, device, args[0].dtype), name)
        if not torch.is_autocast_enabled(device.type):
            return run(*args)
        with torch.autocast(device.type, enabled=False):
            return run(*args)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")


def _known(name: str, names: tuple[str, ...], what: str) -> str:
    if name not in names:
        raise ValueError(f"no {what} is called {name!r}; there are {', '.join(names)}")
    return name


@cache
def _load(backend: str) -> ModuleType | str:
    """Returns the backend's module, or the reason why it is not there."""
    try:
        return importlib.import_module(BACKENDS[backend])
    except ImportError as error:
        return str(error)


if _environment := os.environ.get("VITSLIM_BACKEND"):
    use_backend(_environment)
