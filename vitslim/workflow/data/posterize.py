"""timm's RandAugment with a Pillow that refuses to posterize an image to no bits at all.

At its highest level RandAugment keeps 0 of 8 bits: a black image. Pillow gave one until it began to
raise ValueError instead, which would stop a training within a few batches of ImageNet.
"""

from typing import Any

from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, posterize


def posterize_to_black(image: Image.Image, bits: int, **how: Any) -> Image.Image:
    """Keeps the upper `bits` bits, 0 to 8, of every channel of an image."""
    return posterize(image, bits, **how) if bits else Image.new(image.mode, image.size)


def allow_no_bits() -> None:
    """Gives it to all policies of timm that are made from now on."""
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        NAME_TO_OP[name] = posterize_to_black
