"""Calibration images: checked once, then given in batches of one size, as often as needed."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import VitslimError
from ..families import Family, family_of
from ..layers.plain import like
from ..wrapped import is_sharded

# No image that was normalised by its data's mean and standard deviation has a value beyond this.
_LARGEST = 30.0


class Images:
    """Images of a model's size, with labels or without.

    Args:
        data: Normalised images [n, channels, height, width]; (images, labels), labels being class
            numbers [n]; or an iterable of either, such as a DataLoader, which must give the same
            batches every time that it is iterated.
        model: What will see them; bare, in evaluation mode.
        batch_size: Images that are computed at once.
        least: How many there must be.
        what_for: For the sentence where there are fewer.

    Raises:
        VitslimError: The model is training, or the images are not what it takes: another size,
            dtype, device or range, not finite, all alike, too few, labels out of range.
    """

    def __init__(
        self,
        data: Any,
        model: nn.Module,
        batch_size: int = 32,
        least: int = 1,
        what_for: str = "calibration",
    ) -> None:
        if is_sharded(model):
            raise VitslimError(
                "the model is sharded (FSDP2), and images are looked at by whole ones; save it and "
                "load it again, or take vitslim.wrapped.copy_of(model)"
            )
        if any(module.training for module in model.modules()):
            raise VitslimError("the model is in training mode; call model.eval() first")
        self.batch_size, self.count, self._share = batch_size, 0, (1, 1)
        self._family: Family = family_of(model, "calibrated")
        self._model, self._like = model, like(model)
        self._data, self._checked = data, False
        self.labelled = True
        first, varied = None, False
        for images, labels in self:
            self.labelled &= labels is not None
            first = images[:1] if first is None else first
            varied |= not torch.equal(images, first.expand_as(images))
            self.count += len(images)
        self._checked = True
        if self.count < least:
            raise VitslimError(
                f"{self.count} images are too few for {what_for}, which takes at least {least}: "
                "give more of them"
            )
        if not varied and self.count > 1:
            raise VitslimError("the images are all alike, so they say nothing: give different ones")

    @classmethod
    def of(cls, data: Any, model: nn.Module, *args: Any, **kwargs: Any) -> "Images":
        """Returns checked images as they are, and checks others; arguments are the class's."""
        return data if isinstance(data, Images) else cls(data, model, *args, **kwargs)

    def evenly(self, most: int) -> "Images":
        """Returns at most so many of the images, from the first to the last at even distances."""
        if self.count <= most:
            return self
        fewer = copy.copy(self)
        fewer.count, fewer._share = most, (most, self.count)
        return fewer

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        begin, (most, count) = 0, self._share
        for images, labels in _pieces(self._data):
            if not self._checked:
                self._check(images, labels)
            if most < count:
                # Image i is taken where i * most / count passes a whole number.
                numbers = torch.arange(begin, begin + len(images), device=images.device)
                taken = (numbers + 1) * most // count > numbers * most // count
                begin += len(images)
                images, labels = images[taken], None if labels is None else labels[taken]
            for start in range(0, len(images), self.batch_size):
                end = start + self.batch_size
                yield images[start:end], None if labels is None else labels[start:end]

    def shown(self, what: str, quiet: bool) -> Any:
        """Returns the batches behind a progress bar."""
        return tqdm(self, what, total=len(self), unit="batch", disable=quiet or None, leave=False)

    def _check(self, images: Any, labels: Any) -> None:
        expected = self._family.input_shape(self._model)
        if not isinstance(images, Tensor) or images.dim() != 4:
            what = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise VitslimError(
                f"calibration images are tensors [n, {', '.join(map(str, expected))}], not {what}"
            )
        if tuple(images.shape[1:]) != expected:
            raise VitslimError(
                f"the images are {_by(images.shape[1:])}, and the model takes {_by(expected)}: "
                "resize them, as timm.data.create_transform does"
            )
        if images.dtype != self._like.dtype:
            raise VitslimError(
                f"the images are {images.dtype} and the model {self._like.dtype}: convert them; "
                "bytes are divided by 255 and normalised first, as timm.data.create_transform does"
            )
        if images.device != self._like.device:
            raise VitslimError(
                f"the images are on {images.device} and the model on {self._like.device}: move one"
            )
        if not images.isfinite().all():
            raise VitslimError("the images are not finite: look for NaN and infinity in them")
        if len(images) and float(images.abs().max()) > _LARGEST:
            raise VitslimError(
                f"the images have values up to {float(images.abs().max()):.0f}, like bytes that "
                "were never normalised: divide by 255, subtract the mean, divide by the std"
            )
        if labels is not None:
            self._check_labels(images, labels)

    def _check_labels(self, images: Tensor, labels: Any) -> None:
        classes = int(getattr(self._model, "num_classes", 0))
        if not isinstance(labels, Tensor) or labels.shape != images.shape[:1]:
            what = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise VitslimError(
                f"labels are class numbers [n], one an image, not {what} for {len(images)} images"
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise VitslimError(f"labels are class numbers, integers, not {labels.dtype}")
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise VitslimError(
                f"the labels go from {int(labels.min())} to {int(labels.max())}, and the model has "
                f"{classes} classes, 0 to {classes - 1}"
            )


def _pieces(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (images, labels or None) of whatever form the data has."""
    if isinstance(data, Tensor):
        yield data, None
    elif _is_pair(data):
        yield data[0], data[1]
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | dict | Iterator):
        for each in data:
            yield (each[0], each[1]) if _is_pair(each) else (each, None)
    else:
        raise VitslimError(
            f"calibration images are a tensor, (images, labels), or a list or DataLoader of "
            f"batches of either, not a {type(data).__name__}"
        )


def _is_pair(data: Any) -> bool:
    return (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(each, Tensor) for each in data)
        and data[0].dim() == 4
        and data[1].dim() != 4
    )


def _by(shape: Iterable[int]) -> str:
    return " x ".join(str(int(each)) for each in shape)
