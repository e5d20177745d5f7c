"""From a dense model to a masked one, and from there to a slim one."""

from .classes import MaskedModel, SlimModel
from .verbs import mask, slim

__all__ = ["MaskedModel", "SlimModel", "mask", "slim"]
