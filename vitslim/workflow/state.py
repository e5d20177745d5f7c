"""The folder of one training stage: a state per epoch that is whole or absent, and the result.

`state/epoch-0007/` holds model, optimizer and, with averaging, ema as safetensors, and
`state.json` with everything else and the hash of each file. It is written under another name and
renamed, so a kill at any moment leaves the state before or the state after. The two newest are
kept, so one that a disk has damaged is no loss. `result.json` appears when the stage is done.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from ..errors import VitslimError
from ..files import atomic_write

_KEPT = 2


class State(NamedTuple):
    """What a stage needs to go on after an epoch."""

    epoch: int
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


class StageFolder:
    """Reads and writes the folder of one stage.

    Args:
        path: The folder; made when first written.
        args: What the stage was told. A state or a result of other arguments is refused.
    """

    def __init__(self, path: str | os.PathLike[str], args: Mapping[str, Any]) -> None:
        self.path = Path(path)
        # Through JSON, so that a tuple equals the list that is read back.
        self.args = json.loads(json.dumps(dict(args)))

    @property
    def started(self) -> bool:
        """Whether an earlier run left a state or a result here."""
        return bool(self._epochs()) or (self.path / "result.json").exists()

    def result(self) -> dict[str, Any] | None:
        """Returns the result if the stage is done."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        result = read_json(path)
        self._check_args(result.get("args", {}))
        return result

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result, then lets go of the states, which are no longer needed."""
        whole = {**result, "args": self.args}
        atomic_write(self.path / "result.json", json.dumps(whole, indent=1) + "\n")
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def save(self, state: State) -> None:
        """Writes the state after an epoch and deletes all but the newest ones."""
        folder = self.path / "state" / f"epoch-{state.epoch:04d}"
        beside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        hashes = {}
        for name, tensors in state.tensors.items():
            whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            data = serialize(whole)
            hashes[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
            _write(beside / f"{name}.safetensors", data)
        facts = {
            "format": 1,
            "epoch": state.epoch,
            "args": self.args,
            "files": hashes,
            "facts": state.facts,
        }
        _write(beside / "state.json", json.dumps(facts, indent=1).encode())
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        for old in self._epochs()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> tuple[State | None, str | None]:
        """Returns the newest whole state and, if a newer one is damaged, a sentence about it.

        Raises:
            VitslimError: There are states and none of them is whole, or the arguments changed.
        """
        trouble = None
        for folder in reversed(self._epochs()):
            try:
                return self._read(folder), trouble
            except (OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, VitslimError):
                    raise
                trouble = trouble or f"{folder} is damaged ({_first_line(error)})"
        if trouble:
            raise VitslimError(
                f"{trouble} and there is no older state: delete {self.path} and start again."
            )
        return None, None

    def _read(self, folder: Path) -> State:
        facts = json.loads((folder / "state.json").read_text())
        if facts["format"] != 1:
            raise ValueError(f"format {facts['format']} is unknown")
        self._check_args(facts["args"])
        tensors = {}
        for name, digest in facts["files"].items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"{name} is truncated or was edited")
            tensors[name.removesuffix(".safetensors")] = deserialize(data)
        return State(int(facts["epoch"]), tensors, facts["facts"])

    def _check_args(self, before: Mapping[str, Any]) -> None:
        names = sorted(n for n in {*before, *self.args} if before.get(n) != self.args.get(n))
        if names:
            changes = "; ".join(
                f"{name} was {before.get(name)!r} and is now {self.args.get(name)!r}"
                for name in names
            )
            raise VitslimError(
                f"Cannot go on in {self.path}: {changes}. "
                "Give the earlier values, or start again with another --output."
            )

    def _epochs(self) -> list[Path]:
        return sorted(
            path
            for path in (self.path / "state").glob("epoch-*")
            if path.is_dir() and path.suffix != ".tmp"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, or says in one sentence that it is not one."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise VitslimError(f"Cannot read {path}: {_first_line(error)}.") from error
    return value


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits the state of an optimiser into tensors and JSON."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, slots in whole["state"].items():
        for name, value in slots.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}.{name}"] = value
    facts = {"groups": whole["param_groups"], "plain": plain}
    try:
        return tensors, json.loads(json.dumps(facts))
    except TypeError as error:
        name = type(optimizer).__name__
        raise VitslimError(f"The state of {name} cannot be saved: choose another --opt.") from error


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Gives an optimiser the state that `pack_optimizer` took."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **facts["plain"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
