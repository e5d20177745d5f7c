"""Reading images one by one, and what is said and done about one that cannot be read."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from ...errors import VitslimError
from .decode import upright
from .hugging_face import Table
from .labels import check_labels, wrong_label

logger = logging.getLogger(__name__)

ADVICE = "repair or remove it, or pass --bad-images skip"
# So many bad images in a row are no bad images but a disk that is gone.
PATIENCE = 1000


class Images(Dataset[tuple[Any, Any]]):
    """The images of a dataset by index, where a bad one stops or gives its place to the next.

    Args:
        source: Gives (image or open file, target) by index: a reader of timm or a dataset.
        mode: PIL mode that every image is converted to.
        where: What the source is called when there is something to say about it.
        skip: Whether to go on at a bad image.
    """

    def __init__(self, source: Any, mode: str, where: str, skip: bool = False) -> None:
        self.source, self.mode, self.where, self.skip = source, mode, where, skip
        self.transform: Any = None
        # Of the model, which the data does not know yet: labels are below it.
        self.classes = 0
        # Shared with the workers, so that a bad image is told once and not by each of them.
        self.told = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index, image, target = self._next_good(index)
        if wrong := wrong_label(target, self.classes):
            raise VitslimError(f"The label of {self.name(index)} is {wrong}.")
        return self.transform(image), int(target)

    def check_labels(self, classes: int) -> None:
        """Raises VitslimError at a label that is wrong, of those known without their images.

        Args:
            classes: Of the model: labels are below it.
        """
        self.classes = classes
        if isinstance(self.source, Table):
            check_labels(self.source.labels(), classes, f"{self.where}, split {self.source.split}")
        elif hasattr(self.source, "targets"):
            check_labels([int(each) for each in self.source.targets], classes, self.where)

    def _next_good(self, first: int) -> tuple[int, Any, Any]:
        for index in range(first, first + min(len(self), PATIENCE)):
            index %= len(self)
            try:
                return index, *self._read(index)
            # Decoders raise whatever they like: OSError, SyntaxError, ValueError, struct.error.
            except Exception as error:
                sentence = f"{self.name(index)} cannot be read ({reason(error)})"
                if not self.skip:
                    raise VitslimError(f"{sentence}: {ADVICE}.") from error
                if not self.told[index]:
                    self.told[index] = True
                    logger.warning("%s; the next image takes its place.", sentence)
        raise VitslimError(
            f"{self.name(first)} cannot be read, and none of the images after it: "
            f"see whether {self.where} is still there."
        )

    def _read(self, index: int) -> tuple[Any, Any]:
        file, target = self.source[index]
        with file:
            image = file if isinstance(file, Image.Image) else Image.open(file)
            return upright(image, self.mode), target

    def share(self, rank: int, size: int) -> "Shard":
        """Returns every `size`-th image."""
        return Shard(self, range(rank, len(self), size))

    def some(self, indices: Sequence[int]) -> "Shard":
        """Returns the images of these numbers."""
        return Shard(self, indices)

    def name(self, index: int) -> str:
        """The file of an image where there is one, else its number."""
        name = None
        if hasattr(self.source, "filename"):
            name = self.source.filename(index, absolute=True)
        elif hasattr(self.source, "samples"):
            name = self.source.samples[index][0]
        # A relative name may be one inside a tar.
        if name and (Path(name).is_absolute() or Path(name).is_relative_to(self.where)):
            return str(name)
        return f"{name or f'Image {index}'} in {self.where}"


class Shard(Dataset[Any]):
    """Some images of a dataset by number, so that processes evaluate each image exactly once."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    @property
    def transform(self) -> Any:
        """The transform of the whole dataset, where timm's loader puts its own."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def share(self, rank: int, size: int) -> "Shard":
        """Returns every `size`-th of them."""
        return Shard(self.dataset, self.indices[rank::size])

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


def reason(error: BaseException) -> str:
    """Says what an exception was, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or of a kind that Pillow does not know"
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def told(error: VitslimError) -> VitslimError:
    """Takes the sentence out of the traceback that torch makes of a worker's error."""
    # Torch's frames hold the error that holds them. Collected as such a cycle, a loader closes the
    # queues of its workers before it can tell them to end, and waits for them in vain.
    error.__traceback__ = None
    return VitslimError(str(error).rpartition(f"{VitslimError.__name__}: ")[2].strip())
