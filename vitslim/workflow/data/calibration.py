"""Images to look at before a model is cut: some of those to train on, without augmentation."""

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ...errors import VitslimError
from ..latency import input_shape
from ..options.settings import Settings
from ..runtime.seeds import untouched_random
from ..runtime.world import World
from .batches import evaluation_loader, image_statistics, mode_of, open_data
from .datasets import open_datasets
from .fit import classes_of
from .folders import Folder
from .images import Images, told
from .loading import within
from .streams import Stream, is_stream


class Calibration(NamedTuple):
    """Normalised images of a model's size, on its device, and their labels where there are any."""

    images: Tensor
    labels: Tensor | None


def folder_without_labels(settings: Settings) -> Path | None:
    """Returns the folder of images that `settings` names if they are in no classes, else None.

    In PATH/train, or in PATH itself where there is no train, they lie in no folders of classes; or
    there is no PATH/val, so that whatever classes there are, nothing can be evaluated.
    """
    if not settings.data.startswith("folder:") or settings.synthetic:
        return None
    root = Path(settings.data.removeprefix("folder:")).expanduser()
    if not root.is_dir() or (root / "train.tar").is_file():
        return None
    train = root / "train"
    held_out = (root / "val", root / "validation", root / "val.tar", root / "validation.tar")
    if not train.is_dir() or not any(each.exists() for each in held_out):
        return train if train.is_dir() else root
    return train if set(Folder(train).class_to_idx) == {""} else None


def calibration(settings: Settings, model: nn.Module, world: World, count: int) -> Calibration:
    """Reads `count` training images, or all there are, chosen by the seed and as for evaluation.

    Every process reads the same ones.

    Args:
        settings: Data, crop, seed and workers.
        model: A timm vision transformer, which tells the size and how images are normalised.
        world: Whose device they go to.
        count: How many images are wanted.

    Raises:
        VitslimError: There are no images, or one cannot be read.
    """
    alone = World(world.device)
    if settings.synthetic:
        with closing(open_data(settings, model, alone)) as data:
            return _together(data.epoch(0), count, world.device, True)
    shape = input_shape(model)
    mode = mode_of(shape[0])
    where = folder_without_labels(settings)
    source: Any
    if where is not None:
        folder = Folder(where)
        if not len(folder):
            raise VitslimError(f"There are no images in {where} to look at: give a folder of some.")
        source = Images(folder, mode, str(where), settings.bad_images == "skip")
    else:
        source = open_datasets(settings, mode, alone).train
        if is_stream(source):
            skip = settings.bad_images == "skip"
            source = Stream(source, settings.data, mode, classes_of(model), skip)
        else:
            source.check_labels(classes_of(model))
            if not len(source):
                raise VitslimError(f"{settings.data} has no training images to look at.")
    if isinstance(source, Images):
        source = source.some(chosen(len(source), count, settings.seed))
    config = resolve_data_config({"input_size": shape}, model=model)
    config["mean"], config["std"] = image_statistics(model, settings, shape[0])
    loader = evaluation_loader(source, settings, config, alone)
    with closing(within(loader)):
        return _together(loader, count, world.device, where is None)


def chosen(images: int, count: int, seed: int) -> list[int]:
    """Chooses images by number, in order."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def _together(batches: Any, count: int, device: torch.device, labelled: bool) -> Calibration:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    # A loader draws seeds for its workers.
    with untouched_random(device):
        try:
            for batch, target in islice(batches, count):
                left = count - sum(map(len, images))
                images.append(batch[:left].to(device))
                labels.append(target[:left].to(device))
                if left <= len(batch):
                    break
        except VitslimError as error:
            raise told(error) from error
    if not images:
        raise VitslimError("There are no images to look at.")
    return Calibration(torch.cat(images), torch.cat(labels) if labelled else None)
