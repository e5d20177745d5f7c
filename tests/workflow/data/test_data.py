"""Data: the same batches however they are loaded, and what is said when data is not right."""

import dataclasses
import random
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_loader
from timm.data.auto_augment import AugmentOp
from torch import Tensor, nn

from vitslim.errors import VitslimError
from vitslim.workflow.data.batches import open_data
from vitslim.workflow.data.datasets import Digits, open_datasets
from vitslim.workflow.data.images import Shard
from vitslim.workflow.data.loading import Ordered
from vitslim.workflow.data.synthetic import DIFFERENT_BATCHES
from vitslim.workflow.options.settings import Settings, settings_for
from vitslim.workflow.runtime.world import World

CPU = torch.device("cpu")


def _settings(images: Path, **given: Any) -> Settings:
    data = {"data": f"folder:{images}", "batch_size": 8, "workers": 0}
    return settings_for("retrain", {**data, **given})


def _two_classes(**kwargs: int) -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **{"num_classes": 2, **sizes, **kwargs})


def _epoch(
    settings: Settings, world: World | None = None, epoch: int = 1, start: int = 0
) -> tuple[Tensor, Tensor]:
    """All batches of an epoch: images [steps, B, C, H, W] and targets [steps, B]."""
    data = open_data(settings, _two_classes(), world or World(CPU))
    images, targets = zip(*data.epoch(epoch, start), strict=True)
    return torch.stack(images), torch.stack(targets)


def _tar(folder: Path) -> None:
    """Replaces a folder by a tar of it."""
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        for child in sorted(folder.iterdir()):
            tar.add(child, child.name)
    shutil.rmtree(folder)


def test_digits_are_split_once_stratified_and_apart() -> None:
    train, held_out = Digits(True), Digits(False)
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.targets == Digits(True).targets
    counts = torch.bincount(torch.tensor(held_out.targets))
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert train.images[0].size == (8, 8)


def test_epochs_of_digits_can_be_replayed_and_differ(tiny, quick, world) -> None:
    data = open_data(quick, tiny, world)

    def batches(epoch: int) -> Tensor:
        return torch.cat([images for images, _ in data.epoch(epoch)])

    first = batches(0)
    assert first.shape == (1280, 1, 8, 8)
    assert not torch.equal(first, batches(1))
    assert torch.equal(first, batches(0))


def test_pixels_do_not_depend_on_workers_or_on_what_was_drawn_before(images: Path) -> None:
    expected, targets = _epoch(_settings(images))
    assert 0 < targets.float().mean() < 1
    for workers in (0, 2):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        given = _epoch(_settings(images, workers=workers))
        assert torch.equal(given[0], expected)
        assert torch.equal(given[1], targets)


@pytest.mark.parametrize("repeats", [0, 3])
def test_pixels_do_not_depend_on_the_number_of_processes(images: Path, repeats: int) -> None:
    expected, targets = _epoch(_settings(images, aug_repeats=repeats))
    settings = _settings(images, aug_repeats=repeats, batch_size=4)
    for rank in range(2):
        share = _epoch(settings, World(CPU, rank, 2))
        assert torch.equal(share[0], expected[:, rank::2])
        assert torch.equal(share[1], targets[:, rank::2])


def test_an_epoch_can_begin_at_any_batch_also_after_one_left_early(images: Path) -> None:
    expected, _ = _epoch(_settings(images))
    for workers in (0, 1):
        data = open_data(_settings(images, workers=workers), _two_classes(), World(CPU))
        next(data.epoch(0))
        for start in (3, 0):
            given = torch.stack([images for images, _ in data.epoch(1, start)])
            assert torch.equal(given, expected[start:])


def test_randaugment_posterizes_down_to_black(images: Path) -> None:
    pixels, _ = _epoch(_settings(images, aa="rand-m10-n9-inc1"))
    assert pixels.isfinite().all()
    darkest = AugmentOp("PosterizeIncreasing", prob=1, magnitude=10)
    assert darkest(Image.new("RGB", (2, 2), "white")).getcolors() == [(4, (0, 0, 0))]


def test_repeats_of_an_image_are_augmented_apart(images: Path) -> None:
    pixels, targets = _epoch(_settings(images, aug_repeats=2))
    assert pixels.shape[:2] == (4, 8)
    assert torch.equal(targets[:, ::2], targets[:, 1::2])
    alike = pixels[:, ::2].flatten(2) == pixels[:, 1::2].flatten(2)
    assert not alike.all(dim=2).any()
    # What is not augmented is twice the same.
    pixels, _ = _epoch(_settings(images, aug_repeats=2, no_aug=True, reprob=0.0))
    assert torch.equal(pixels[:, ::2], pixels[:, 1::2])


