"""A classifier that fits the data: as many classes, and their names."""

from typing import Any

from torch import nn

from ..errors import VitslimError
from .data.datasets import open_datasets
from .data.fit import classes_of
from .runtime.context import StageContext


def fit_classifier(model: nn.Module, context: StageContext) -> None:
    """Makes a model's classifier anew where the data has another number of classes, in place.

    The names of the classes go into `pretrained_cfg["label_names"]`, where timm has them.

    Args:
        model: A timm vision transformer, dense or slim.
        context: Whose settings name the data; its journal is told of a new classifier.

    Raises:
        VitslimError: The model has no classifier, and the data does not say how many classes.
    """
    settings = context.settings
    if settings.synthetic or getattr(model, "global_pool", None) == "":
        return
    opened = open_datasets(settings, "RGB", context.world)
    count = opened.num_classes
    if not count and not classes_of(model):
        raise VitslimError(
            f"The model has no classifier, and {settings.data} does not say how many classes it "
            "has: give --model-kwargs num_classes=N."
        )
    if count > 1 and classes_of(model) != count:
        context.journal.say(
            f"the classifier of {classes_of(model)} classes is made anew for the {count} of "
            f"{settings.data}"
        )
        model.reset_classifier(count)
    config: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    config.pop("label_names", None)
    if opened.class_names:
        config["label_names"] = list(opened.class_names)
    model.pretrained_cfg = config


def has_new_classifier(model: nn.Module) -> bool:
    """Returns whether a model that came with weights has another classifier than they had."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return bool(config.get("num_classes", classes_of(model)) != classes_of(model))
