"""Notices that a model is no longer as it was read: its tensors, modules, settings and hooks.

Asked before every call, so that all comparisons run in C, over lists made beforehand.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .packable import ENCODED, ENCODED_SETTINGS, SILENT, encoded

# What the arrays hold of the settings of norms, attentions and activations.
_READ = ("eps", "scale", "fused_attn", "num_heads", "head_dims", "approximate")
_PLAIN = (type(None), bool, int, float, str, tuple)
# How many vectors are looked at, and how many numbers of each: each costs a cache line.
_SAMPLES, _NUMBERS = 4, 16
_END = (object(),)
_version: Callable[[Tensor], int] = attrgetter("_version")


class _Objects:
    """Which objects a number of dictionaries hold; an equal one is another one."""

    def __init__(self, dicts: Iterable[dict[str, Any]]) -> None:
        self._dicts = list(dicts)
        self._before = [*chain.from_iterable(map(dict.values, self._dicts)), *_END]

    def changed(self) -> bool:
        # The end keeps the shorter of the two from passing for the start of the longer one.
        now = chain(chain.from_iterable(map(dict.values, self._dicts)), _END)
        return not all(map(is_, now, self._before))


class _Values:
    """How often torch counted a change of tensors in place, and where they lie.

    What is assigned to `parameter.data` lies elsewhere, as does all that `module.half()` and the
    like convert. A change of `parameter.data` in place is not counted; where it is one of the whole
    model, it shows in a few numbers of which copies are kept.

    Args:
        groups: The tensors of each module.
    """

    def __init__(self, groups: list[list[Tensor]]) -> None:
        # A tensor made in inference mode counts no versions.
        tensors = [each for group in groups for each in group]
        self._counted = [each for each in tensors if not each.is_inference()]
        self._versions = list(map(_version, self._counted))
        # Only of the first of each module, of a weight and not of its bias, to save time.
        self._placed = [group[0] for group in groups if group]
        self._places = list(map(Tensor.data_ptr, self._placed))
        # A skeleton's lie nowhere.
        self._ghosts = [each for each in tensors if each.is_meta]
        self._dtypes = [each.dtype for each in self._ghosts]
        # As bytes, for a NaN equals nothing; the arrays share the tensors' memory.
        flat = [each for each in tensors if each.dim() == 1 and each.is_contiguous()]
        flat = [each for each in flat if each.device.type == "cpu"]
        flat = [each.detach() for each in flat if each.dtype == torch.float32 and each.numel()]
        flat = flat[:: -(-len(flat) // _SAMPLES) or 1]
        self._samples = [each[:_NUMBERS].numpy() for each in flat]
        self._bytes = [each.tobytes() for each in self._samples]

    def changed(self) -> bool:
        return (
            list(map(_version, self._counted)) != self._versions
            or list(map(Tensor.data_ptr, self._placed)) != self._places
            or [each.tobytes() for each in self._samples] != self._bytes
            or [each.dtype for each in self._ghosts] != self._dtypes
        )


class EncoderWatch:
    """A picture of all that the arrays of a packed model are made of.

    Args:
        model: One that `check_packable` lets through, which has no hooks on these parts.
    """

    def __init__(self, model: VisionTransformer) -> None:
        # Looked at first: a hook registered meanwhile shows at the next call.
        self._next_hook = RemovableHandle.next_id
        parts = [module for _, module in encoded(model)]
        self._hooks = [h for each in parts for h in (each._forward_hooks, each._forward_pre_hooks)]
        inner = parts[1:]
        self._parents = [each._modules for each in inner if each._modules]
        self._children = [dict(each) for each in self._parents]
        holders = [held for each in parts for held in (each._parameters, each._buffers)]
        self._held = _Objects(held for held in holders if held)
        groups = [[each for each in held.values() if each is not None] for held in holders]
        self._values = _Values([[each] for each in groups[0]] + groups[1:])
        # A module that is run differently has an attribute more, or has lost its tensors.
        loud = [vars(each) for each in inner if type(each) not in SILENT]
        self._states, self._lengths = loud, list(map(len, loud))
        places = [(model._modules, name) for name in ENCODED]
        places += [(vars(model), name) for name in ENCODED_SETTINGS]
        for each in inner:
            places += [(vars(each), name) for name in _settings(each)]
        self._where, self._names = map(list, zip(*places, strict=True))
        self._set = list(map(dict.get, self._where, self._names))

    def changed(self) -> bool:
        """Returns whether anything is not as it was."""
        try:
            return (
                self._values.changed()
                or self._held.changed()
                or self._parents != self._children
                or list(map(len, self._states)) != self._lengths
                or not all(map(is_, map(dict.get, self._where, self._names), self._set))
                or self._hooked()
            )
        # Another thread is changing what is looked at, or a tensor is of a kind that has no place.
        except (RuntimeError, TypeError):
            return True

    def _hooked(self) -> bool:
        # torch numbers all hooks of a process: where none came, none of these has got one.
        next_hook = RemovableHandle.next_id
        if next_hook != self._next_hook:
            if any(self._hooks):
                return True
            self._next_hook = next_hook
        return False


class HeadWatch:
    """A picture of what comes after the encoder: its modules, and the model's own settings.

    In-place changes of tensors and of containers need none: twins share both.
    """

    def __init__(self, model: nn.Module) -> None:
        heads = (child for name, child in model._modules.items() if name not in ENCODED)
        parts = [module for head in heads if head is not None for module in head.modules()]
        loud = [module for module in parts if type(module) not in SILENT]
        holders = [held for each in loud for held in (each._parameters, each._buffers)]
        tensors = [each for held in holders for each in held.values() if each is not None]
        children = (each._modules for each in loud)
        states = (vars(each) for each in (model, *parts))
        self._objects = _Objects([model._modules, *holders, *children, *states])
        self._tensors: list[Tensor] = []
        self._places: list[int] = []
        self.add(tensors)

    def add(self, tensors: list[Tensor]) -> None:
        """Watches where more tensors lie, those of the twins."""
        self._tensors += tensors
        self._places += map(Tensor.data_ptr, tensors)

    def changed(self) -> bool:
        """Returns whether anything is not as it was."""
        try:
            places = list(map(Tensor.data_ptr, self._tensors))
            return places != self._places or self._objects.changed()
        except (RuntimeError, TypeError):
            return True


def _settings(module: nn.Module) -> list[str]:
    """Names the settings of a part that the arrays or the facts depend on."""
    own = vars(module)
    if isinstance(module, PatchEmbed | nn.Conv2d):
        plain = [name for name, value in own.items() if isinstance(value, _PLAIN)]
        return [name for name in plain if name != "training" and not name.startswith("_")]
    return [name for name in _READ if name in own]
