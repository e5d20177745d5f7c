"""Opening what --data names: the embedded digits, an image folder, or any dataset timm knows."""

import dataclasses
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset

from ...errors import VitslimError
from ..options.settings import Settings
from ..training.world import World
from .folders import open_folder
from .images import Images
from .streams import is_stream

DIGITS_CLASSES = 10
# Mean and deviation of the training digits, of values from 0 to 1.
DIGITS_MEAN, DIGITS_STD = 0.305, 0.376


class Digits(Dataset[tuple[Any, int]]):
    """Scikit-learn's 1797 real handwritten digits, 8x8, as PIL images.

    Args:
        train: The fixed four fifths for training, or the held-out fifth, both stratified.
    """

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise VitslimError(
                "--data digits needs a package that is not installed: pip install scikit-learn."
            ) from None

        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype("uint8")
        halves = train_test_split(
            range(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0
        )
        indices = halves[0] if train else halves[1]
        self.images = [Image.fromarray(pixels[index]) for index in indices]
        self.targets = [int(digits.target[index]) for index in indices]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.targets[index]


@dataclasses.dataclass
class Datasets:
    """Images to train on and held-out ones, each `Images` or a stream of timm's.

    Attributes:
        train: Images to train on.
        held_out: Images to evaluate on.
        num_classes: 0 where the data does not say it.
        notes: What was passed over, which the user should hear of.
    """

    train: Any
    held_out: Any
    num_classes: int
    notes: list[str] = dataclasses.field(default_factory=list)


def open_datasets(settings: Settings, mode: str, world: World) -> Datasets:
    """Opens the data that `settings` names.

    Args:
        settings: Name, place and splits of the data, and what to do about bad images.
        mode: PIL mode, `L` or `RGB`.
        world: The processes that share a stream.
    """
    skip = settings.bad_images == "skip"
    if settings.data == "digits":
        train, held_out = (Images(Digits(half), mode, "digits", skip) for half in (True, False))
        return Datasets(train, held_out, DIGITS_CLASSES)
    if settings.data.startswith("folder:"):
        root = Path(settings.data.removeprefix("folder:")).expanduser()
        readers, places, count, notes = open_folder(root)
        train, held_out = (
            Images(reader, mode, str(place), skip)
            for reader, place in zip(readers, places, strict=True)
        )
        return Datasets(train, held_out, count, notes)
    train = _timm(settings, mode, settings.train_split, settings.train_num_samples, training=True)
    held_out = _timm(settings, mode, settings.val_split, settings.val_num_samples, training=False)
    if is_stream(train) and settings.aug_repeats > 1:
        raise VitslimError(
            f"{settings.data} is a stream, in which no image comes twice: "
            "leave --aug-repeats out or take data that is read by index."
        )
    reader = getattr(train, "reader", None)
    classes = getattr(train, "classes", None) or getattr(reader, "class_to_idx", None) or ()
    _share(train, world.rank, world.size)
    # Shares of a held-out stream would be padded to equal length; a `Stream` counts images off.
    _share(held_out, 0, 1)
    return Datasets(
        _by_index(train, mode, settings), _by_index(held_out, mode, settings), len(classes)
    )


def _timm(settings: Settings, mode: str, split: str, images: int | None, training: bool) -> Any:
    try:
        return create_dataset(
            settings.data,
            root=settings.data_dir,
            split=split,
            is_training=training,
            batch_size=settings.batch_size,
            num_samples=images,
            seed=settings.seed,
            # Of what a stream gives, every image is made upright before it is converted; Tensorflow
            # decodes images itself.
            input_img_mode=mode if settings.data.lower().startswith("tfds/") else "",
        )
    # Whatever the packages that timm opens data with may raise.
    except Exception as error:
        if "num_samples" in str(error):
            option = "--train-num-samples" if training else "--val-num-samples"
            raise VitslimError(
                f"{settings.data} does not say how many images {split} has: give {option}."
            ) from error
        if Path(settings.data).is_dir():
            raise VitslimError(
                f"{settings.data} is a folder: write --data folder:{settings.data}."
            ) from error
        where = f"in {settings.data_dir}" if settings.data_dir else "without --data-dir"
        raise VitslimError(
            f"timm cannot open the dataset {settings.data!r}, split {split}, {where}: {error}. "
            "Data is digits, folder:PATH or the name of a timm dataset."
        ) from error


def _share(dataset: Any, rank: int, size: int) -> None:
    """Tells timm's reader of a stream which process this is."""
    if is_stream(dataset):
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, size


def _by_index(dataset: Any, mode: str, settings: Settings) -> Any:
    if is_stream(dataset):
        return dataset
    # timm's own dataset goes on at what it takes for a bad image, whatever was asked for.
    source = dataset.reader if isinstance(dataset, ImageDataset) else dataset
    return Images(source, mode, settings.data, settings.bad_images == "skip")