def test_loading_leaves_the_callers_random_states_alone(images: Path) -> None:
    data = open_data(_settings(images), _two_classes(), World(CPU))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert len(list(data.epoch(0))) == data.steps
    assert len(list(data.held_out())) == 1
    assert (random.random(), np.random.random(), torch.rand(())) == expected


def test_processes_evaluate_every_image_once_and_the_same_each_time(images: Path) -> None:
    def held_out(rank: int = 0, size: int = 1) -> Tensor:
        data = open_data(_settings(images), _two_classes(), World(CPU, rank, size))
        assert torch.equal(*(torch.cat([i for i, _ in data.held_out()]) for _ in range(2)))
        return torch.cat([images for images, _ in data.held_out()])

    alone = held_out()
    assert len(alone) == 8
    for rank in range(3):
        assert torch.equal(held_out(rank, 3), alone[rank::3])


def test_shards_cover_every_image_once() -> None:
    dataset = Digits(False)
    shards = [Shard(dataset, range(rank, len(dataset), 7)) for rank in range(7)]
    assert sorted(i for shard in shards for i in shard.indices) == list(range(360))
    assert shards[3][1] == dataset[10]


def test_a_folder_gives_batches_of_the_models_size(images: Path, world: World) -> None:
    data = open_data(_settings(images), _two_classes(), world)
    batch, target = next(data.epoch(0))
    assert batch.shape == (8, 3, 8, 8)
    assert data.steps == 4
    assert data.num_classes == 2
    # Class folders are numbered by name, and "light" is brighter.
    ((batch, target),) = data.held_out()
    assert batch[target == 1].mean() > batch[target == 0].mean() + 0.5
    assert target.tolist() == [0] * 4 + [1] * 4


def test_validation_is_another_name_for_val(images: Path, world: World) -> None:
    (images / "val").rename(images / "validation")
    assert open_data(_settings(images), _two_classes(), world).num_classes == 2


def test_a_class_may_be_called_validation(images: Path, world: World) -> None:
    for split in ("train", "val"):
        (images / split / "light").rename(images / split / "validation")
    assert open_data(_settings(images), _two_classes(), world).num_classes == 2


def test_tars_give_what_their_folders_give(images: Path) -> None:
    expected = _epoch(_settings(images))
    for name in ("train", "val"):
        _tar(images / name)
    for workers in (0, 2):
        given = _epoch(_settings(images, workers=workers))
        assert torch.equal(given[0], expected[0])
        assert torch.equal(given[1], expected[1])
    assert sorted(path.name for path in images.iterdir()) == ["train.tar", "val.tar"]


def test_hugging_face_datasets_give_what_their_folders_give(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="pip install datasets")
    expected = _epoch(_settings(images))
    settings = _settings(images, data=f"hfds/{images}", data_dir=str(tmp_path / "cache"))
    given = _epoch(settings)
    assert given[0].shape == expected[0].shape
    assert sorted(given[1].flatten()) == sorted(expected[1].flatten())
    data = open_data(settings, _two_classes(), World(CPU))
    assert data.num_classes == 2
    folder = open_data(_settings(images), _two_classes(), World(CPU))
    assert torch.equal(next(data.held_out())[0], next(folder.held_out())[0])
    with pytest.raises(VitslimError, match="2 classes and the model has 5"):
        open_data(settings, _two_classes(num_classes=5), World(CPU))


def test_a_dataset_of_torchvision_is_converted_to_the_models_channels(images: Path) -> None:
    settings = _settings(
        images, data="torch/image_folder", data_dir=str(images), val_split="val", reprob=0.0
    )
    data = open_data(settings, _two_classes(in_chans=1), World(CPU))
    assert data.num_classes == 2
    assert next(data.epoch(0))[0].shape == (8, 1, 8, 8)


