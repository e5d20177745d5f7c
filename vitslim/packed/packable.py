"""Which models can be packed: all that are built of the parts which csrc/vit_encoder.h knows."""

from collections.abc import Iterator
from typing import Any, NoReturn

import timm.layers
import torch
from timm.layers import DropPath, LayerNorm, PatchDropout
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import VitslimError
from ..families import Family, family_of
from ..layers import GatedLayerNorm, SlimAttention, SlimMlp
from ..layers.attention import why_not_attention
from ..layers.mlp import activation_name, why_not_mlp
from ..masks import mask_parameters
from ..ops.packed_linear import ACTIVATIONS

# The parts of a model that the arrays stand for; all others are the head's and stay timm's.
ENCODED = ("patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm")
_HEAD = ("fc_norm", "head_drop", "head")
# Settings of the model itself that the arrays depend on.
ENCODED_SETTINGS = ("dynamic_img_size", "no_embed_class", "num_prefix_tokens")
# What does nothing in eval mode, so that its settings do not matter.
SILENT = (nn.Identity, nn.Dropout, DropPath, PatchDropout)
# A model that has its own version of one of these computes something else.
_FORWARD = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
# An older timm has no LayerNormFp32.
_NORMS = (
    nn.LayerNorm,
    LayerNorm,
    getattr(timm.layers, "LayerNormFp32", LayerNorm),
    GatedLayerNorm,
)
_INSTEAD = "use the model as it is"


def check_whole(model: nn.Module) -> None:
    """Raises where it is not a model of timm's that computes what timm's classes say."""
    family_of(model, "packed").check(model, done="packed")
    if list(mask_parameters(model)):
        raise VitslimError(
            "a masked model cannot be packed: slim it first, "
            "vitslim.pack(vitslim.slim(model, plan))"
        )
    kind = f"this {type(model).__name__}"
    for name in _FORWARD:
        timms = [getattr(each, name) for each in family_of(model).model_types]
        if name in vars(model) or getattr(type(model), name) not in timms:
            _refuse(kind, f"its {name} is not timm's")
    for name in (*ENCODED, *_HEAD):
        if not isinstance(getattr(model, name, None), nn.Module):
            _refuse(kind, f"it has no {name}", "put one there, which may be an nn.Identity")
    if hasattr(model, "parametrizations"):
        _refuse(kind, "it has a parametrization of its own", "make it permanent first")


def check_tensors(model: nn.Module) -> None:
    """Raises where a tensor is not a plain one in float32 on the CPU."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            _refuse("this model", f"{name} has no values yet", "run the model once first")
        part = name.partition(".")[0]
        if type(tensor) not in (torch.Tensor, nn.Parameter) and (part == name or part in ENCODED):
            why = f"{name} is a {type(tensor).__name__}, not a plain tensor"
            _refuse("this model", why, "pack it anew if it was sharded since, else use it as it is")
        if tensor.device.type != "cpu":
            where = f"{name} is on {tensor.device}, and packed models run on the CPU"
            _refuse("this model", where, "call model.cpu() first")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            _refuse("this model", f"{name} is {tensor.dtype}", "call model.float() first")


def check_encoded(model: Any) -> None:
    """Raises where a part that the arrays take the place of is not as the kernel knows it."""
    kind = f"this {type(model).__name__}"
    for place, module in encoded(model):
        _check_called(place or kind, module)
    patches = model.patch_embed
    if patches.dynamic_img_pad:
        _refuse(kind, "dynamic_img_pad pads the images")
    if not patches.flatten and patches.output_fmt != "NHWC":
        _refuse(kind, f"its patches come as {patches.output_fmt.value}")
    if not is_identity(patches.norm):
        _refuse(kind, "its patch embedding is normed")
    _check_conv(patches.proj)
    for name in ("pos_drop", "patch_drop"):
        _check_silent(kind, name, getattr(model, name))
    width = model.patch_embed.proj.weight.shape[0]
    for name in ("norm_pre", "norm"):
        if not is_identity(getattr(model, name)):
            _check_norm(name, getattr(model, name), width)
    if type(model.blocks) is not nn.Sequential:
        _refuse("blocks", f"it is a {_named(model.blocks, 'Sequential')}, not a Sequential")
    arriving = int(patches.num_patches)
    for index, block in enumerate(model.blocks):
        _check_block(family_of(model), f"blocks.{index}", block, width)
        arriving = _check_tokens(f"blocks.{index}", block, arriving, model.num_prefix_tokens)


def check_heads(model: nn.Module) -> None:
    """Raises where a part that is not encoded cannot be run in eval mode on the CPU."""
    for name, head in model.named_children():
        if name in ENCODED:
            continue
        if any(isinstance(module, torch.jit.ScriptModule) for module in head.modules()):
            raise VitslimError(
                f"{name} was made by torch.jit.script, of which there is no copy in eval mode: put "
                "the module itself there"
            )
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.device.type != "cpu":
                raise VitslimError(
                    f"{name} is on {tensor.device}, and packed models run on the CPU: put another "
                    f"in its place, such as packed.{name} = nn.Linear(...)"
                )
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise VitslimError(f"{name} is {tensor.dtype}: call .float() on it")


def activation(module: nn.Module) -> str | None:
    """Returns the ops' name of an activation, None for one they have not."""
    return "none" if type(module) is nn.Identity else activation_name(module)


def is_identity(module: nn.Module) -> bool:
    """Returns whether a part is absent, as timm marks it."""
    return isinstance(module, nn.Identity)


