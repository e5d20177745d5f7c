"""Which parts may be fused into a product, and which must be called as the modules they are.

A part that is exactly nn.Linear, and that nobody watches or changes, is its weight and its bias.
Any other is called: adapters, int8 layers, parametrizations, pruning and hooks then do what they do
in timm's own model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(layer: nn.Module) -> bool:
    """Returns whether a layer is its weight and bias, so that a product may take them for it."""
    return type(layer) is nn.Linear and not is_hooked(layer) and _is_tensor(layer.weight)


def is_hooked(module: nn.Module) -> bool:
    """Returns whether calling a module does more than its forward method, or something else."""
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _has_any_global_hook()
    )


def why_not_cut(layers: Mapping[str, nn.Module]) -> str | None:
    """Returns why one of some layers, by name, cannot lose rows or columns; None if all can."""
    for name, layer in layers.items():
        if hasattr(layer, "parametrizations"):
            return (
                f"its {name} is parametrized; call torch.nn.utils.parametrize."
                "remove_parametrizations on it first"
            )
        if type(layer) is not nn.Linear:
            return f"its {name} is a {kind_of(layer)}; merge it into a torch Linear first"
        if "weight" not in layer._parameters:
            return (
                f"its {name} computes its weight in a hook; make it permanent first, as "
                f"torch.nn.utils.prune.remove({name}, 'weight') does"
            )
        if "forward" in vars(layer):
            return f"its {name} has a forward of its own; take that off first"
        if not _is_tensor(layer.weight):
            return f"the weight of its {name} is a {type(layer.weight).__name__}"
    return None


def features(layer: nn.Module, side: str) -> int | None:
    """Returns `in_features` or `out_features` of a layer, None where it does not say."""
    found = getattr(layer, side, None)
    return found if isinstance(found, int) else None


def like(module: nn.Module) -> Tensor:
    """Returns a floating-point tensor of a module, for the device and dtype of new ones beside."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0)


def kind_of(module: Any) -> str:
    """Returns the name of a module's class, with its library where the name alone misleads."""
    kind = type(module)
    known = getattr(nn, kind.__name__, None)
    if known is kind or kind.__module__.startswith("timm."):
        return str(kind.__name__)
    return f"{kind.__module__}.{kind.__name__}"


def _is_tensor(weight: Any) -> bool:
    # Neither a subclass that holds something else than numbers, nor what torch.fx traces with.
    return isinstance(weight, Tensor) and not is_traceable_wrapper_subclass(weight)
