"""Making of any image that Pillow opens an upright one of 8 bits, in the mode a model takes."""

from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

# Where these come in Pillow's 32-bit mode I, it is their 16 bits.
SIXTEEN_BITS_AS_I = ("PNG", "PPM")


def upright(image: Image.Image, mode: str) -> Image.Image:
    """Returns the first frame as a viewer shows it on white.

    It is turned as its EXIF orientation says. timm does not turn images: photographs of a telephone
    lie on their side there. Transparent pixels are laid on white, where timm shows the colour
    that is hidden in them, most often black, so that a black drawing vanishes. 16 bits lose
    the lower 8, so that images of one camera stay comparable; Pillow would turn most of them white.

    Args:
        image: Of any mode; one that has an orientation is turned in place.
        mode: `L` or `RGB`.

    Raises:
        ValueError: The pixels may have any range.
    """
    image.load()
    # What is wrong about the EXIF data does not concern the pixels.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    image = _on_white(_eight_bit(image))
    if image.mode == "LAB":
        # Pillow goes from it to colours alone.
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _upper(np.asarray(image))
    if image.mode == "I":
        pixels = np.asarray(image)
        low, high = int(pixels.min()), int(pixels.max())
        # Values that would fit 8 bits may be of 8, 16 or 32.
        if image.format in SIXTEEN_BITS_AS_I or (low >= 0 and 255 < high < 65536):
            return _upper(pixels)
        raise ValueError(
            f"its 32-bit pixels, mode I, may have any range, and are {low} to {high}: "
            "8 or 16 bits are needed"
        )
    if image.mode == "F":
        raise ValueError("its 32-bit pixels, mode F, may have any range: 8 or 16 bits are needed")
    return image


def _upper(pixels: np.ndarray) -> Image.Image:
    """Keeps the upper 8 of 16 bits."""
    return Image.fromarray((pixels.clip(0, 65535) >> 8).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """Lays an image with transparency, in a channel or as a colour of its own, on white."""
    if not image.has_transparency_data:
        return image
    # Pillow goes from grey with multiplied alpha by the plain one alone.
    whole = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), whole)
