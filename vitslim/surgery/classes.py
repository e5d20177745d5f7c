"""Masked and slim models: classes of their own, made of the timm class that they came from.

A `MaskedVisionTransformer` is a timm VisionTransformer with the arguments of that class and those
of `vitslim.mask`, a `SlimVisionTransformer` with a plan. They can be pickled, copied, sharded and
resized as timm's own; what differs while a model is masked or slim are methods of its class.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..families import FAMILIES, Family, family_of
from ..masks import mask_parameters
from ..plan import Plan
from ..wrapped import copy_of, plain_type
from .swap import cut, put_masks

# The name under which timm builds masked and slim models, see `checkpoint`.
ARCHITECTURE = "vitslim_vit"
# The classes that were made, so that equal models are of one class.
_MADE: dict[tuple[str, Any], Any] = {}


class MaskedModel:
    """A model with learnable masks; it stands in front of a class of timm's.

    Args:
        *args: Of timm's class.
        masks: Arguments of `vitslim.mask`; the family's defaults where they are left out.
        **kwargs: Of timm's class.

    Attributes:
        mask_args: The arguments of `vitslim.mask`, as JSON has them.
    """

    mask_args: dict[str, Any]
    timm_class: type[nn.Module]

    def __init__(self, *args: Any, masks: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mask_args = put_masks(self, **(masks or {}))

    def no_weight_decay(self) -> set[str]:
        """timm's set and the masks, which are never decayed."""
        named: Any = self
        return set(super().no_weight_decay()) | {name for name, _ in mask_parameters(named)}  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class itself is made at run time, so it is pickled by what it is made of.
        state = super().__reduce_ex__(protocol)[2:]
        return (_blank_masked, (self.timm_class,), *state)


class SlimModel:
    """A model that was cut to a plan; it stands in front of a class of timm's.

    Args:
        *args: Of timm's class.
        plan: What every block keeps: a `Plan`, or its JSON object.
        **kwargs: Of timm's class.

    Attributes:
        plan: As given.
    """

    plan: Plan
    timm_class: type[nn.Module]

    def __init__(self, *args: Any, plan: Plan | Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan if isinstance(plan, Plan) else Plan.from_dict(plan)
        cut(self, self.plan, fold=False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(protocol)[2:]
        return (_blank_slim, (self.timm_class,), *state)


def masked_class(timm_class: Any) -> Any:
    """Returns the class of masked models of a class of timm's, or of one derived from it."""
    return _made("Masked", timm_class, (MaskedModel, _family(timm_class).masked_methods))


def slim_class(timm_class: Any) -> Any:
    """Returns the class of slim models of a class of timm's, or of one derived from it."""
    return _made("Slim", timm_class, (SlimModel, _family(timm_class).slim_methods))


def masked_from(model: nn.Module, masks: Mapping[str, Any], keep: bool = True) -> Any:
    """Returns a masked model made of a dense one.

    Args:
        model: Dense.
        masks: Arguments of `vitslim.mask`.
        keep: Whether the model stays as it is, and a copy is masked; else it is used up.
    """
    base = family_of(model).describe(model)
    masked = _body(masked_class(plain_type(model)), model, keep)
    masked.mask_args = put_masks(masked, **masks)
    return _recorded(masked, {"base": base, "masks": masked.mask_args})


def slim_from(
    model: nn.Module, plan: Plan, fold: bool, exactly: bool = True, keep: bool = True
) -> Any:
    """Returns a slim model made of a dense or masked one.

    Args:
        model: Dense or masked.
        plan: As for `vitslim.slim`.
        fold: Likewise.
        exactly: As for `cut`.
        keep: Whether the model stays as it is, and a copy is cut; else it is used up.
    """
    kind = model.timm_class if isinstance(model, MaskedModel) else plain_type(model)
    base = family_of(model).describe(model)
    small = _body(slim_class(kind), model, keep)
    vars(small).pop("mask_args", None)
    small.plan = plan
    cut(small, plan, fold, exactly)
    return _recorded(small, {"base": base, "plan": plan.to_dict()})


def dense_class(model: nn.Module) -> type[nn.Module]:
    """Returns the class of timm's that a dense, masked or slim model is made of."""
    made = isinstance(model, MaskedModel | SlimModel)
    return model.timm_class if made else plain_type(model)  # type: ignore[union-attr]


def _body(kind: Any, model: nn.Module, keep: bool) -> Any:
    """Returns a model of another class with all that a model has, or copies of that."""
    other = kind.__new__(kind)
    other.__dict__.update(vars(copy_of(model) if keep else model))
    return other


def _recorded(model: Any, args: dict[str, Any]) -> Any:
    """Tells timm how to build a model again, as timm's own ways to save one ask."""
    model._model_args = args
    if getattr(model, "pretrained_cfg", None):
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": ARCHITECTURE}
        model.default_cfg = model.pretrained_cfg
    return model


def _made(prefix: str, timm_class: type[nn.Module], before: tuple[type, ...]) -> Any:
    if (prefix, timm_class) in _MADE:
        return _MADE[prefix, timm_class]
    name = f"{prefix}{timm_class.__name__}"
    doc = f"{before[0].__doc__}\n    Made of {timm_class.__module__}.{timm_class.__name__}."
    space = {"timm_class": timm_class, "__doc__": doc, "__module__": __name__}
    return _MADE.setdefault((prefix, timm_class), type(name, (*before, timm_class), space))


def _family(timm_class: type[nn.Module]) -> Family:
    return next(each for each in FAMILIES if issubclass(timm_class, each.model_types))


def _blank_masked(timm_class: type[nn.Module]) -> Any:
    kind = masked_class(timm_class)
    return kind.__new__(kind)


def _blank_slim(timm_class: type[nn.Module]) -> Any:
    kind = slim_class(timm_class)
    return kind.__new__(kind)
