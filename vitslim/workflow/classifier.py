"""A classifier that fits the data: as many classes, and their names."""

from typing import Any

from torch import nn

from ..errors import VitslimError
from .data.datasets import open_datasets
from .data.fit import classes_of
from .runtime.context import StageContext


def fit_classifier(model: nn.Module, context: StageContext, may_renew: bool = True) -> bool:
    """Makes a model's classifier anew where the data has other classes, in place.

    The names of the classes go into `pretrained_cfg["label_names"]`, where timm has them.

    Args:
        model: A timm vision transformer, dense or slim.
        context: Whose settings name the data; its journal is told of a new classifier.
        may_renew: Whether a classifier that does not fit is made anew, or refused.

    Returns:
        Whether the classifier is new.

    Raises:
        VitslimError: The model has no classifier, and the data does not say how many classes; or
            the classifier does not fit and may not be made anew.
    """
    settings = context.settings
    if settings.synthetic or getattr(model, "global_pool", None) == "":
        return False
    opened = open_datasets(settings, "RGB", context.world)
    count, known = opened.num_classes, classes_of(model)
    if not count and not known:
        raise VitslimError(
            f"The model has no classifier, and {settings.data} does not say how many classes it "
            "has: give --model-kwargs num_classes=N."
        )
    config: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    before, now = config.pop("label_names", None), list(opened.class_names)
    renamed = bool(before and now and list(before) != now)
    new = count > 1 and (known != count or renamed)
    what = f"{known} classes" if known != count else f"other {known} classes"
    if new and not may_renew:
        raise VitslimError(
            f"The model has a classifier of {what} and {settings.data} has {count}, so that its "
            "accuracy would be chance: fine-tune it first with `vitslim finetune`."
        )
    if new:
        context.journal.say(
            f"the classifier of {what} is made anew for the {count} of {settings.data}"
        )
        model.reset_classifier(count)
    model.pretrained_cfg = {**config, "label_names": now} if now else config
    return new


def has_new_classifier(model: nn.Module) -> bool:
    """Returns whether a model that came with weights has another classifier than they had."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return bool(config.get("num_classes", classes_of(model)) != classes_of(model))
