"""Files that are whole or absent: write beside, flush to disk, then rename."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save as serialize


@contextmanager
def beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path next to `path` and renames it into place when the block succeeds.

    Readers see the old file or the new one, never half of it; a failure leaves the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner reads; give them the ordinary permissions.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes `data` to `path`, creating parent folders, so that the file is never half written."""
    with beside(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def atomic_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes tensors as safetensors the same way. Shared storage is copied apart."""
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, serialize(whole, metadata=metadata))
