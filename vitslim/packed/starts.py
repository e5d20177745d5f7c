"""What images start from, kept for the sizes that were seen last."""

import threading
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

Size = tuple[int, int]
LIMIT = 16


class Starts:
    """Start tokens by the size of the images: at most LIMIT of them, the least used goes first.

    Args:
        make: Makes the start tokens for images of a size.
    """

    def __init__(self, make: Callable[[Size], Tensor]) -> None:
        self._make, self._lock, self._clock = make, threading.Lock(), count()
        # Hits leave this as it is: a compiled graph looks into it, and is compiled again if it is
        # not what it was.
        self._made: dict[Size, Tensor] = {}
        self._used: dict[Size, int] = {}

    def seen(self, size: Size) -> Tensor | None:
        """Returns the start tokens if they are there."""
        return self._made.get(size)

    def get(self, size: Size) -> Tensor:
        """Returns the start tokens, made if they are not there."""
        with self._lock:
            if size not in self._made:
                # What is made in inference mode could not be used outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    self._made[size] = self._make(size)
            self._used[size] = next(self._clock)
            start = self._made[size]
            while len(self._made) > LIMIT:
                oldest = min(self._made, key=self._used.__getitem__)
                del self._made[oldest], self._used[oldest]
            return start

    def __len__(self) -> int:
        return len(self._made)
