"""Which files of an image folder are images: those whose ending Pillow knows and can read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import PurePath

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions

# Formats that Pillow only names or cannot turn into pixels by itself: EPS needs Ghostscript, WMF
# needs Windows, of films it tells the size alone, and the others need handlers of their own.
NOT_READ = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC"}
# Pillow's plugin of JPEGs opens these files of several JPEGs, so that no plugin is listed for them.
READ_AS_JPEG = {"MPO"}
# What operating systems leave in folders, beside hidden files.
DROPPINGS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"}


def endings() -> frozenset[str]:
    """Returns the endings of image files, in small letters and with their dot.

    They are Pillow's, also those of plugins that are imported by now, and what timm was told.
    """
    return _pillows() | frozenset(get_img_extensions())


@cache
def _init() -> None:
    Image.init()


def _pillows() -> frozenset[str]:
    _init()
    read = (set(Image.OPEN) | READ_AS_JPEG) - NOT_READ
    return frozenset(e for e, form in Image.registered_extensions().items() if form in read)


@contextmanager
def told_to_timm() -> Iterator[None]:
    """Lets timm's readers find these endings too; those of tars take no argument for it."""
    before = get_img_extensions()
    set_img_extensions(sorted(endings()))
    try:
        yield
    finally:
        set_img_extensions(before)


def hidden(name: str) -> bool:
    """Returns whether a file, or a folder on the way to it, is hidden or an operating system's."""
    return any(
        part.startswith(".") or part.lower() in DROPPINGS or part == "Icon\r"
        for part in PurePath(name).parts
        if part != ".."
    )
