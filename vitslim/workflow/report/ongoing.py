"""What can be seen from outside of a stage that may still be going on: how far it is, its masks.

Its checkpoints come and go while they are read, and the one being written is not whole yet, so
whatever cannot be read is passed over for the one before it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...masks import Masks

_MASK = re.compile(r"blocks\.(\d+)\.(attn\.mask|mlp\.mask|tokens\.raw)$")
_KINDS = {"attn.mask": "attention", "mlp.mask": "mlp", "tokens.raw": "token"}


@dataclass(frozen=True)
class Progress:
    """How far one stage is.

    Attributes:
        name: As in summary.csv: `search`, `retrain/macs-60`.
        finished: Whether its result is there.
        epochs: Epochs done, with the fraction of the one that is going on.
        of: How many there will be, if that is known.
        seconds: How long the last epoch took, if one is done.
        written: When it last wrote something, in seconds since 1970; None if nothing is there.
    """

    name: str
    finished: bool
    epochs: float = 0.0
    of: int | None = None
    seconds: float | None = None
    written: float | None = None


def stage_facts(folder: Path) -> dict[str, Any]:
    """Returns result.json of a stage, or else state.json of its newest whole checkpoint, or {}."""
    for path in (folder / "result.json", *(each / "state.json" for each in _checkpoints(folder))):
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(facts, dict):
            return facts
    return {}


def progress(
    name: str,
    folder: Path,
    rows: list[dict[str, float]],
    of: int | None = None,
    finished: bool = False,
) -> Progress:
    """Finds out how far a stage is.

    Args:
        name: As in summary.csv.
        folder: Where its checkpoints and its result are.
        rows: What summary.csv says of it.
        of: How many epochs it was told to train, where its checkpoints do not say.
        finished: Whether that is known from elsewhere.
    """
    facts = stage_facts(folder)
    args, more = _object(facts, "args"), _object(facts, "facts")
    epochs = max((row["epoch"] for row in rows), default=0.0)
    update, per_epoch = facts.get("update"), more.get("updates_per_epoch")
    if isinstance(update, int) and isinstance(per_epoch, int) and per_epoch > 0:
        epochs = max(epochs, update / per_epoch)
    return Progress(
        name,
        finished or (folder / "result.json").exists(),
        epochs,
        args["epochs"] if isinstance(args.get("epochs"), int) else of,
        rows[-1].get("seconds") if rows else None,
        max(map(_written, _checkpoints(folder)), default=None),
    )


def masks_so_far(folder: Path) -> tuple[Masks, str] | None:
    """Reads the masks of the newest checkpoint of a search that can be read, and names it."""
    for checkpoint in _checkpoints(folder):
        # Where weights are averaged, the average is what the search ends with.
        for name in ("ema", "model"):
            try:
                return _masks(_parts(checkpoint, name)), f"update {_number(checkpoint)}"
            except (OSError, SafetensorError, ValueError):
                continue
    return None


def _parts(checkpoint: Path, group: str) -> dict[str, list[Any]]:
    """Opens the tensors of a group; those of a sharded model in parts, which are some rows each."""
    parts: dict[str, list[Any]] = {}
    files = _object(json.loads((checkpoint / "state.json").read_text()), "files")
    # Not those that are there: of a checkpoint that is being deleted some parts may be gone.
    shards = sorted(name for name in files if name.startswith("shard-"))
    for path in shards or [f"{group}.safetensors"]:
        with safe_open(checkpoint / path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, this is no dictionary
                if not shards or name.startswith(f"{group}/"):
                    parts.setdefault(name, []).append(file.get_slice(name))
    return parts


def _masks(parts: dict[str, list[Any]]) -> Masks:
    """Picks the masks out of the parameters of a masked model, or raises ValueError."""
    found: dict[str, dict[int, Tensor]] = {kind: {} for kind in _KINDS.values()}
    depth = 0
    for name, slices in parts.items():
        if block := re.search(r"blocks\.(\d+)\.", name):
            depth = max(depth, int(block[1]) + 1)
        if match := _MASK.search(name):
            values = torch.cat([each[:] for each in slices]).float()
            if match[2] == "attn.mask":
                # A mask that heads or dimensions share is written once.
                weight = parts[name.removesuffix("mask") + "qkv.weight"]
                qkv = sum(each.get_shape()[0] for each in weight)
                rows, columns = values.shape
                heads = rows if rows > 1 else qkv // 3 // columns
                values = values.expand(heads, qkv // 3 // heads)
            elif match[2] == "tokens.raw":
                values = torch.tanh(values)
            found[_KINDS[match[2]]][int(match[1])] = values
    if not any(found.values()):
        raise ValueError("there are no masks among the parameters")
    attention, mlp, token = ([each.get(i) for i in range(depth)] for each in found.values())
    return Masks(attention, mlp, token)


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Yields the checkpoints of a stage, the newest first; not those that are being written."""
    some = [path for path in (folder / "state").glob("*") if _number(path) is not None]
    yield from sorted(some, key=lambda path: _number(path) or 0, reverse=True)


def _number(path: Path) -> int | None:
    found = re.fullmatch(r"[a-z]+-(\d+)", path.name)
    return int(found[1]) if found else None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _object(facts: dict[str, Any], name: str) -> dict[str, Any]:
    value = facts.get(name)
    return value if isinstance(value, dict) else {}
