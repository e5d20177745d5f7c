"""What tuning found on this machine's GPUs: a JSON file a GPU in Triton's own cache folder."""

import json
import os
import re
from functools import cache
from pathlib import Path

import torch
import triton

VERSION = 1  # of the kernels' configurations; a file of another one is not read


def path(device: torch.device) -> Path:
    """Returns the file of a GPU's tuned configurations, beside Triton's compiled kernels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(triton.knobs.cache.dir) / f"vitslim-{name}.json"


@cache
def load(device: torch.device) -> dict[str, dict[str, int]]:
    """Returns the tuned configurations by "kernel key"; none where nothing valid is on file."""
    try:
        found = json.loads(path(device).read_text())
        return dict(found["configs"]) if found["made_by"] == _made_by() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def store(device: torch.device, configs: dict[str, dict[str, int]]) -> Path:
    """Writes the configurations beside the old file, then takes its place; returns its path."""
    to = path(device)
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = to.with_name(f"{to.name}.{os.getpid()}.tmp")
    merged = load(device) | configs
    beside.write_text(json.dumps({"made_by": _made_by(), "configs": merged}, indent=1) + "\n")
    beside.replace(to)
    load.cache_clear()
    return to


def _made_by() -> dict[str, object]:
    return {"version": VERSION, "triton": triton.__version__}
