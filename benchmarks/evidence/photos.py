"""The images of a study: a folder of links that the library trains on, and tensors to judge by."""

import random
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from vitslim import VitslimError
from vitslim.workflow.data.folders import Folder
from vitslim.workflow.latency import input_shape

Labelled = tuple[Tensor, Tensor]


class Photos:
    """The photos of PATH/train, and those of PATH/val and PATH/test, which are held out.

    Args:
        data: PATH, with a folder of images for each class in each of its splits.
        links: Folder that gets `train` and `val`, of links to the photos that take part.
        train_limit: How many of a class train, the first by name; None for all.
        val_limit: How many of a class of a split are held out; None for all.
    """

    def __init__(
        self,
        data: Path,
        links: Path,
        train_limit: int | None = None,
        val_limit: int | None = None,
    ) -> None:
        self.name, self.links = data.name, links
        splits = [name for name in ("val", "validation", "test") if (data / name).is_dir()]
        if not splits or not (data / "train").is_dir():
            raise VitslimError(f"{data} has no folders train and val")
        self.splits = splits
        _link(data, ["train"], links / "train", train_limit)
        _link(data, splits, links / "val", val_limit)
        self.train, self.val = Folder(links / "train"), Folder(links / "val")
        if self.train.class_to_idx != self.val.class_to_idx:
            raise VitslimError(f"{data} has other classes in train than in {', '.join(splits)}")

    @property
    def facts(self) -> dict[str, Any]:
        """Name, splits and numbers of images; no place on this machine."""
        return {
            "data": self.name,
            "held_out": " + ".join(self.splits),
            "classes": len(self.train.class_to_idx),
            "train_images": len(self.train),
            "held_out_images": len(self.val),
        }


class Shown:
    """The photos as a model takes them: decoded once, with its own evaluation transform."""

    def __init__(self, photos: Photos, model: nn.Module) -> None:
        config = resolve_data_config({"input_size": input_shape(model)}, model=model)
        self._photos = photos
        self._transform = create_transform(
            **{name: config[name] for name in ("input_size", "mean", "std", "interpolation")},
            crop_pct=config["crop_pct"],
            is_training=False,
        )

    @cached_property
    def held_out(self) -> Labelled:
        """All held-out images [n, 3, height, width], normalised, and their classes [n]."""
        val = self._photos.val
        return self._read(val.files), torch.tensor(val.targets)

    @lru_cache(maxsize=2)  # noqa: B019 - there is one of these in a process
    def calibration(self, count: int, seed: int) -> Labelled:
        """Training images drawn by a seed, `count` of them or all, and their classes."""
        train = self._photos.train
        drawn = random.Random(seed).sample(range(len(train)), min(count, len(train)))
        targets = torch.tensor([train.targets[each] for each in drawn])
        return self._read([train.files[each] for each in drawn]), targets

    def _read(self, files: Sequence[str]) -> Tensor:
        return torch.stack([self._transform(Image.open(file).convert("RGB")) for file in files])


def _link(data: Path, splits: Sequence[str], place: Path, limit: int | None) -> None:
    """Makes links to the first photos of every class."""
    for split in splits:
        taken: dict[int, int] = {}
        found = Folder(data / split)
        for file, target in zip(found.files, found.targets, strict=True):
            taken[target] = taken.get(target, 0) + 1
            if limit is None or taken[target] <= limit:
                source = Path(file).resolve()
                link = place / Path(file).parent.name / f"{split}-{source.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                # Perhaps by another process of the same study.
                with suppress(FileExistsError):
                    link.symlink_to(source)
