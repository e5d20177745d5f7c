"""Images that cannot be read: the file is named, and the run stops or goes on as asked."""

import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from trouble import trouble_of

from vitslim.errors import VitslimError
from vitslim.workflow.data import images as images_module
from vitslim.workflow.data.batches import Data, open_data
from vitslim.workflow.data.images import Images
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.runtime.world import World


@pytest.fixture
def model() -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes)


def _open(images: Path, model: nn.Module, workers: int, bad_images: str, **more: Any) -> Data:
    given = {"batch_size": 8, "workers": workers, "bad_images": bad_images, "no_aug": True}
    settings = settings_for("retrain", {"data": f"folder:{images}", "reprob": 0.0, **given, **more})
    return open_data(settings, model, World(torch.device("cpu")))


def _no_image(file: Path) -> None:
    file.write_bytes(b"no image at all")


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def _bomb(file: Path) -> None:
    """Says that it has ten thousand million pixels, at which Pillow raises no OSError."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    content = file.read_bytes()
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    file.write_bytes(content[:16] + header + checksum + content[33:])


def _gone(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere.png")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [_no_image, _truncated, _bomb, _gone])
def test_a_bad_image_stops_in_one_sentence_that_names_it(images, model, workers, damage) -> None:
    bad = images / "train/light/3.png"
    damage(bad)
    sentence = trouble_of(_open(images, model, workers, "stop"))
    assert sentence.startswith(f"{bad} cannot be read (")
    assert sentence.endswith("): repair or remove it, or pass --bad-images skip.")
    assert "\n" not in sentence


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_image_is_replaced_by_the_next_and_told_once(
    images, model, workers, tmp_path, monkeypatch
) -> None:
    good = _open(images, model, workers, "skip")
    expected = [torch.cat(column) for column in zip(*good.epoch(0), strict=True)]
    _no_image(images / "train/light/3.png")
    _bomb(images / "train/light/4.png")
    data = _open(images, model, workers, "skip")
    # In a file, for what a worker says does not come to this process.
    log = logging.FileHandler(tmp_path / "log")
    monkeypatch.setattr(images_module.logger, "handlers", [log])
    for _ in range(2):
        given = [torch.cat(column) for column in zip(*data.epoch(0), strict=True)]
        changed = (given[0] != expected[0]).flatten(1).any(dim=1)
        assert changed.sum() == 2
        # Image 5 stands in the places of images 3 and 4, beside its own.
        assert torch.equal(*given[0][changed])
        assert ((given[0] == given[0][changed][0]).flatten(1).all(dim=1)).sum() == 3
        assert torch.equal(given[1], expected[1])
    # Another worker meets the same images in another epoch.
    for epoch in range(1, 5):
        list(data.epoch(epoch))
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2
    for name in ("light/3.png", "light/4.png"):
        assert sum(f"{images}/train/{name} cannot be read" in line for line in lines) == 1


def test_a_bad_image_that_is_held_out_gives_its_place_to_the_next(images, model) -> None:
    _no_image(images / "val/dark/3.png")
    ((_, target),) = _open(images, model, 0, "skip").held_out()
    # The first light image takes the place of the last dark one, with its own label.
    assert target.tolist() == [0] * 3 + [1] * 5


def test_an_image_without_a_file_is_told_by_number() -> None:
    class Broken:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise EOFError

    with pytest.raises(VitslimError, match=r"^Image 1 in cifar cannot be read \(EOFError\)"):
        Images(Broken(), "RGB", "cifar")[1]


def test_nothing_but_bad_images_stops_whatever_was_asked(images, model, monkeypatch) -> None:
    for file in (images / "train/light").iterdir():
        _no_image(file)
    monkeypatch.setattr(images_module, "PATIENCE", 10)
    with pytest.raises(VitslimError, match=r"none of the images after it.*train is still there"):
        list(_open(images, model, 0, "skip").epoch(0))


def test_sixteen_bits_become_eight_and_are_not_white(images, model) -> None:
    grey = np.arange(144, dtype=np.uint16).reshape(12, 12) * 400
    for file in (images / "val").glob("*/*.png"):
        Image.fromarray(grey).save(file)
    ((batch, _),) = _open(images, model, 0, "stop").held_out()
    assert batch.std() > 0.1
    Image.fromarray(grey.astype(np.float32)).save(images / "val/dark/0.png", "TIFF")
    with pytest.raises(VitslimError, match="32-bit pixels, mode F, may have any range"):
        list(_open(images, model, 0, "stop").held_out())


def test_a_bad_image_is_named_once_in_a_relative_folder(images, model, monkeypatch) -> None:
    monkeypatch.chdir(images.parent)
    _no_image(images / "train/light/3.png")
    sentence = trouble_of(_open(Path(images.name), model, 0, "stop"))
    assert sentence.startswith("images/train/light/3.png cannot be read (it is no image")


def test_an_image_of_another_mode_is_converted(images, model) -> None:
    file = images / "val/dark/0.png"
    Image.open(file).convert("P").save(file)
    ((batch, _),) = _open(images, model, 0, "stop").held_out()
    assert batch.shape == (8, 3, 8, 8)
