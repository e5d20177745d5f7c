"""Notices that a model is no longer as it was read: its tensors, modules, settings and hooks.

Asked before every call, so that all comparisons run in C, over lists made beforehand.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .packable import ENCODED, ENCODED_SETTINGS, SILENT, encoded
from .twins import KINDS

# The settings of parts that the arrays and the facts of a call depend on.
_READ = (
    *("eps", "scale", "num_heads", "head_dims", "approximate"),
    *("stride", "padding", "dilation", "groups"),
    *("img_size", "patch_size", "grid_size", "flatten", "dynamic_img_pad"),
)
# How many vectors are looked at, and how many numbers of each: each costs a cache line.
_SAMPLES, _NUMBERS = 2, 16
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
        model: One that packable.py lets through, which has no hooks on these parts.
    """

    def __init__(self, model: nn.Module) -> None:
        # Looked at first: a hook registered meanwhile shows at the next call.
        self._next_hook = RemovableHandle.next_id
        parts = [module for _, module in encoded(model)]
        self._hooks = [h for each in parts for h in (each._forward_hooks, each._forward_pre_hooks)]
        inner = parts[1:]
        self._parents = [each._modules for each in inner if each._modules]
        self._children = [dict(each) for each in self._parents]
        holders = [held for each in parts for held in (each._parameters, each._buffers)]
        self._held = _Objects(held for held in holders if held)
        self._values = _Values([[each] for each in _tensors(model)] + [*map(_tensors, inner)])
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
                or (RemovableHandle.next_id != self._next_hook and self._hooked())
            )
        # Another thread is changing what is looked at, or a tensor is of a kind that has no place.
        except (RuntimeError, TypeError):
            return True

    def _hooked(self) -> bool:
        # torch numbers all hooks of a process: where none came, none of these has got one.
        next_hook = RemovableHandle.next_id
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
        holders = [held for each in loud for held in _read_by(each)]
        tensors = [each for module in loud for each in _tensors(module)]
        self._objects = _Objects([vars(model), model._modules, *holders])
        self._model, self._kind = model, type(model)
        self._tensors, self._places = tensors, list(map(Tensor.data_ptr, tensors))
        # A silent one that is run differently has an attribute more.
        self._sized = [vars(each) for each in parts if type(each) in SILENT]
        self._sizes = list(map(len, self._sized))

    def add(self, modules: list[nn.Module], parameters: list[Tensor]) -> None:
        """Watches twins too, whether they have lost or got a tensor or a child.

        Another one under the same name works at once and need not be noticed, which
        `torch.func.functional_call` counts on: it lends some, for one call.
        """
        self._tensors += parameters
        self._places += map(Tensor.data_ptr, parameters)
        loud = [each for each in modules if type(each) not in SILENT]
        held = [getattr(each, kind) for each in loud for kind in KINDS]
        self._sized += held
        self._sizes += map(len, held)

    def changed(self) -> bool:
        """Returns whether anything is not as it was."""
        try:
            return (
                list(map(Tensor.data_ptr, self._tensors)) != self._places
                or self._objects.changed()
                or list(map(len, self._sized)) != self._sizes
                or type(self._model) is not self._kind
            )
        except (RuntimeError, TypeError):
            return True


def _tensors(module: nn.Module) -> list[Tensor]:
    """Returns the tensors that are a module's own."""
    own = (*module._parameters.values(), *module._buffers.values())
    return [each for each in own if each is not None]


def _read_by(module: nn.Module) -> list[dict[str, Any]]:
    """Returns the dictionaries that a module may look into when it runs."""
    own = [module._parameters, vars(module)]
    return own if type(module) is nn.Linear else [*own, module._buffers, module._modules]


def _settings(module: nn.Module) -> list[str]:
    """Names the settings of a part to look at."""
    own = vars(module)
    names = [name for name in _READ if name in own]
    # A fused attention does not read its scale; the two are the same until that is changed.
    usual = own.get("head_dim", 1) ** -0.5
    return [*names, "fused_attn"] if own.get("scale", usual) != usual else names
