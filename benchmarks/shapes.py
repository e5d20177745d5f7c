"""The shapes that every benchmark uses: DeiT's three sizes, and widths as a search leaves them."""

import random
from dataclasses import dataclass

HEAD_DIM = 64
SCALE = HEAD_DIM**-0.5
TOKENS = 197
IMAGE = 224
DEPTH = 12
CLASSES = 1000
SMOKE = False


def ragged_widths(heads: int, unit: int = 1, seed: int = 0) -> tuple[int, ...]:
    """Draws a width from 8 to 64 for each head, rounded up to `unit`; the same ones for ever."""
    draw = random.Random(seed)
    widths = [draw.randint(8, HEAD_DIM) for _ in range(heads)]
    return tuple(-(-width // unit) * unit for width in widths)


@dataclass(frozen=True)
class Shape:
    """One model's sizes.

    Attributes:
        name: As the tables print it.
        heads: How many heads the dense model has.
    """

    name: str
    heads: int

    @property
    def embed_dim(self) -> int:
        """Channels of a token."""
        return self.heads * HEAD_DIM

    @property
    def hidden(self) -> int:
        """Hidden units of an MLP."""
        return 4 * self.embed_dim

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The widths of the slim model's heads."""
        return ragged_widths(self.heads)


T, S, B = Shape("T", 3), Shape("S", 6), Shape("B", 12)
# What runs on a processor, and what on a GPU.
DEIT, BATCHES = (T, S, B), (1, 8)
GPU_DEIT, GPU_BATCHES = (S, B), (1, 256)
# Where the whole encoder runs in one call; sizes of batches and of images, for plots.
ENCODER_DEIT, ENCODER_BATCHES, THREADS = DEIT, BATCHES, (1, 2)
BATCH_SIZES, IMAGES = (1, 2, 4, 8, 16, 32, 64), (112, 160, 192, 224, 256, 320, 384)


def shrink() -> None:
    """Makes everything tiny, for --smoke: called before any benchmark is collected."""
    small = {"TOKENS": 17, "IMAGE": 64, "DEPTH": 1, "CLASSES": 10, "SMOKE": True}
    small |= {"DEIT": (Shape("T", 1), Shape("S", 2)), "BATCHES": (1, 2)}
    small |= {"GPU_DEIT": (Shape("S", 1), Shape("B", 2)), "GPU_BATCHES": (1, 2)}
    small |= {"ENCODER_DEIT": (Shape("T", 2),), "ENCODER_BATCHES": (2,), "THREADS": (1,)}
    small |= {"BATCH_SIZES": (1, 2), "IMAGES": (32, 64)}
    globals().update(small)