def encoded(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yields the model and all modules that the arrays take the place of."""
    yield "", model
    for name in ENCODED:
        yield from getattr(model, name).named_modules(prefix=name)


def _refuse(place: str, why: str, instead: str = _INSTEAD) -> NoReturn:
    raise VitslimError(f"{place} cannot be packed: {why}; {instead}")


def _named(module: object, wanted: str) -> str:
    """Names the class of a module, and where it is from if the name alone would mislead."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ == wanted else kind.__name__


def _check_called(place: str, module: nn.Module) -> None:
    """Refuses what would be run whenever the module is called, as it will not be."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks):
        why = "torch.nn.utils computes its weight at every call"
        _refuse(place, why, "make that permanent first (prune.remove, remove_weight_norm)")
    if hooks:
        _refuse(place, "it has forward hooks, which would never be called", "remove them first")
    if "forward" in vars(module):
        _refuse(place, "its forward was replaced, and would never be called")


def _check_silent(place: str, name: str, module: nn.Module) -> None:
    if type(module) not in SILENT:
        _refuse(place, f"its {name} is a {_named(module, 'Dropout')}")


def _check_conv(conv: nn.Module) -> None:
    fits = type(conv) is nn.Conv2d and conv.groups == 1 and conv.dilation == (1, 1)
    fits = fits and conv.stride == conv.kernel_size == tuple(conv.weight.shape[2:])
    if not (fits and conv.padding == (0, 0) and _is_vector(conv.bias, len(conv.weight))):
        _refuse("patch_embed", "its patches are not those of a plain convolution side by side")


def _check_norm(place: str, norm: nn.Module, width: int) -> None:
    fits = type(norm) in _NORMS and norm.normalized_shape == (width,)
    if not (fits and _is_vector(norm.weight, width) and _is_vector(norm.bias, width)):
        what = _named(norm, "LayerNorm")
        _refuse(place, f"its norm is a {what}, not a LayerNorm of {width} channels")


def _check_block(family: Family, place: str, block: Any, width: int) -> None:
    if type(block) not in (*family.block_types, family.slim_block):
        _refuse(place, f"it is a {_named(block, 'Block')}, not timm's Block")
    attn, mlp = block.attn, block.mlp
    parts = {"qkv": attn, "proj": attn, "fc1": mlp, "fc2": mlp}
    for name, part in parts.items():
        layer = getattr(part, name, None)
        if layer is not None and type(layer) is not nn.Linear:
            _refuse(place, f"its {name} is a {_named(layer, 'Linear')}, not a Linear")
    why = None if type(attn) is SlimAttention else why_not_attention(attn)
    why = why or (None if type(mlp) is SlimMlp else why_not_mlp(mlp))
    if why is not None:
        _refuse(place, why.split(", and cutting")[0])
    if activation(mlp.act) is None:
        known, what = ", ".join(ACTIVATIONS[1:]), _named(mlp.act, "GELU")
        _refuse(place, f"its activation is a {what}, not one of {known}")
    _check_linears(place, attn, mlp, width)
    for name in ("norm1", "norm2"):
        _check_norm(f"{place}.{name}", getattr(block, name), width)
    for name in ("ls1", "ls2"):
        scale = getattr(block, name)
        if type(scale) not in (nn.Identity, family.scale_type):
            _refuse(place, f"its {name} is a {_named(scale, 'LayerScale')}")
        if not _is_vector(getattr(scale, "gamma", None), width):
            _refuse(place, f"its {name} does not have {width} values")
    for part, name in ((attn, "attn_drop"), (attn, "proj_drop"), (mlp, "drop1"), (mlp, "drop2")):
        _check_silent(place, name, getattr(part, name))
    for name in ("drop_path1", "drop_path2"):
        _check_silent(place, name, getattr(block, name))


def _check_linears(place: str, attn: Any, mlp: Any, width: int) -> None:
    # By the weights and not by `out_features`, which nothing reads when a layer runs.
    three, inner = attn.qkv.weight.shape
    out, attn_dim = attn.proj.weight.shape
    hidden, mlp_in = mlp.fc1.weight.shape
    mlp_out, units = mlp.fc2.weight.shape
    if {inner, out, mlp_in, mlp_out} != {width}:
        _refuse(place, f"it does not map {width} channels to {width}")
    fits = (three, hidden) == (3 * attn_dim, units)
    if type(attn) is SlimAttention:
        fits = fits and sum(attn.head_dims) == attn_dim
    else:
        fits = fits and attn.num_heads * attn.head_dim == attn_dim
    layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    if not (fits and all(_is_vector(each.bias, len(each.weight)) for each in layers)):
        _refuse(place, "its layers do not fit each other")


def _check_tokens(place: str, block: Any, arriving: int, prefix: int) -> int:
    """Returns how many patches leave a block at which `arriving` arrive."""
    select = getattr(block, "tokens", None)
    if select is None:
        return arriving
    if select.arriving != arriving or len(select.gate) != prefix + len(select.keep):
        why = f"its tokens were chosen among {select.arriving} patches, and {arriving} arrive"
        _refuse(place, why, "slim a model for images of this size")
    return len(select.keep)


def _is_vector(tensor: torch.Tensor | None, size: int) -> bool:
    """Returns whether a bias, norm or scale is absent or has one value for each channel."""
    return tensor is None or tuple(tensor.shape) == (size,)
