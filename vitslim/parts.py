"""What timm's arguments cannot say of a model: its parts, one by one, as JSON.

    {"blocks.0.mlp.act": {"type": "torch.nn.modules.activation.ReLU", "set": {"inplace": false}},
     "blocks.0.norm1": {"set": {"eps": 0.01}},
     "head_drop": null}

`type` is there where the class differs from what timm builds, `set` has settings, `shapes` those of
parameters, `buffers` those of buffers, and null stands for a part that was taken out. Classes are
torch's and timm's layers alone, made without running their constructors: a description is no code.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .errors import VitslimError
from .families.plain import NOT_PLAIN, plain
from .wrapped import is_sharding, plain_type

# Where the classes come from that a description may name.
_LIBRARIES = ("torch.nn.modules.", "timm.layers.", "timm.models.")
# Of a whole model, and not what it is: where it came from, and how it is trained.
_RECORDS = {
    *("pretrained_cfg", "default_cfg", "pretrained_model_args", "feature_info"),
    *("plan", "mask_args", "grad_checkpointing", "distilled_training"),
    *("weight_init_mode", "fix_init"),
    # The classifier itself says it.
    "num_classes",
}
# What torch gives every module; more is what its class or its user has put there.
_OF_ANY_MODULE = {*vars(nn.Module()), "training", "_is_full_backward_hook"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refuse_what_is_no_data(model: nn.Module, ignore_hooks: bool = False) -> None:
    """Raises VitslimError where a model computes with code that no file of data can hold.

    Args:
        model: Bare.
        ignore_hooks: Whether hooks are no reason to refuse, as they only observe.
    """
    for name, module in model.named_modules():
        place = name or f"this {plain_type(model).__name__}"
        hooks = [hook for each in _HOOKS for hook in getattr(module, each).values()]
        if any(isinstance(hook, BasePruningMethod) for hook in hooks):
            raise VitslimError(
                f"{place} is pruned in a hook, which a config cannot describe; make it permanent "
                "with torch.nn.utils.prune.remove"
            )
        if not ignore_hooks and not all(map(is_sharding, hooks)):
            raise VitslimError(
                f"{place} has hooks, which a saved model cannot hold: remove them "
                "(handle.remove()), or pass ignore_hooks=True if they change nothing"
            )
        for attribute, value in vars(module).items():
            if callable(value) and callable(getattr(type(module), attribute, None)):
                raise VitslimError(
                    f"{place} has a {attribute} of its own in place of its class's, which a saved "
                    f"model cannot hold; delete that attribute, or make a class of it"
                )


def differences(model: nn.Module, twin: nn.Module) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yields the parts in which a model differs from another one, by name, outer ones first.

    Raises:
        VitslimError: A part differs in a way that cannot be told; the sentence names it.
    """
    names, others = ({**dict(each.named_modules(remove_duplicate=False))} for each in (model, twin))
    anew: list[str] = []
    for name, module in names.items():
        other = None if name.startswith(tuple(f"{each}." for each in anew)) else others.get(name)
        if other is None or (name and plain_type(module) is not type(other)):
            anew.append(name)
            yield name, _whole(module, name)
        elif changed := _changed(module, other, name):
            yield name, changed
    gone: list[str] = []
    for name in others:
        if name not in names and not name.startswith(tuple(f"{each}." for each in (*anew, *gone))):
            gone.append(name)
            yield name, None


def apply_part(
    model: nn.Module, name: str, part: Mapping[str, Any] | None, lenient: bool = False
) -> None:
    """Makes a part of a model what a description says.

    Args:
        model: Changed in place.
        name: Of the part.
        part: As `differences` yields it.
        lenient: Whether a part that is not there is passed over.

    Raises:
        VitslimError: There is no such part, or its class is none of torch's or timm's.
    """
    place, _, leaf = name.rpartition(".")
    try:
        parent, module = model.get_submodule(place), model
        if name and part is not None and "type" not in part:
            module = model.get_submodule(name)
    except AttributeError:
        if lenient:
            return
        raise VitslimError(f"the config tells of {name}, which the model has not") from None
    if part is None:
        if isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            del parent._modules[leaf]
        elif leaf in parent._modules:
            parent._modules[leaf] = None
        return
    if "type" in part:
        module = _blank(part["type"], name)
        vars(parent).pop(leaf, None)
        parent._modules[leaf] = module
    where = next((each for each in model.parameters()), torch.empty(0)).device
    for attribute, value in (part.get("set") or {}).items():
        keeps_lists = isinstance(vars(module).get(attribute), list)
        setattr(module, attribute, value if keeps_lists else _tuples(value))
    for attribute, shape in (part.get("shapes") or {}).items():
        empty = None if shape is None else nn.Parameter(torch.zeros(shape, device=where))
        module.register_parameter(attribute, empty)
    for attribute, (shape, dtype, kept) in (part.get("buffers") or {}).items():
        empty = torch.zeros(shape, dtype=getattr(torch, dtype), device=where)
        module.register_buffer(attribute, empty, persistent=kept)
    if "shapes" in part and hasattr(module, "reset_parameters"):
        module.reset_parameters()
    if hasattr(module, "init_non_persistent_buffers"):
        module.init_non_persistent_buffers()


