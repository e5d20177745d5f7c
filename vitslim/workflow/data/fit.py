"""Whether data and model fit each other: number of images, number of classes."""

from torch import nn

from ...errors import VitslimError
from ..options.settings import Settings
from ..runtime.world import World
from .datasets import Datasets
from .passed import sentence


def classes_of(model: nn.Module) -> int:
    """Returns how many classes a model tells apart, 0 where it tells none."""
    return int(getattr(model, "num_classes", 0))


def check_size(settings: Settings, images: int, world: World) -> None:
    """Raises VitslimError where there are fewer images than one update takes."""
    needed = settings.images_per_update(world.size)
    if images < needed:
        raise VitslimError(
            f"{settings.data} has {images} training images, fewer than the {needed} of one update: "
            "lower --batch-size or --grad-accum-steps."
        )


def check_classes(settings: Settings, model: nn.Module, opened: Datasets) -> None:
    """Raises VitslimError where the model cannot learn the classes of the data."""
    num_classes = opened.num_classes
    if num_classes == 1:
        alone = f"{settings.data} has one class alone, of which nothing can be learned."
        raise VitslimError(sentence(opened.notes, alone))
    if getattr(model, "global_pool", None) == "":
        raise VitslimError(
            "The model gives tokens and no classes: make it with --model-kwargs global_pool=avg."
        )
    heads = getattr(model, "num_classes", num_classes)
    if num_classes and heads != num_classes:
        wrong = (
            f"{settings.data} has {num_classes} classes and the model has {heads}: fine-tune it "
            f"with `vitslim finetune`, or make it with --model-kwargs num_classes={num_classes}."
        )
        raise VitslimError(sentence(opened.notes, wrong))
