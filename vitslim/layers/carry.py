"""What was put on a module goes over to the one that takes its place."""

from typing import Any

from torch import nn

from ..errors import VitslimError

# What modules of timm and torch set on themselves; the new module has its own of these.
_SETTINGS = {
    *("num_heads", "head_dim", "attn_dim", "scale", "fused_attn"),
    *("normalized_shape", "eps", "elementwise_affine"),
    *("in_features", "out_features", "training"),
    # Of masked modules, which slim ones take the place of.
    *("mask", "granularity", "tokens"),
}
# Identities of timm's Attention and Mlp that a module of ours does without.
_ABSENT = ("q_norm", "k_norm", "norm")
_OF_ANY_MODULE = vars(nn.Module())


def carry_over(old: nn.Module, new: Any) -> Any:
    """Gives a new module the hooks of the old one, and all else that a user has put on it.

    Args:
        old: The module that is replaced.
        new: The one that takes its place.

    Returns:
        `new`.

    Raises:
        VitslimError: Somebody has replaced the old one's forward, which the new one cannot run.
    """
    if "forward" in vars(old):
        raise VitslimError(
            f"a {type(old).__name__} of the model has a forward of its own, which cannot be masked "
            "or cut; delete that attribute, or leave the block alone with `skip`"
        )
    for name, value in vars(old).items():
        if "_hooks" in name and value:
            vars(new)[name] = type(value)({**vars(new)[name], **value})
        elif _is_a_users(name) and not hasattr(new, name):
            setattr(new, name, value)
    vars(new)["_is_full_backward_hook"] = old._is_full_backward_hook
    for name, parameter in old._parameters.items():
        if parameter is not None and name not in _SETTINGS and not hasattr(new, name):
            new.register_parameter(name, parameter)
    for name, buffer in old._buffers.items():
        if buffer is not None and not hasattr(new, name):
            new.register_buffer(name, buffer, name not in old._non_persistent_buffers_set)
    for name, child in old.named_children():
        absent = name in _ABSENT and type(child) is nn.Identity and not child._forward_hooks
        if not (absent or name in _SETTINGS or hasattr(new, name)):
            new.add_module(name, child)
    return new


def _is_a_users(name: str) -> bool:
    return not (name in _OF_ANY_MODULE or name in _SETTINGS or name.startswith("_"))
