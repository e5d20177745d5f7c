"""The shapes that every benchmark uses: DeiT's three sizes, and widths as a search leaves them."""

import random
from dataclasses import dataclass

TOKENS = 197
HEAD_DIM = 64
SCALE = HEAD_DIM**-0.5


def ragged_widths(heads: int, seed: int = 0) -> tuple[int, ...]:
    """Draws a width from 8 to 64 for each head; the same ones for ever."""
    draw = random.Random(seed)
    return tuple(draw.randint(8, HEAD_DIM) for _ in range(heads))


@dataclass(frozen=True)
class Shape:
    """One model's attention.

    Attributes:
        name: As the tables print it.
        heads: How many heads the dense model has.
        head_dims: Their widths in the slim model.
    """

    name: str
    heads: int
    head_dims: tuple[int, ...]


DEIT = tuple(
    Shape(name, heads, ragged_widths(heads)) for name, heads in (("T", 3), ("S", 6), ("B", 12))
)
