"""What is built, for what, and for each op which backend runs here and why the others do not."""

import os
import platform
from typing import Any

import timm
import torch

from .ops._dispatch import BACKENDS, OPS, backend_of, why_not


def info() -> dict[str, Any]:
    """Returns versions, the machine, the build, and the backend of each op on each device."""
    from . import __version__

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "vitslim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "native": _native(),
        "ops": {op: {device: _runs(op, device) for device in devices} for op in OPS},
    }


def format_info(facts: dict[str, Any]) -> str:
    """Returns `info()` as lines for a person."""
    native = facts["native"]
    lines = [
        f"vitslim {facts['vitslim']}  torch {facts['torch']}  timm {facts['timm']}  "
        f"Python {facts['python']}",
        f"CPU: {facts['cpu']['capability']}, {facts['cpu']['cores']} cores, "
        f"{facts['threads']} threads",
        f"GPU: {', '.join(facts['gpus']) or 'none'}",
        f"native: {_native_line(native)}",
    ]
    for op, devices in facts["ops"].items():
        for device, choice in devices.items():
            lines.append(f"{op} on {device}: {choice['backend']}")
            lines += [f"    not {name}: {reason}" for name, reason in choice["not"].items()]
    return "\n".join(lines)


def _runs(op: str, device: str) -> dict[str, Any]:
    dtype = torch.float32
    reasons = {name: why_not(name, op, device, dtype) for name in BACKENDS}
    return {
        "backend": backend_of(op, device, dtype),
        "not": {k: v for k, v in reasons.items() if v is not None},
    }


def _native_line(native: dict[str, Any]) -> str:
    if not native["built"]:
        return f"not built: {native['reason']}"
    sets = ", ".join(native["instruction_sets"])
    line = f"{native['instruction_set']} runs (of {sets}), built by {native['compiler']}"
    line += f", with {native['sanitizers']} sanitizers" if native["sanitizers"] else ""
    architectures = " ".join(native["cuda_architectures"])
    return line + (f", with CUDA for {architectures}" if architectures else ", without CUDA")


def _native() -> dict[str, Any]:
    try:
        from . import native
    except ImportError as error:
        return {"built": False, "reason": str(error)}
    return {"built": True, **native.build_info()}
