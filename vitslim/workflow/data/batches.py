"""Batches of images for training and evaluation, on the device."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Protocol

import torch
from timm.data import create_loader, resolve_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from ...errors import VitslimError
from ..latency import input_shape
from ..options.settings import Settings
from ..runtime.seeds import untouched_random
from ..runtime.world import World
from .datasets import DIGITS_MEAN, DIGITS_STD, open_datasets
from .fit import check_classes, check_size, classes_of
from .images import Images, reason, told
from .loading import Loader, Ordered, Streamed, around, within
from .posterize import allow_no_bits
from .streams import Stream, is_stream
from .synthetic import IMAGENET_TRAIN, IMAGENET_VAL, Synthetic

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


class Training(Protocol):
    """Training batches, epoch by epoch."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yields the batches of an epoch from number `start` on."""


@dataclasses.dataclass
class Data:
    """Batches for training and evaluation, on the device.

    Whoever takes them finds the random states of random, numpy and torch as they were, and closes
    the data in the end.
    """

    train: Training
    evaluation: Iterable[Batch]
    num_classes: int
    device: torch.device
    loaders: tuple[Loader, ...] = ()

    @property
    def steps(self) -> int:
        """Whole batches per epoch in this process."""
        return len(self.train)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the training batches of an epoch, from number `start` on."""
        return self._given(self.train.epoch(epoch, start))

    def held_out(self) -> Iterator[Batch]:
        """Yields this process's share of the held-out batches."""
        # A loader draws a seed for its workers when it begins: let that be in `_given` too.
        return self._given(chain.from_iterable([self.evaluation]))

    def close(self) -> None:
        """Ends the workers that load images; there may be more batches, from new ones."""
        for loader in self.loaders:
            loader.close()

    def _given(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with untouched_random(self.device):
                try:
                    batch = next(batches, None)
                except VitslimError as error:
                    raise told(error) from error
            if batch is None:
                return
            images, target = batch
            yield images.to(self.device, non_blocking=True), target.to(self.device)


def open_data(settings: Settings, model: nn.Module, world: World) -> Data:
    """Opens the data that `settings` names in the size and number of channels `model` takes.

    Args:
        settings: Data, batch size, augmentation and seed.
        model: A timm vision transformer; its number of classes must be that of the data.
        world: The processes that share the work.
    """
    shape = input_shape(model)
    if settings.synthetic:
        return _synthetic(settings, model, world)
    mode = mode_of(shape[0])
    opened = open_datasets(settings, mode, world)
    check_classes(settings, model, opened)
    classes = classes_of(model)
    if world.primary:
        for note in opened.notes:
            logger.warning("%s.", note)
    config = resolve_data_config({"input_size": shape}, model=model)
    config["mean"], config["std"] = image_statistics(model, settings, shape[0])
    images = _checked(opened.train, settings, mode, classes, fill=True)
    train = _training(images, settings, config, world)
    held_out = _checked(opened.held_out, settings, mode, classes)
    evaluation = evaluation_loader(held_out, settings, config, world)
    return Data(
        train,
        evaluation,
        opened.num_classes or classes,
        world.device,
        (within(train.loader), within(evaluation)),
    )


def mode_of(channels: int) -> str:
    """Returns the PIL mode of images for a model."""
    if channels not in (1, 3):
        raise VitslimError(
            f"The model takes images of {channels} channels, and files give 1 or 3: make it with "
            "--model-kwargs in_chans=3."
        )
    return "L" if channels == 1 else "RGB"


def image_statistics(
    model: nn.Module, settings: Settings, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation, per channel, that images for a model are normalised with."""
    if settings.data == "digits":
        return (DIGITS_MEAN,) * channels, (DIGITS_STD,) * channels
    config = resolve_data_config(model=model)
    if channels == 1 and len(config["mean"]) == 3:
        return (0.5,), (0.5,)
    return config["mean"], config["std"]


def _checked(
    dataset: Any, settings: Settings, mode: str, classes: int, fill: bool = False
) -> Images | Stream:
    """Checks labels against the model's classes, those of a stream as they come."""
    if is_stream(dataset):
        skip = settings.bad_images == "skip"
        return Stream(dataset, settings.data, mode, classes, skip, fill)
    dataset.check_labels(classes)
    return dataset


def _training(
    dataset: Images | Stream, settings: Settings, config: dict[str, Any], world: World
) -> Ordered | Streamed:
    if isinstance(dataset, Images):
        check_size(settings, len(dataset), world)
    allow_no_bits()
    try:
        loader = create_loader(
            _timms(dataset),
            is_training=True,
            no_aug=settings.no_aug,
            re_prob=settings.reprob,
            re_mode=settings.remode,
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=settings.hflip,
            color_jitter=settings.color_jitter,
            auto_augment=settings.aa,
            interpolation=settings.train_interpolation,
            **_common(dataset, settings, config, world),
        )
    except (AssertionError, ValueError) as error:
        raise VitslimError(f"timm does not know --aa {settings.aa} ({reason(error)}).") from error
    if settings.data == "digits" and not settings.no_aug:
        dataset.transform = Compose([_small_affine(), dataset.transform])
    if isinstance(dataset, Stream):
        return Streamed(loader, dataset, settings, world)
    return Ordered(loader, dataset, settings, world)


def evaluation_loader(
    dataset: Any, settings: Settings, config: dict[str, Any], world: World
) -> Any:
    """Makes the loader of this process's share of images as they are evaluated.

    Args:
        dataset: `Images` or some of them, or a `Stream`.
        settings: Batch size, crop and workers.
        config: timm's, of the model: size, mean, deviation, crop, interpolation.
        world: The processes that share the images.
    """
    share: Any = dataset.share(world.rank, world.size)
    loader = create_loader(
        _timms(share),
        interpolation=config["interpolation"],
        crop_pct=settings.crop_pct or config["crop_pct"],
        **_common(dataset, settings, config, world),
    )
    return around(
        loader,
        share,
        batch_size=settings.batch_size,
        persistent_workers=settings.workers > 0 and not isinstance(dataset, Stream),
    )


def _timms(dataset: Any) -> Any:
    """What timm gives its transform to, and asks for its length: of a stream, its own dataset."""
    return dataset.dataset if isinstance(dataset, Stream) else dataset


def _common(
    dataset: Any, settings: Settings, config: dict[str, Any], world: World
) -> dict[str, Any]:
    """What timm's loaders of training and evaluation have in common."""
    cuda = world.device.type == "cuda"
    return {
        "input_size": config["input_size"],
        "batch_size": settings.batch_size,
        "mean": config["mean"],
        "std": config["std"],
        # A stream must be read by a fresh worker in every epoch to be the same again.
        "num_workers": max(settings.workers, int(isinstance(dataset, Stream))),
        "persistent_workers": settings.workers > 0,
        # Also on the CPU, where normalising a batch at once takes less time than image by image.
        "use_prefetcher": True,
        "pin_memory": cuda,
        "device": world.device,
    }


def _small_affine() -> RandomAffine:
    return RandomAffine(
        10, (0.1, 0.1), (0.9, 1.1), shear=5, interpolation=InterpolationMode.BILINEAR
    )


def _synthetic(settings: Settings, model: nn.Module, world: World) -> Data:
    wanted = settings.train_num_samples or IMAGENET_TRAIN
    check_size(settings, wanted, world)
    held_out = len(range(world.rank, settings.val_num_samples or IMAGENET_VAL, world.size))
    classes = classes_of(model)
    train, evaluation = (
        Synthetic(
            images, settings.batch_size, input_shape(model), classes, world.device, settings.seed
        )
        for images in (wanted // world.size, held_out)
    )
    return Data(train, evaluation, classes, world.device)
