"""A list of tensors that goes to disk where it grows too long for memory."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor


class Spool:
    """Tensors in the order in which they were put in; what is beyond `memory` lies in files.

    A context manager; its files are gone when it ends.

    Args:
        memory: Bytes of tensors that are kept in memory.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._items: list[Tensor | Path] = []
        self._held = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forgets the tensors and removes the files."""
        self._items.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def append(self, tensor: Tensor) -> None:
        """Puts in a tensor, which must not be changed afterwards."""
        size = tensor.numel() * tensor.element_size()
        if self._held + size <= self.memory:
            self._held += size
            self._items.append(tensor)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vitslim-")
        path = Path(self._folder.name) / f"{len(self._items)}.safetensors"
        save_file({"tensor": tensor.contiguous()}, path)
        self._items.append(path)

    def replace(self, tensors: Iterable[Tensor]) -> None:
        """Puts in others, which may be made of those that are there, and forgets these."""
        others = Spool(self.memory)
        for each in tensors:
            others.append(each)
        self.close()
        vars(self).update(vars(others))

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Tensor]:
        for item in self._items:
            yield load_file(item)["tensor"] if isinstance(item, Path) else item
