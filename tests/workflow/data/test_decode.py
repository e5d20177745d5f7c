"""Any image becomes an upright one of 8 bits, without what is hidden in it."""

import io

import numpy as np
import pytest
from PIL import Image

from vitslim.workflow.data.decode import upright

WHITE, GREY = (255, 255, 255), (90, 90, 90)


def _reopened(image: Image.Image, form: str, **how) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    buffer.seek(0)
    return Image.open(buffer)


def _pixel(image: Image.Image, mode: str = "RGB"):
    made = upright(image, mode)
    assert made.mode == mode
    return made.getpixel((0, 0))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "LA", "YCbCr", "HSV", "RGBX", "CMYK"])
def test_every_mode_gives_its_colour(mode: str) -> None:
    image = Image.new("RGB", (4, 4), GREY).convert("L" if mode == "LA" else "RGB").convert(mode)
    near = 20 if mode == "P" else 2
    assert _pixel(image) == pytest.approx(GREY, abs=near)
    assert _pixel(image, "L") == pytest.approx(90, abs=near)


def test_lab_and_one_bit_are_converted() -> None:
    lab = Image.new("LAB", (2, 2), (255, 0, 0))
    assert _pixel(lab, "L") == lab.convert("RGB").convert("L").getpixel((0, 0))
    assert _pixel(Image.new("1", (2, 2), 1)) == WHITE


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (2, 2), (0, 0, 0, 0)),
        Image.new("LA", (2, 2), (0, 0)),
        Image.new("RGBa", (2, 2), (0, 0, 0, 0)),
        Image.new("La", (2, 2), (0, 0)),
        _reopened(Image.new("RGB", (2, 2)), "PNG", transparency=(0, 0, 0)),
        _reopened(Image.new("L", (2, 2)), "PNG", transparency=0),
        _reopened(Image.new("P", (2, 2)), "PNG", transparency=0),
        _reopened(Image.new("P", (2, 2)), "GIF", transparency=0),
    ],
    ids=["RGBA", "LA", "RGBa", "La", "tRNS of RGB", "tRNS of L", "palette", "GIF"],
)
def test_what_is_transparent_lies_on_white(image: Image.Image) -> None:
    assert _pixel(image) == WHITE
    assert _pixel(image, "L") == 255


def test_half_transparent_is_half_white() -> None:
    assert _pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 128))) == pytest.approx((127,) * 3, abs=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), WHITE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = _reopened(image, "PNG", exif=exif)
    made = upright(opened, "RGB")
    assert made.size == ((4, 2) if orientation < 5 else (2, 4))
    corner = ((0, 0), (0, 0), (-1, 0), (-1, -1), (0, -1), (0, 0), (-1, 0), (-1, -1), (0, -1))
    x, y = (at % size for at, size in zip(corner[orientation], made.size, strict=True))
    assert made.getpixel((x, y)) == WHITE
    # Twice is as good as once: an image in memory is read in every epoch.
    assert upright(opened, "RGB").tobytes() == made.tobytes()


def test_broken_exif_does_not_matter() -> None:
    image = Image.new("RGB", (2, 2), GREY)
    image.info["exif"] = b"Exif\0\0?????"
    assert _pixel(image) == GREY


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bits_keep_the_upper_eight(mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    values = np.array([[0x5A12, 0xFFFF]], order)
    image = Image.frombytes(mode, (2, 1), values.tobytes())
    assert [upright(image, "L").getpixel((x, 0)) for x in range(2)] == [0x5A, 255]


@pytest.mark.parametrize("form", ["PNG", "PPM", "TIFF"])
def test_sixteen_bits_of_any_file_keep_the_upper_eight(form: str) -> None:
    image = _reopened(Image.fromarray(np.full((2, 2), 0x5A12, np.uint16)), form)
    assert _pixel(image, "L") == 0x5A


def test_32_bits_are_read_where_they_are_surely_sixteen() -> None:
    values = np.full((2, 2), 0x5A12, np.int32)
    assert _pixel(_reopened(Image.fromarray(values), "TIFF"), "L") == 0x5A
    for changed in (values * 0 + 9, values * 10, -values):
        with pytest.raises(ValueError, match=r"mode I, may have any range, and are"):
            upright(_reopened(Image.fromarray(changed), "TIFF"), "L")
    with pytest.raises(ValueError, match="mode F, may have any range"):
        upright(Image.new("F", (2, 2)), "RGB")
