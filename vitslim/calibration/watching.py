"""What modules read and give while a model runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Point(NamedTuple):
    """A place in a model: what a module reads, or what it gives.

    Attributes:
        key: Under which the tensor is found; anything that a dict takes.
        module: Whose call is watched.
        side: "input" or "output".
    """

    key: Any
    module: nn.Module
    side: str


@contextmanager
def watching(points: Iterable[Point]) -> Iterator[dict[Any, Tensor]]:
    """Gives the tensors of the newest call at some points, by key; hooks are gone afterwards."""
    seen: dict[Any, Tensor] = {}
    handles = []
    for key, module, side in points:

        def before(_: nn.Module, inputs: tuple[Tensor, ...], key: Any = key) -> None:
            seen[key] = inputs[0]

        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, key: Any = key) -> None:
            seen[key] = output

        handles.append(
            module.register_forward_pre_hook(before)
            if side == "input"
            else module.register_forward_hook(after)
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
