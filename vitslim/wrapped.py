"""Models that something stands around: finding the bare one, and copying it whole.

torch.compile, data parallelism, sharding and moving averages each wrap a model in their own way.
Every public function takes a model in any of them, and works on the model inside.
"""

import copy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from timm.utils import unwrap_model
from torch import Tensor, nn

from .errors import VitslimError

# What FSDP puts on a module: attributes of these names, and hooks that torch.distributed defines.
_SHARDING = ("__composable_api_state_key", "_is_fsdp", "_fsdp_")


def bare(model: nn.Module) -> Any:
    """Returns the model inside torch.compile, DistributedDataParallel, a moving average and so on.

    A model sharded by FSDP2 is its own wrapper and comes back as it is.
    """
    return unwrap_model(model)


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor, in every process; of a sharded one all processes must call it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def copy_of(model: nn.Module) -> Any:
    """Returns a deep copy of a model, with its hooks, and with all that hooks have left on it.

    torch copies no tensor that is part of a graph, such as an activation that a hook kept; here
    its value is copied. Of a model that FSDP2 has sharded, all processes get the whole model.

    Raises:
        VitslimError: A hook or an attribute cannot be copied; the sentence names the part.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        if hasattr(tensor, "full_tensor"):
            memo[id(tensor)] = _gathered(tensor)
        elif not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    try:
        if is_sharded(model):
            _fill_plain_twins(model, memo)
        return copy.deepcopy(model, memo)
    # Whatever an attribute of the user's may raise: a lock, a file, a generator.
    except Exception as error:
        raise VitslimError(
            f"{_culprit(model)} cannot be copied ({type(error).__name__}: {error}); remove it, or "
            "load the model's weights into a fresh one"
        ) from error


def is_sharded(module: nn.Module) -> bool:
    """Returns whether FSDP2 has sharded a module."""
    # Nobody has unless the module of torch that does it was imported, which takes its time.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def plain_type(module: nn.Module) -> Any:
    """Returns the class of a module as it was before FSDP2 sharded it."""
    # FSDP puts a class of its own in front of the module's: (FSDPModule, the module's class).
    return type(module).__bases__[-1] if is_sharded(module) else type(module)


def is_sharding(hook: Any) -> bool:
    """Returns whether a hook was put on a module by torch.distributed."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


def _fill_plain_twins(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copies every module of a sharded model without what FSDP put on it, into the memo."""
    modules = list(model.modules())
    twins = [kind.__new__(kind) for kind in map(plain_type, modules)]
    memo |= {id(module): twin for module, twin in zip(modules, twins, strict=True)}
    for module, twin in zip(modules, twins, strict=True):
        state = {k: v for k, v in vars(module).items() if not k.startswith(_SHARDING)}
        for name in [each for each in state if each.endswith("_hooks")]:
            kept = {key: hook for key, hook in state[name].items() if not is_sharding(hook)}
            state[name] = type(state[name])(kept)
        twin.__dict__.update(copy.deepcopy(state, memo))


def _gathered(tensor: Tensor) -> Tensor:
    full = whole(tensor.detach()).clone()
    return nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yields parameters, buffers, and the tensors that modules keep as attributes."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_modules":
                yield from _within(value)


def _within(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    for each in inner:
        yield from _within(each)


def _culprit(model: nn.Module) -> str:
    """Names the first attribute of a module that alone fails to be copied."""
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            memo = {id(each): each for each in (*_within(value), *model.modules())}
            try:
                copy.deepcopy(value, memo)
            except Exception:
                what = "a hook" if name.endswith("_hooks") else f"the attribute {name!r}"
                return f"{what} of {place or f'this {type(model).__name__}'}"
    return f"this {type(model).__name__}"
