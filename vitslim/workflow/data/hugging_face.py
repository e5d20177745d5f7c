"""Hugging Face datasets: which column has the images and which the labels, and their rows."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import VitslimError
from ..options.settings import Settings

TABLE, STREAM = "hfds/", "hfids/"


class Table:
    """The rows of a split by index, each an open file and its label.

    It gives what timm's reader gives. That one has to know the columns before it has seen them,
    and in timm 1.0.16 fails at labels without names.

    Args:
        settings: Data, where it lives, and its columns where they were named.
        split: Of the data.
    """

    def __init__(self, settings: Settings, split: str) -> None:
        import datasets

        self.where, self.split = settings.data, split
        name = settings.data[len(TABLE) :]
        table = datasets.load_dataset(name, split=split, cache_dir=settings.data_dir)
        self.image, self.target = columns(table.features, settings)
        self.class_to_idx = class_names(table.features, self.target)
        try:
            self.dataset = table.cast_column(self.image, datasets.Image(decode=False))
        # Which one it is depends on what the column is and on the version of pyarrow.
        except (TypeError, ValueError, NotImplementedError) as error:
            raise VitslimError(
                f"Column {self.image} of {self.where} holds no images but "
                f"{table.features[self.image]}: name another one with --input-key."
            ) from error

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.dataset[index]
        image = row[self.image] or {}
        if image.get("bytes"):
            return io.BytesIO(image["bytes"]), row[self.target]
        if not image.get("path"):
            raise ValueError(f"column {self.image} is empty in this row")
        return Path(image["path"]).open("rb"), row[self.target]

    def filename(self, index: int, absolute: bool = False) -> str:
        """Returns what the file of an image was called, after its row."""
        path = (self.dataset[index][self.image] or {}).get("path")
        row = f"Row {index} of split {self.split}"
        return f"{row} ({path})" if path else row

    def labels(self) -> list[Any]:
        """Returns the label of every row, without touching the images."""
        table = self.dataset.select_columns(self.target).with_format("arrow")[:]
        values: list[Any] = table[self.target].to_pylist()
        return values


def stream_keys(settings: Settings, split: str) -> tuple[dict[str, str], dict[str, int]]:
    """Returns the columns of a stream as timm's reader takes them, and the classes by name."""
    import datasets

    name = settings.data[len(STREAM) :]
    builder = datasets.load_dataset_builder(name, cache_dir=settings.data_dir)
    features = builder.info.features
    if features is None:
        stream = builder.as_streaming_dataset(split=split)
        features = stream.features or stream._resolve_features().features
    image, target = columns(features, settings)
    return {"input_key": image, "target_key": target}, class_names(features, target)


def columns(features: Mapping[str, Any], settings: Settings) -> tuple[str, str]:
    """Returns the columns of images and of labels: those named, those usual, or the only ones."""
    from datasets import ClassLabel, Image

    return (
        _column(features, settings, "input_key", "image", Image),
        _column(features, settings, "target_key", "label", ClassLabel),
    )


def class_names(features: Mapping[str, Any], target: str) -> dict[str, int]:
    """Returns the classes by name, where a column of labels says them."""
    names = getattr(features[target], "names", None) or ()
    return {name: number for number, name in enumerate(names)}


def _column(
    features: Mapping[str, Any], settings: Settings, setting: str, usual: str, kind: type
) -> str:
    given, option = getattr(settings, setting), f"--{setting.replace('_', '-')}"
    if given:
        if given in features:
            return str(given)
        raise VitslimError(
            f"{settings.data} has no column {given!r}, only {', '.join(features)}: "
            f"correct {option}."
        )
    if usual in features:
        return usual
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if found:
        raise VitslimError(
            f"{settings.data} has several columns of {usual}s ({', '.join(found)}): "
            f"name one with {option}."
        )
    raise VitslimError(
        f"{settings.data} does not say which of its columns has the {usual}s "
        f"({', '.join(features)}): name it with {option}."
    )
