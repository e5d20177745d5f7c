"""Images in batches: the embedded digits, an image folder, or any dataset timm knows."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from ..errors import VitslimError
from .latency import input_shape
from .settings import Settings
from .world import World

DIGITS_CLASSES = 10
# Mean and deviation of the training digits, of values from 0 to 1.
DIGITS_MEAN, DIGITS_STD = 0.305, 0.376


class Digits(torch.utils.data.Dataset[tuple[Any, int]]):
    """Scikit-learn's 1797 real handwritten digits, 8x8, as PIL images.

    Args:
        train: The fixed four fifths for training, or the held-out fifth, both stratified.
        mode: PIL mode, `L` or `RGB`.
    """

    def __init__(self, train: bool, mode: str = "L") -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype("uint8")
        halves = train_test_split(
            range(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0
        )
        indices = halves[0] if train else halves[1]
        self.images = [Image.fromarray(pixels[index]).convert(mode) for index in indices]
        self.targets = [int(digits.target[index]) for index in indices]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.targets[index]


class Shard(torch.utils.data.Dataset[Any]):
    """Every `size`-th image of a dataset, so that processes evaluate each image exactly once."""

    def __init__(self, dataset: Any, rank: int, size: int) -> None:
        self.dataset = dataset
        self.indices = range(rank, len(dataset), size)

    @property
    def transform(self) -> Any:
        """The transform of the whole dataset, where timm's loader puts its own."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


@dataclasses.dataclass
class Data:
    """Batches for training and evaluation, on the device."""

    train: Any
    evaluation: Any
    num_classes: int
    device: torch.device
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return len(self.train)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the training batches of an epoch. The caller has seeded torch for it."""
        sampler: Any = getattr(self.train, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.seed * 100_003 + epoch)
        return self._moved(self.train)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's share of the held-out batches."""
        return self._moved(self.evaluation)

    def _moved(self, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, target in loader:
            yield images.to(self.device, non_blocking=True), target.to(self.device)


def open_data(settings: Settings, model: nn.Module, world: World) -> Data:
    """Opens the data that `settings` names in the size and number of channels `model` takes.

    Args:
        settings: Data, batch size, augmentation and seed.
        model: A timm vision transformer; its number of classes must be that of the data.
        world: The processes that share the work.
    """
    shape = input_shape(model)
    train_set, eval_set, num_classes = _datasets(settings, channels=shape[0])
    _check_classes(settings, model, num_classes)
    if len(train_set) < settings.batch_size * world.size:
        raise VitslimError(
            f"{settings.data} has {len(train_set)} training images, fewer than one step of "
            f"{settings.batch_size * world.size}: lower --batch-size."
        )
    config = resolve_data_config({"input_size": shape}, model=model)
    if settings.data == "digits":
        config |= {"mean": (DIGITS_MEAN,) * shape[0], "std": (DIGITS_STD,) * shape[0]}
    elif shape[0] == 1 and len(config["mean"]) == 3:
        config |= {"mean": (0.5,), "std": (0.5,)}
    shared: dict[str, Any] = {
        "input_size": shape,
        "mean": config["mean"],
        "std": config["std"],
        "num_workers": settings.workers,
        # Fresh workers are seeded from torch's seed at every epoch, which makes epochs repeatable.
        "persistent_workers": False,
        "use_prefetcher": world.device.type == "cuda",
        "pin_memory": world.device.type == "cuda",
        "device": world.device,
    }
    train = create_loader(
        train_set,
        batch_size=settings.batch_size,
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
        distributed=world.size > 1,
        **shared,
    )
    if settings.data == "digits" and not settings.no_aug:
        train_set.transform = Compose([_small_affine(), train_set.transform])
    evaluation = create_loader(
        eval_set if world.size == 1 else Shard(eval_set, world.rank, world.size),
        batch_size=settings.batch_size,
        interpolation=config["interpolation"],
        crop_pct=settings.crop_pct or config["crop_pct"],
        **shared,
    )
    return Data(train, evaluation, num_classes, world.device, settings.seed)


def _small_affine() -> RandomAffine:
    return RandomAffine(
        10, (0.1, 0.1), (0.9, 1.1), shear=5, interpolation=InterpolationMode.BILINEAR
    )


def _datasets(settings: Settings, channels: int) -> tuple[Any, Any, int]:
    mode = "L" if channels == 1 else "RGB"
    if settings.data == "digits":
        return Digits(True, mode), Digits(False, mode), DIGITS_CLASSES
    if settings.data.startswith("folder:"):
        return _folder(Path(settings.data.removeprefix("folder:")).expanduser(), mode)
    try:
        train, held_out = (
            create_dataset(
                settings.data,
                root=settings.data_dir,
                split=split,
                is_training=split == "train",
                batch_size=settings.batch_size,
                input_img_mode=mode,
            )
            for split in ("train", "validation")
        )
    except Exception as error:
        raise VitslimError(
            f"timm cannot open the dataset {settings.data!r} in {settings.data_dir}: {error}. "
            "Data is digits, folder:PATH or the name of a timm dataset."
        ) from error
    classes: Any = getattr(train, "classes", None)
    if classes is None:
        classes = getattr(getattr(train, "reader", None), "class_to_idx", None)
    return train, held_out, len(classes or ())


def _folder(root: Path, mode: str) -> tuple[Any, Any, int]:
    """Opens PATH/train and PATH/val (or PATH/validation), one folder of images per class."""
    if not root.is_dir():
        raise VitslimError(f"There is no image folder {root}.")
    train = root / "train"
    held_out = next(
        (root / name for name in ("val", "validation") if (root / name).is_dir()), root / "val"
    )
    for folder in (train, held_out):
        if not folder.is_dir():
            raise VitslimError(f"{root} has no folder {folder.name}: train and val are needed.")
    names = [{path.name for path in f.iterdir() if path.is_dir()} for f in (train, held_out)]
    if not names[0]:
        raise VitslimError(f"{train} has no classes: one folder of images per class is needed.")
    if names[0] != names[1]:
        odd = sorted(names[0] ^ names[1])
        raise VitslimError(
            f"{train} and {held_out} have different classes ({', '.join(odd[:5])} on one side)."
        )
    try:
        sets = [create_dataset("", root=str(f), input_img_mode=mode) for f in (train, held_out)]
    except RuntimeError as error:
        raise VitslimError(f"{root} has no images: {error}.") from error
    return sets[0], sets[1], len(names[0])


def _check_classes(settings: Settings, model: nn.Module, num_classes: int) -> None:
    heads = getattr(model, "num_classes", num_classes)
    if num_classes and heads != num_classes:
        raise VitslimError(
            f"{settings.data} has {num_classes} classes and the model has {heads}: "
            f"give the model num_classes={num_classes}."
        )