def _whole(module: nn.Module, name: str) -> dict[str, Any]:
    """Describes a part that the other model has not, but for the parts within it."""
    kind = plain_type(module)
    known = f"{kind.__module__}.{kind.__qualname__}"
    if not known.startswith(_LIBRARIES) or _named_class(known) is not kind:
        raise VitslimError(
            f"{name} is a {known}, which a config cannot describe; only layers of torch and timm "
            "can be saved (merge an adapter, take off a parametrization, or save the state dict)"
        )
    settings = {}
    for attribute, value in vars(module).items():
        if attribute in _OF_ANY_MODULE:
            continue
        settings[attribute] = plain(value)
        if settings[attribute] is NOT_PLAIN:
            raise VitslimError(
                f"{name}.{attribute} is a {type(value).__name__}, which a config cannot describe"
            )
    shapes = {n: None if p is None else list(p.shape) for n, p in module._parameters.items()}
    buffers = {n: _buffer(module, n, b) for n, b in module._buffers.items() if b is not None}
    part: dict[str, Any] = {"type": known, "set": settings, "shapes": shapes, "buffers": buffers}
    return {key: value for key, value in part.items() if value}


def _changed(module: nn.Module, other: nn.Module, name: str) -> dict[str, Any]:
    """Describes what differs between two modules of one class, but for the parts within them."""
    place, settings, theirs = name or "the model", {}, _settings(other)
    for attribute, value in _settings(module).items():
        # What its class does not know is a note of the user's, or what a hook left there.
        if attribute not in theirs and not hasattr(type(module), attribute):
            continue
        now, before = plain(value), plain(theirs.get(attribute, NOT_PLAIN))
        if now is not NOT_PLAIN and now != before:
            settings[attribute] = now
        elif now is NOT_PLAIN and not _same(value, theirs.get(attribute)):
            raise VitslimError(
                f"{place}.{attribute} is a {type(value).__name__}, which a config cannot describe"
            )
    for attribute in (*module._parameters, *module._buffers):
        if attribute not in other._parameters and attribute not in other._buffers:
            raise VitslimError(
                f"{place} has a tensor of its own, {attribute!r}, which timm's class has not; a "
                "config cannot describe it"
            )
    shapes = {
        attribute: None if mine is None else list(mine.shape)
        for attribute, mine in module._parameters.items()
        if _shape(mine) != _shape(other._parameters.get(attribute))
    }
    # timm sets a parameter to None before torch has heard of it.
    there = [n for n, parameter in other._parameters.items() if parameter is not None]
    shapes |= {n: None for n in there if vars(module).get(n, other) is None}
    buffers = {
        attribute: _buffer(module, attribute, mine)
        for attribute, mine in module._buffers.items()
        if mine is not None and _shape(mine) != _shape(other._buffers.get(attribute))
    }
    part: dict[str, Any] = {"set": settings, "shapes": shapes, "buffers": buffers}
    return {key: value for key, value in part.items() if value}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Returns what a module was told, such as eps, without tensors, parts and torch's own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and name not in _RECORDS
    }


def _buffer(module: nn.Module, name: str, buffer: Tensor) -> list[Any]:
    kept = name not in module._non_persistent_buffers_set
    return [list(buffer.shape), str(buffer.dtype).removeprefix("torch."), kept]


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    return type(value) is type(other) and not isinstance(value, Tensor) and bool(value == other)


def _named_class(known: str) -> Any:
    place, _, name = known.rpartition(".")
    try:
        return getattr(importlib.import_module(place), name, None)
    except ImportError:
        return None


def _blank(known: str, name: str) -> Any:
    """Makes a module of torch's or timm's, without its constructor."""
    kind = _named_class(known) if str(known).startswith(_LIBRARIES) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise VitslimError(
            f"the config says that {name} is a {known}, which is no layer of torch or timm"
        )
    module: nn.Module = nn.Module.__new__(kind)
    nn.Module.__init__(module)
    return module


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
