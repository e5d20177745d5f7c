"""Data: the digits' split, image folders, and what is said when they are not right."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vitslim.errors import VitslimError
from vitslim.workflow.data import Digits, Shard, open_data
from vitslim.workflow.settings import Settings, settings_for
from vitslim.workflow.world import World, seed_everything


def _folder_settings(images: Path) -> Settings:
    return settings_for("retrain", {"data": f"folder:{images}", "batch_size": 8, "workers": 0})


def _two_classes(**kwargs: int) -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **{"num_classes": 2, **sizes, **kwargs})


def test_digits_are_split_once_stratified_and_apart() -> None:
    train, held_out = Digits(True), Digits(False)
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.targets == Digits(True).targets
    counts = torch.bincount(torch.tensor(held_out.targets))
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert train.images[0].size == (8, 8)


def test_an_epoch_can_be_replayed_and_epochs_differ(tiny, quick, world) -> None:
    data = open_data(quick, tiny, world)

    def batches(epoch: int) -> torch.Tensor:
        seed_everything(quick.seed, epoch)
        return torch.cat([images for images, _ in data.epoch(epoch)])

    first = batches(0)
    assert not torch.equal(first, batches(1))
    assert torch.equal(first, batches(0))


def test_workers_do_not_change_with_the_epochs_before(tiny, quick, world) -> None:
    settings = dataclasses.replace(quick, workers=1)

    def last(epochs: tuple[int, ...]) -> torch.Tensor:
        data = open_data(settings, tiny, world)
        for epoch in epochs:
            seed_everything(settings.seed, epoch)
            images = torch.cat([images for images, _ in data.epoch(epoch)])
        return images

    assert torch.equal(last((0, 1)), last((1,)))


def test_shards_cover_every_image_once() -> None:
    dataset = Digits(False)
    dataset.transform = lambda image: image
    shards = [Shard(dataset, rank, 7) for rank in range(7)]
    assert sorted(i for shard in shards for i in shard.indices) == list(range(360))
    assert shards[3][1] == dataset[10]


def test_a_folder_gives_batches_of_the_models_size(images: Path, world: World) -> None:
    data = open_data(_folder_settings(images), _two_classes(), world)
    batch, target = next(iter(data.epoch(0)))
    assert batch.shape == (8, 3, 8, 8)
    assert data.steps == 4
    assert data.num_classes == 2
    assert sum(len(target) for _, target in data.held_out()) == 8
    # Class folders are numbered by name, and "light" is brighter.
    held_out = [(images.mean(), target) for images, target in data.held_out()]
    assert target.max() <= 1
    assert len(held_out) == 1


def test_validation_is_another_name_for_val(images: Path, world: World) -> None:
    (images / "val").rename(images / "validation")
    assert open_data(_folder_settings(images), _two_classes(), world).num_classes == 2


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda root: shutil.rmtree(root), "no image folder"),
        (lambda root: shutil.rmtree(root / "val"), "no folder val"),
        (lambda root: shutil.rmtree(root / "val/dark"), "different classes.*dark"),
        (lambda root: [shutil.rmtree(root / "train" / n) for n in ("dark", "light")], "no classes"),
        (lambda root: [p.unlink() for p in root.glob("train/*/*")], "no images"),
    ],
)
def test_a_broken_folder_is_one_sentence(images: Path, world: World, damage, sentence) -> None:
    damage(images)
    with pytest.raises(VitslimError, match=sentence):
        open_data(_folder_settings(images), _two_classes(), world)


def test_wrong_number_of_classes_is_refused(images: Path, world: World) -> None:
    with pytest.raises(VitslimError, match=r"2 classes and the model has 5.*num_classes=2"):
        open_data(_folder_settings(images), _two_classes(num_classes=5), world)


def test_a_batch_larger_than_the_data_is_refused(tiny, quick, world) -> None:
    with pytest.raises(VitslimError, match=r"1437 training images.*--batch-size"):
        open_data(dataclasses.replace(quick, batch_size=2000), tiny, world)


def test_an_unknown_dataset_is_refused(tiny, quick, world) -> None:
    with pytest.raises(VitslimError, match="cannot open the dataset 'nothing/here'"):
        open_data(dataclasses.replace(quick, data="nothing/here"), tiny, world)
