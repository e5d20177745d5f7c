"""Opening what --data names: the embedded digits, an image folder, or any dataset timm knows."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset

from ...errors import VitslimError
from ..options.settings import Settings
from ..runtime.world import World
from .folders import open_folder
from .hugging_face import STREAM, TABLE, Table, stream_keys
from .images import Images
from .kinds import endings, told_to_timm
from .streams import is_stream

DIGITS_CLASSES = 10
# Data whose images and labels have names that can be told.
NAMED_COLUMNS = (TABLE, STREAM, "tfds/", "wds/")
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
        class_names: Name of every class in the order of its number; empty where there are none.
        notes: What was passed over, which the user should hear of.
    """

    train: Any
    held_out: Any
    num_classes: int
    class_names: tuple[str, ...] = ()
    notes: list[str] = dataclasses.field(default_factory=list)


def open_datasets(settings: Settings, mode: str, world: World) -> Datasets:
    """Opens the data that `settings` names.

    Args:
        settings: Name, place and splits of the data, and what to do about bad images.
        mode: PIL mode, `L` or `RGB`.
        world: The processes that share a stream.
    """
    skip = settings.bad_images == "skip"
    _check_keys(settings)
    if settings.data == "digits":
        train, held_out = (Images(Digits(half), mode, "digits", skip) for half in (True, False))
        names = tuple(map(str, range(DIGITS_CLASSES)))
        return Datasets(train, held_out, DIGITS_CLASSES, names)
    if settings.data.startswith("folder:"):
        root = Path(settings.data.removeprefix("folder:")).expanduser()
        readers, places, count, notes = open_folder(root)
        train, held_out = (
            Images(reader, mode, str(place), skip)
            for reader, place in zip(readers, places, strict=True)
        )
        return Datasets(train, held_out, count, _names(readers[0]), notes)
    train = _open(settings, mode, settings.train_split, settings.train_num_samples, training=True)
    held_out = _open(settings, mode, settings.val_split, settings.val_num_samples, training=False)
    if is_stream(train) and settings.aug_repeats > 1:
        raise VitslimError(
            f"{settings.data} is a stream, in which no image comes twice: "
            "leave --aug-repeats out or take data that is read by index."
        )
    classes = _class_names(train)
    odd = set(classes) ^ set(_class_names(held_out))
    if odd and _class_names(held_out):
        raise VitslimError(
            f"{settings.data} has other classes in {settings.train_split} than in "
            f"{settings.val_split} ({', '.join(sorted(map(str, odd))[:5])} in one alone)."
        )
    _share(train, world.rank, world.size)
    # Shares of a held-out stream would be padded to equal length; a `Stream` counts images off.
    _share(held_out, 0, 1)
    return Datasets(
        _by_index(train, mode, settings),
        _by_index(held_out, mode, settings),
        len(classes),
        _names(train),
    )


def _check_keys(settings: Settings) -> None:
    given = settings.input_key or settings.target_key
    if given and not settings.data.lower().startswith(NAMED_COLUMNS):
        raise VitslimError(
            f"{settings.data} has no columns: leave out --input-key and --target-key, "
            "which are for hfds/, hfids/, tfds/ and wds/."
        )


def _names(dataset: Any) -> tuple[str, ...]:
    """Returns the names of the classes in the order of their numbers."""
    reader = getattr(dataset, "reader", dataset)
    numbers: Mapping[Any, int] = getattr(reader, "class_to_idx", None) or {}
    found = getattr(dataset, "classes", None) or sorted(numbers, key=lambda name: numbers[name])
    return tuple(map(str, found))


def _class_names(dataset: Any) -> Sequence[Any]:
    reader = getattr(dataset, "reader", dataset)
    found = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    return list(found or ())


def _open(settings: Settings, mode: str, split: str, images: int | None, training: bool) -> Any:
    kind = settings.data.lower()
    keys: dict[str, str | None] = {
        "input_key": settings.input_key,
        "target_key": settings.target_key,
    }
    try:
        if kind.startswith(TABLE):
            return Table(settings, split)
        names: dict[str, int] = {}
        if kind.startswith(STREAM):
            columns, names = stream_keys(settings, split)
            keys |= columns
        elif kind.startswith("wds/"):
            keys["input_key"] = _members(settings.input_key)
        # A name that timm does not know is any, and --data-dir a folder of images.
        with told_to_timm():
            dataset = create_dataset(
                settings.data,
                root=settings.data_dir,
                split=split,
                is_training=training,
                batch_size=settings.batch_size,
                num_samples=images,
                seed=settings.seed,
                # Of what a stream gives, every image is made upright before it is converted;
                # Tensorflow decodes images itself.
                input_img_mode=mode if kind.startswith("tfds/") else "",
                **{key: name for key, name in keys.items() if name},
            )
        if names:
            dataset.reader.class_to_idx = names
        return dataset
    except VitslimError:
        raise
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


def _members(given: str | None) -> str:
    """Names the members of a shard that may be images, as timm's reader of WebDataset takes them.

    It decodes whichever there is into a member `jpg`, which it must therefore find among them.
    """
    usual = ["jpg", "png", "webp", *sorted(ending[1:] for ending in endings())]
    return ";".join(dict.fromkeys([given, "jpg"] if given else usual))


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
