"""Families of vision transformers: what differs between them, each in a file of its own.

A new family is one more file here, an entry in `FAMILIES`, and nothing elsewhere.
"""

from torch import nn

from ..errors import VitslimError
from .family import Family, Site
from .vit import Vit

FAMILIES: tuple[Family, ...] = (Vit(),)

__all__ = ["FAMILIES", "Family", "Site", "family_of"]


def family_of(model: nn.Module, done: str = "slimmed") -> Family:
    """Returns the family that a bare model belongs to.

    Args:
        model: Anything.
        done: What would be done to the model, for the sentence.

    Raises:
        VitslimError: It belongs to none; the sentence says which do, and whether one is inside.
    """
    for family in FAMILIES:
        if isinstance(model, family.model_types):
            return family
    kind = type(model).__name__
    if isinstance(model, nn.Module):
        for name, inner in model.named_modules():
            if isinstance(inner, sum((family.model_types for family in FAMILIES), ())):
                raise VitslimError(
                    f"a {kind} cannot be {done}, but the {type(inner).__name__} in it can: take "
                    f"it out with .get_submodule({name!r})"
                )
    titles = ", ".join(family.title for family in FAMILIES)
    raise VitslimError(f"a {kind} cannot be {done}: only {titles} can")
