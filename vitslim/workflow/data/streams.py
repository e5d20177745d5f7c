"""Streams of images, which can only be read from their beginning, and their bad images."""

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice, repeat
from typing import Any

from torch.utils.data import IterableDataset

from ...errors import VitslimError
from .decode import upright
from .images import ADVICE, reason
from .labels import wrong_label

logger = logging.getLogger(__name__)


def is_stream(dataset: Any) -> bool:
    """Returns whether a dataset can only be read from its beginning."""
    return isinstance(dataset, IterableDataset)


class Stream(IterableDataset[Any]):
    """A stream of timm's that names a bad image, and stops there unless told to skip it.

    Args:
        dataset: timm's, whose reader gives images as they are.
        where: What it is called when there is something to say about it.
        mode: PIL mode that every image is converted to.
        classes: Of the model: labels are below it.
        skip: Whether to go on at a bad image.
        fill: Whether the image after a bad one comes once more in its place, so that an epoch
            keeps its length.
        rank: Of `size` equal parts, image by image, which one to give.
        size: How many parts there are.
    """

    def __init__(
        self,
        dataset: Any,
        where: str,
        mode: str,
        classes: int,
        skip: bool = False,
        fill: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.dataset, self.where, self.skip = dataset, where, skip
        self.mode, self.classes, self.fill = mode, classes, fill
        self.rank, self.size = rank, size

    def share(self, rank: int, size: int) -> "Stream":
        """Returns every `size`-th image."""
        return Stream(
            self.dataset, self.where, self.mode, self.classes, self.skip, rank=rank, size=size
        )

    def __iter__(self) -> Iterator[Any]:
        with _heeding(_BadSample(self.where, self.skip)):
            for image, target in islice(self._upright(), self.rank, None, self.size):
                yield self.dataset.transform(image), target

    def _upright(self) -> Iterator[Any]:
        missing, last = 0, None
        for number, (image, target) in enumerate(self._read()):
            row = f"image {number} of a worker in {self.where}"
            try:
                image = upright(image, self.mode)
            except Exception as error:
                sentence = f"{row[0].upper()}{row[1:]} cannot be read ({reason(error)})"
                if not self.skip:
                    raise VitslimError(f"{sentence}: {ADVICE}.") from error
                logger.warning("%s; it is skipped.", sentence)
                missing += self.fill
                continue
            if wrong := wrong_label(target, self.classes):
                raise VitslimError(f"The label of {row} is {wrong}.")
            last = image, int(target)
            yield from repeat(last, missing + 1)
            missing = 0
        if last is not None:
            yield from repeat(last, missing)

    def _read(self) -> Iterator[Any]:
        try:
            yield from self.dataset.reader
        except VitslimError:
            raise
        # What opens a stream and what decodes its images may raise whatever they like.
        except Exception as error:
            raise VitslimError(f"{self.where} cannot be read on ({reason(error)}).") from error


class _BadSample(logging.Filter):
    """Hears timm's WebDataset reader say that it ignores a bad image, which it always does.

    It says so while it handles the exception, and not which image it was. The sample is a local
    variable of the function that called the decoder.
    """

    def __init__(self, where: str, skip: bool) -> None:
        super().__init__()
        self.where, self.skip = where, skip

    def filter(self, record: logging.LogRecord) -> bool:
        error = sys.exc_info()[1]
        if error is None:
            return True
        sample = _sample(error)
        _check_class(sample, error, self._name(sample))
        sentence = f"{self._name(sample)} cannot be read ({reason(error)})"
        if not self.skip:
            raise VitslimError(f"{sentence}: {ADVICE}.") from error
        record.msg, record.args = f"{sentence}; it is skipped.", ()
        return True

    def _name(self, sample: Mapping[str, Any]) -> str:
        if "__key__" in sample:
            return f"{sample['__key__']} in {sample.get('__url__', self.where)}"
        return f"An image in {self.where}"


def _sample(error: BaseException) -> Mapping[str, Any]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        sample = frame.f_locals.get("sample")
        if isinstance(sample, dict) and "__key__" in sample:
            return sample
    return {}


def _check_class(sample: Mapping[str, Any], error: BaseException, row: str) -> None:
    """Says where it was the label and not the image that could not be read."""
    if isinstance(error, KeyError) and error.args == ("cls",):
        raise VitslimError(
            f"{row} has no label: put a number into a .cls beside every image, or name a field of "
            "its .json with --target-key."
        ) from None
    written = sample.get("cls")
    if not isinstance(written, bytes):
        return
    try:
        int(written)
    except ValueError:
        wrong = wrong_label(written.decode(errors="replace").strip() or None, 0)
        raise VitslimError(f"The label of {row} is {wrong}.") from None


@contextmanager
def _heeding(bad_sample: _BadSample) -> Iterator[None]:
    speaker = logging.getLogger("timm.data.readers.reader_wds")
    speaker.addFilter(bad_sample)
    try:
        yield
    finally:
        speaker.removeFilter(bad_sample)
