"""Twins of modules: they run in eval mode, and the modules they stand for never notice."""

import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .packable import ENCODED

# What a module keeps its tensors and children in.
KINDS = ("_parameters", "_buffers", "_modules")
_ABSENT = object()


class _Pair(NamedTuple):
    """A twin, its original, and what the twin was made as: its class, and all by kind and name."""

    twin: nn.Module
    original: nn.Module
    kind: Any
    made: dict[str, dict[str, Any]]


class Twins:
    """Makes twins: other modules with the same tensors, hooks and settings, in eval mode.

    Hooks are the original's own: what is registered on either is called. Tensors share their
    values, and parameters need no gradient. Other changes of a twin are its own until
    `write_back`.

    Args:
        parameter: Makes the twin of a parameter.
        alone: Leave nothing in common with the originals that could be changed in place.
    """

    def __init__(
        self, parameter: Callable[[Tensor], nn.Parameter] | None = None, alone: bool = False
    ) -> None:
        self._parameter, self._alone = parameter or _without_gradient, alone
        self._pairs: dict[int, _Pair] = {}
        # The twins of parameters by the original's id, and where each twin lay.
        self._tensors: dict[int, Tensor] = {}
        self._places: dict[int, int] = {}
        # What twins stand for, by the twin's id; both are alive as long as this is.
        self._originals: dict[int, Any] = {}

    def of(self, module: Any) -> Any:
        """Returns the twin of a module, always the same one; of None, None."""
        if module is None:
            return None
        if id(module) in self._pairs:
            return self._pairs[id(module)].twin
        # Not by copy.copy, which a parametrized module refuses.
        kind: Any = type(module)
        twin = kind.__new__(kind)
        self._pairs[id(module)] = pair = _Pair(twin, module, kind, {})
        self._originals[id(twin)] = module
        state = {name: self._kept(module, twin, value) for name, value in vars(module).items()}
        state["_parameters"] = {k: self._tensor(v) for k, v in module._parameters.items()}
        state["_buffers"] = dict(module._buffers)
        if self._alone:
            state["_buffers"] = {k: _cloned(v) for k, v in module._buffers.items()}
        state["_modules"] = {k: self.of(child) for k, child in module._modules.items()}
        twin.__dict__.update(state | {"training": False})
        pair.made.update({kind: dict(state[kind]) for kind in KINDS}, settings=dict(vars(twin)))
        return twin

    def modules(self) -> list[nn.Module]:
        """Returns the twins of all modules."""
        return [pair.twin for pair in self._pairs.values()]

    def parameters(self) -> list[Tensor]:
        """Returns the twins of all parameters."""
        return list(self._tensors.values())

    def stands_for(self, twin: Any, original: Any) -> bool:
        """Returns whether one is the twin that was made of the other."""
        return self._originals.get(id(twin), twin) is original

    def write_back(self) -> None:
        """Puts into the originals what was put into their twins since they were made.

        But a tensor that a hook has left on a twin: it belongs to that call.
        """
        for key, tensor in self._tensors.items():
            if tensor.data_ptr() != self._places[key]:
                self._originals[id(tensor)].data = tensor.data
        for twin, original, kind, made in self._pairs.values():
            if type(twin) is not kind:
                original.__class__ = type(twin)  # as a parametrization does it
            for each in KINDS:
                there = getattr(original, each)
                for name, value in _changes(getattr(twin, each), made[each]):
                    _put(there, name, self.untwinned(value))
            for name, value in _changes(vars(twin), made["settings"]):
                if name not in (*KINDS, "training") and not isinstance(value, Tensor):
                    _put(vars(original), name, value)

    def untwinned(self, value: Any) -> Any:
        """Returns what a twin stands for; in any other module, all twins are replaced."""
        if id(value) in self._originals:
            return self._originals[id(value)]
        for module in value.modules() if isinstance(value, nn.Module) else ():
            for held in (module._parameters, module._modules):
                for name, each in held.items():
                    held[name] = self._originals.get(id(each), each)
        return value

    def _tensor(self, parameter: Any) -> Any:
        if parameter is None:
            return None
        if id(parameter) not in self._tensors:
            twin = self._tensors[id(parameter)] = self._parameter(parameter)
            self._originals[id(twin)] = parameter
            self._places[id(parameter)] = twin.data_ptr()
        return self._tensors[id(parameter)]

    def _kept(self, module: nn.Module, twin: nn.Module, value: Any) -> Any:
        """Returns the twin's value of a plain attribute."""
        if isinstance(value, MethodType) and value.__self__ is module:
            return MethodType(value.__func__, twin)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return value.detach()  # such as an activation, which would keep its graph alive
        return copy.copy(value) if self._alone and isinstance(value, dict | list | set) else value


def skeleton(model: nn.Module) -> Any:
    """Returns the model with the encoder's parameters on "meta" and with a head of its own."""
    heads = (child for name, child in model.named_children() if name not in ENCODED)
    kept = {id(each) for head in heads for each in head.parameters()}

    def own(parameter: Tensor) -> nn.Parameter:
        like = parameter.detach()
        like = like.clone() if id(parameter) in kept else torch.empty_like(like, device="meta")
        return nn.Parameter(like, parameter.requires_grad)

    return Twins(own, alone=True).of(model)


def _changes(now: dict[str, Any], before: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields what is another object under a name, and _ABSENT for what is gone; notes it."""
    for name in [*now, *(each for each in before if each not in now)]:
        value = now.get(name, _ABSENT)
        if value is not before.get(name, _ABSENT):
            yield name, value
    before.clear()
    before.update(now)


def _put(into: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        into.pop(name, None)
    else:
        into[name] = value


def _without_gradient(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _cloned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