@pytest.mark.parametrize("size", [1, 2])
def test_synthetic_images_need_no_data_and_bear_being_written_to(size: int) -> None:
    settings = settings_for(
        "retrain",
        {"data": "folder:/nowhere", "synthetic": True, "batch_size": 64, "val_num_samples": 149},
    )
    data = open_data(settings, _two_classes(num_classes=5), World(CPU, size - 1, size))
    assert data.num_classes == 5
    assert data.steps == 1281167 // (64 * size)
    first = next(data.epoch(0))
    expected = first[0].clone()
    first[0].zero_()
    assert torch.equal(next(data.epoch(1, DIFFERENT_BATCHES))[0], expected)
    assert not torch.equal(next(data.epoch(0, 1))[0], expected)
    assert expected.std() == pytest.approx(1, abs=0.05)
    assert set(first[1].tolist()) == set(range(5))
    # The last process has the smaller half.
    assert [len(target) for _, target in data.held_out()] == ([64, 64, 21], [64, 10])[size - 1]


def test_synthetic_epochs_have_the_length_asked_for(tiny, quick, world) -> None:
    settings = dataclasses.replace(quick, synthetic=True, train_num_samples=600)
    data = open_data(settings, tiny, world)
    assert data.steps == len(list(data.epoch(0))) == 2
    assert len(list(data.epoch(0, 1))) == 1


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda root: shutil.rmtree(root), "no image folder"),
        (lambda root: shutil.rmtree(root / "val"), r"no folder val and no val\.tar"),
        (lambda root: shutil.rmtree(root / "val/dark"), "different classes.*dark"),
        # timm numbers the classes that have images.
        (lambda root: [p.unlink() for p in root.glob("val/dark/*")], "different classes.*dark"),
        (lambda root: [shutil.rmtree(root / "train" / n) for n in ("dark", "light")], "no images"),
        (lambda root: [p.unlink() for p in root.glob("train/*/*")], "train has no images"),
        (lambda root: [shutil.rmtree(p / "dark") for p in root.iterdir()], "one class alone"),
        (lambda root: (root / "val/dark/0.png").rename(root / "val/0.png"), "in no class"),
        (lambda root: [_tar(root / "val"), (root / "val.tar").write_text("?")], "val.tar has no"),
    ],
)
def test_a_broken_folder_is_one_sentence(images: Path, world: World, damage, sentence) -> None:
    damage(images)
    with pytest.raises(VitslimError, match=sentence):
        open_data(_settings(images), _two_classes(), world)


def test_wrong_number_of_classes_is_refused(images: Path, world: World) -> None:
    with pytest.raises(VitslimError, match=r"2 classes and the model has 5.*num_classes=2"):
        open_data(_settings(images), _two_classes(num_classes=5), world)


def test_a_batch_larger_than_the_data_is_refused(tiny, quick, world) -> None:
    with pytest.raises(VitslimError, match=r"1437 training images.*--batch-size"):
        open_data(dataclasses.replace(quick, batch_size=2000), tiny, world)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [({"in_chans": 4}, "4 channels.*in_chans=3"), ({"global_pool": ""}, "global_pool=avg")],
)
def test_a_model_that_cannot_take_or_tell_is_refused(images, world, changed, sentence) -> None:
    with pytest.raises(VitslimError, match=sentence):
        open_data(_settings(images), _two_classes(**changed), world)


def test_a_folder_without_its_prefix_is_told_how_to_be_written(images, tiny, quick, world) -> None:
    with pytest.raises(VitslimError, match=rf"write --data folder:{images}"):
        open_data(dataclasses.replace(quick, data=str(images)), tiny, world)


def test_an_unknown_dataset_is_refused(tiny, quick, world) -> None:
    with pytest.raises(VitslimError, match="cannot open the dataset 'nothing/here'"):
        open_data(dataclasses.replace(quick, data="nothing/here"), tiny, world)


def test_what_the_prefetcher_erases_does_not_depend_on_start_or_processes(images: Path) -> None:
    def epoch(start: int = 0, rank: int = 0, size: int = 1) -> Tensor:
        settings = _settings(images, batch_size=8 // size, no_aug=True)
        dataset = open_datasets(settings, "RGB", World(CPU)).train
        loader = create_loader(
            dataset, (3, 8, 8), settings.batch_size, re_prob=0.9, device=CPU, is_training=True
        )
        batches = Ordered(loader, dataset, settings, World(CPU, rank, size)).epoch(2, start)
        return torch.stack([images for images, _ in batches])

    expected = epoch()
    assert torch.equal(epoch(start=2), expected[2:])
    for rank in range(2):
        assert torch.equal(epoch(rank=rank, size=2), expected[:, rank::2])


def test_digits_without_scikit_learn_are_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(VitslimError, match=r"--data digits needs .*: pip install scikit-learn"):
        Digits(train=True)
