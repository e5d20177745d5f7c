"""Streams of images, which can only be read from their beginning, and their bad images."""

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from ...errors import VitslimError
from .images import ADVICE, reason


def is_stream(dataset: Any) -> bool:
    """Returns whether a dataset can only be read from its beginning."""
    return isinstance(dataset, IterableDataset)


class Stream(IterableDataset[Any]):
    """A stream of timm's that names a bad image, and stops there unless told to skip it.

    Args:
        dataset: timm's.
        where: What it is called when there is something to say about it.
        skip: Whether to go on at a bad image.
        rank: Of `size` equal parts, image by image, which one to give.
        size: How many parts there are.
    """

    def __init__(
        self, dataset: Any, where: str, skip: bool = False, rank: int = 0, size: int = 1
    ) -> None:
        self.dataset, self.where, self.skip = dataset, where, skip
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[Any]:
        with _heeding(_BadSample(self.where, self.skip)):
            yield from islice(self.dataset, self.rank, None, self.size)


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
        sentence = f"{self._name(error)} cannot be read ({reason(error)})"
        if not self.skip:
            raise VitslimError(f"{sentence}: {ADVICE}.") from error
        record.msg, record.args = f"{sentence}; it is skipped.", ()
        return True

    def _name(self, error: BaseException) -> str:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            sample = frame.f_locals.get("sample")
            if isinstance(sample, dict) and "__key__" in sample:
                return f"{sample['__key__']} in {sample.get('__url__', self.where)}"
        return f"An image in {self.where}"


@contextmanager
def _heeding(bad_sample: _BadSample) -> Iterator[None]:
    speaker = logging.getLogger("timm.data.readers.reader_wds")
    speaker.addFilter(bad_sample)
    try:
        yield
    finally:
        speaker.removeFilter(bad_sample)
