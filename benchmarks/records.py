"""The results on file: one JSON for each machine, entries merged by name."""

import datetime
import json
import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def facts(device: str) -> dict[str, Any]:
    """Returns where, with what and when an entry was measured."""
    found = {"machine": machine_name(device), "torch": torch.__version__}
    if device == "cuda":
        found |= {"cuda": torch.version.cuda, "triton": _version("triton")}
    return found | {
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def machine_name(device: str = "cpu") -> str:
    """Names the machine by its processor or GPU, never by its host name."""
    if device == "cuda":
        text = torch.cuda.get_device_name()
    else:
        text = f"{_processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(entries: dict[str, dict[str, Any]]) -> list[Path]:
    """Merges entries into the files of their machines, each replaced in one step."""
    paths = []
    FOLDER.mkdir(exist_ok=True)
    for machine in sorted({entry["machine"] for entry in entries.values()}):
        path = FOLDER / f"{machine}.json"
        merged = json.loads(path.read_text()) if path.exists() else {}
        merged |= {key: value for key, value in entries.items() if value["machine"] == machine}
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n")
        beside.replace(path)
        paths.append(path)
    return paths


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    model = fields.get("model name", platform.processor() or platform.machine())
    # A virtual machine may hide the model; the family tells the generation at least.
    zen = {"23": "zen2", "25": "zen3-4", "26": "zen5"}.get(fields.get("cpu family", ""), "")
    generation = f" {zen}" if "AMD" in model and zen else ""
    return re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", "", model) + generation


@cache
def _commit() -> str:
    """Names the commit as the run found it, before it writes results of its own."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
