"""The folder of one training stage: checkpoints that are whole or absent, and the result.

`state/step-0000000007/`, named by the updates made, holds model, optimizer and, with averaging, ema
as safetensors, and `state.json` with everything else and the hash of each file. It is written
under another name and renamed, so a kill at any moment leaves the one before or the one after. The
newest few are kept, so one that a disk has damaged is no loss, and the most accurate one of those
made at the end of an epoch. `result.json` appears when the stage is done.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from ...errors import VitslimError
from ...files import atomic_write
from ..runtime.world import World
from .sharded import save_parts


class State(NamedTuple):
    """What a stage needs to go on.

    Attributes:
        update: How many updates were made.
        tensors: By file and name.
        facts: Everything else, as JSON can hold it.
        accuracy: In percent, of a checkpoint made at the end of an epoch.
        folder: Where it was read from; tensors that are sharded are still there.
    """

    update: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: dict[str, Any]
    accuracy: float | None = None
    folder: Path | None = None


class StageFolder:
    """Reads and writes the folder of one stage.

    Args:
        path: The folder; made when first written.
        args: What the stage was told. A checkpoint or a result of other arguments is refused.
        keep: How many of the newest checkpoints are kept.
    """

    def __init__(
        self, path: str | os.PathLike[str], args: Mapping[str, Any], keep: int = 2
    ) -> None:
        self.path, self.keep = Path(path), keep
        # Through JSON, so that a tuple equals the list that is read back.
        self.args = json.loads(json.dumps(dict(args)))

    @property
    def started(self) -> bool:
        """Whether an earlier run left a checkpoint or a result here."""
        return bool(self._folders()) or (self.path / "result.json").exists()

    def result(self) -> dict[str, Any] | None:
        """Returns the result if the stage is done."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        result = self.read_result()
        self._check_args(result.get("args", {}))
        return result

    def read_result(self) -> dict[str, Any]:
        """Reads the result of a stage that is done."""
        return read_json(self.path / "result.json")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result, then lets go of the checkpoints, which are no longer needed."""
        whole = {**result, "args": self.args}
        atomic_write(self.path / "result.json", json.dumps(whole, indent=1) + "\n")
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def save(self, state: State) -> None:
        """Writes a checkpoint and deletes those that are no longer wanted."""
        self.writer(state)()

    def writer(self, state: State) -> Callable[[], None]:
        """Takes a copy of a state and returns what writes it, perhaps in another thread."""
        tensors = {name: _copies(content) for name, content in state.tensors.items()}
        text, beside = self._text(state), self._beside(state.update)

        def write() -> None:
            shutil.rmtree(beside, ignore_errors=True)
            with _whole_or_gone(beside):
                beside.mkdir(parents=True)
                for name, content in tensors.items():
                    _write_file(beside / f"{name}.safetensors", serialize(content))
                self._seal(beside, text)

        return write

    def parts_writer(self, state: State, world: World) -> Callable[[], None]:
        """Does the same for tensors that are sharded: every process writes its parts."""
        text, beside = self._text(state), self._beside(state.update)
        if world.primary:
            shutil.rmtree(beside, ignore_errors=True)
        world.wait()
        wait = save_parts(beside, state.tensors, lambda: self._seal(beside, text))

        def write() -> None:
            with _whole_or_gone(beside):
                wait()

        return write

    def _text(self, state: State) -> str:
        facts = {"format": 2, "update": state.update, "accuracy": state.accuracy}
        return json.dumps({**facts, "args": self.args, "facts": state.facts})

    def _beside(self, update: int) -> Path:
        """Returns where a checkpoint is written, until it is whole and given its own name."""
        return self.path / "state" / f"step-{update:010d}.tmp"

    def _seal(self, beside: Path, text: str) -> None:
        """Adds the hashes of the files and everything else, and gives the folder its name."""
        hashes = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(beside.glob("*.safetensors"))
        }
        whole = {**json.loads(text), "files": hashes}
        _write_file(beside / "state.json", json.dumps(whole, indent=1).encode())
        folder = beside.with_suffix("")
        if folder.exists():
            # An epoch that was saved before it was evaluated; it counts until the new one is there.
            before = folder.with_name(f"{folder.name}-before")
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        beside.rename(folder)
        # Newer folders failed to load on resume; delete them.
        for old in self._folders():
            if old > folder:
                shutil.rmtree(old, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        """Deletes all checkpoints but the newest ones and the most accurate one."""
        folders = self._folders()
        best = self._best()
        for old in folders[: -self.keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)

    def _best(self) -> Path | None:
        """Returns the checkpoint of the most accurate epoch that is still there."""
        found = []
        for folder in self._folders():
            try:
                accuracy = json.loads((folder / "state.json").read_text())["accuracy"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if accuracy is not None:
                found.append((accuracy, folder))
        return max(found)[1] if found else None

    def at(self, update: int) -> State | None:
        """Returns the checkpoint made after so many updates, None if it is gone or damaged."""
        try:
            return self._read(self._beside(update).with_suffix(""))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def latest(self) -> tuple[State | None, str | None]:
        """Returns the newest whole checkpoint and, if a newer one is damaged, a sentence.

        Raises:
            VitslimError: There are checkpoints and none is whole, or the arguments changed.
        """
        trouble = None
        for folder in reversed(self._folders()):
            try:
                return self._read(folder), trouble
            except (OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, VitslimError):
                    raise
                trouble = trouble or f"{folder} is damaged ({_first_line(error)})"
        if trouble:
            raise VitslimError(
                f"{trouble} and there is no older checkpoint: delete {self.path} and start again."
            )
        return None, None

    def _read(self, folder: Path) -> State:
        facts = json.loads((folder / "state.json").read_text())
        if facts["format"] != 2:
            raise ValueError(f"format {facts['format']} is unknown")
        self._check_args(facts["args"])
        tensors = {}
        for name, digest in facts["files"].items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"{name} is truncated or was edited")
            if not name.startswith("shard-"):
                tensors[name.removesuffix(".safetensors")] = deserialize(data)
        update, accuracy = int(facts["update"]), facts["accuracy"]
        return State(update, tensors, facts["facts"], accuracy, folder)

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

    def _folders(self) -> list[Path]:
        return sorted(
            path
            for path in (self.path / "state").glob("step-*")
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


@contextmanager
def _whole_or_gone(beside: Path) -> Iterator[None]:
    """Deletes what was written there if a disk fails."""
    try:
        yield
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
