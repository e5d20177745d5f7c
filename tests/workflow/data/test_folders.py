"""Image folders and tars: every kind of image that Pillow reads, and what is passed over."""

import logging
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import nn

from vitslim.errors import VitslimError
from vitslim.workflow.data.batches import Data, open_data
from vitslim.workflow.data.kinds import endings, hidden
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.runtime.world import World

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def _model(classes: int = 2) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **SIZES)


def _open(root: Path, classes: int = 2) -> Data:
    given = {"data": f"folder:{root}", "batch_size": 8, "workers": 0}
    return open_data(settings_for("retrain", given), _model(classes), World(torch.device("cpu")))


def _tar(root: Path, inside: str = "") -> None:
    for name in ("train", "val"):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            tar.add(root / name, inside or ".")
        shutil.rmtree(root / name)


def _rewrite(root: Path, ending: str) -> None:
    """Writes the light images as another kind of file."""
    for file in root.glob("*/light/*.png"):
        Image.open(file).save(file.with_suffix(ending))
        file.unlink()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", [".BMP", ".webp", ".tif", ".gif", ".jfif", ".ppm", ".jp2"])
def test_every_kind_of_image_is_read(images: Path, ending: str, packed: bool, caplog) -> None:
    _rewrite(images, ending)
    if packed:
        _tar(images)
    before = get_img_extensions()
    ((batch, target),) = _open(images).held_out()
    assert target.tolist() == [0] * 4 + [1] * 4
    assert batch[target == 1].mean() > batch[target == 0].mean() + 0.5
    assert get_img_extensions() == before
    assert not caplog.records


def test_the_first_frame_of_several_is_read(images: Path) -> None:
    for file in images.glob("*/light/*.png"):
        image = Image.open(file)
        image.save(
            file.with_suffix(".gif"), save_all=True, append_images=[Image.new("RGB", (9, 9))]
        )
        file.unlink()
    ((batch, target),) = _open(images).held_out()
    assert batch[target == 1].mean() > batch[target == 0].mean() + 0.5


def test_endings_are_those_that_give_pixels() -> None:
    assert {".png", ".jpeg", ".bmp", ".tiff", ".webp", ".mpo"} <= endings()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf", ".npy"} & endings()


@pytest.mark.parametrize("packed", [False, True])
def test_files_passed_over_are_told_once(images: Path, packed: bool, caplog) -> None:
    for name in ("a.heic", "b.HEIC", "c.npy", ".DS_Store", "Thumbs.db", "._0.png"):
        (images / "train/dark" / name).write_bytes(b"?")
    for name in ("owl", ".cache", "__MACOSX"):
        (images / "train" / name).mkdir()
    shutil.copy(images / "train/dark/0.png", images / "train/.cache/0.png")
    if packed:
        _tar(images)
    with caplog.at_level(logging.WARNING):
        assert _open(images).steps == 4
    place = images / ("train.tar" if packed else "train")
    assert [record.getMessage() for record in caplog.records] == [
        f"folder:{place}: 3 files are no images that Pillow reads and are passed over "
        "(2 .heic, 1 .npy; the first is dark/a.heic), and 1 folder has no images (owl)."
    ]


def test_errors_begin_with_what_was_passed_over(images: Path) -> None:
    for split in ("train", "val"):
        (images / split / "owl").mkdir()
        (images / split / "owl/0.heic").write_bytes(b"?")
    told = (
        r"^folder:.*train: 1 file is no image .*owl/0\.heic\), and 1 folder has no images \(owl\)"
    )
    with pytest.raises(VitslimError, match=rf"{told}; .*2 classes and the model has 3"):
        _open(images, classes=3)
    shutil.rmtree(images / "val/dark")
    with pytest.raises(VitslimError, match=rf"{told}; .*different classes \(dark on one side\)"):
        _open(images)


@pytest.mark.parametrize("inside", ["", "train"])
def test_tars_of_a_folder_and_of_what_is_in_it_are_alike(images: Path, inside: str) -> None:
    _tar(images, inside)
    assert _open(images).num_classes == 2


def test_images_at_the_root_of_a_tar_are_in_no_class(images: Path) -> None:
    shutil.copy(images / "train/dark/0.png", images / "train/0.png")
    _tar(images)
    with pytest.raises(VitslimError, match="in no class"):
        _open(images)


def test_a_tar_within_a_tar_is_read_and_listed(images: Path, caplog) -> None:
    (images / "train/dark/notes.txt").write_text("?")
    for split in ("train", "val"):
        for folder in sorted((images / split).iterdir()):
            with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
                for file in sorted(folder.iterdir()):
                    tar.add(file, file.name)
            shutil.rmtree(folder)
    _tar(images)
    assert _open(images).num_classes == 2
    assert "dark/notes.txt" in caplog.text


@pytest.mark.parametrize(
    ("name", "is_hidden"),
    [("cat/0.png", False), ("./cat/0.png", False), ("../a", False), (".git/0.png", True)],
)
def test_hidden_names(name: str, is_hidden: bool) -> None:
    assert hidden(name) == is_hidden


def test_a_link_in_a_circle_is_refused_and_other_links_are_followed(images: Path) -> None:
    (images / "train/dark").rename(images / "away")
    (images / "train/dark").symlink_to("../away")
    assert _open(images).num_classes == 2
    (images / "away/up").symlink_to("../train")
    with pytest.raises(VitslimError, match=r"dark/up is a link to a folder that it lies in"):
        _open(images)


def test_a_folder_that_may_not_be_read_is_no_empty_one(images: Path, monkeypatch: Any) -> None:
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("val/dark"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(VitslimError, match=r"val/dark cannot be read \(Permission denied\)"):
        _open(images)
