"""Which models can be packed: all that are built of the parts which csrc/vit_encoder.h knows."""

from collections.abc import Iterator
from typing import Any

import timm.layers
import torch
from timm.layers import DropPath, LayerNorm, PatchDropout
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import nn

from ..errors import VitslimError
from ..families import family_of
from ..layers import GatedLayerNorm, SlimAttention, SlimBlock, SlimMlp
from ..layers.attention import why_not_attention
from ..layers.mlp import activation_name, why_not_mlp
from ..masks import mask_parameters
from ..ops.packed_linear import ACTIVATIONS

# The parts of a model that the arrays stand for; all others are the head's and stay timm's.
ENCODED = ("patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm")
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


def check_packable(model: nn.Module) -> None:
    """Raises one sentence with the reason where a model cannot be packed."""
    family_of(model, "packed").check(model, done="packed")
    if list(mask_parameters(model)):
        raise VitslimError(
            "a masked model cannot be packed: slim it first, "
            "vitslim.pack(vitslim.slim(model, plan))"
        )
    kind = f"this {type(model).__name__}"
    for name in _FORWARD:
        timms = [getattr(each, name) for each in (VisionTransformer, VisionTransformerDistilled)]
        if name in vars(model) or getattr(type(model), name) not in timms:
            _refuse(kind, f"its {name} is not timm's")
    _check_tensors(model)
    for place, module in _encoded(model):
        if module._forward_hooks or module._forward_pre_hooks:
            _refuse(place or kind, "it has forward hooks, which would never be called")
    patches = model.patch_embed
    if patches.dynamic_img_pad:
        _refuse(kind, "dynamic_img_pad pads the images")
    if not patches.flatten and patches.output_fmt != "NHWC":
        _refuse(kind, f"its patches come as {patches.output_fmt.value}")
    if not is_identity(patches.norm):
        _refuse(kind, "its patch embedding is normed")
    _check_conv(patches.proj)
    if not isinstance(model.patch_drop, nn.Identity | PatchDropout):
        _refuse(kind, f"its patch_drop is a {type(model.patch_drop).__name__}")
    for name in ("norm_pre", "norm"):
        if not is_identity(getattr(model, name)):
            _check_norm(name, getattr(model, name), model.embed_dim)
    for index, block in enumerate(model.blocks):
        _check_block(f"blocks.{index}", block, model.embed_dim)


def activation(module: nn.Module) -> str | None:
    """Returns the ops' name of an activation, None for one they have not."""
    return "none" if type(module) is nn.Identity else activation_name(module)


def is_identity(module: nn.Module) -> bool:
    """Returns whether a part is absent, as timm marks it."""
    return isinstance(module, nn.Identity)


def _refuse(place: str, why: str, instead: str = _INSTEAD) -> None:
    raise VitslimError(f"{place} cannot be packed: {why}; {instead}")


def _encoded(model: VisionTransformer) -> Iterator[tuple[str, nn.Module]]:
    """Yields the model and all modules that the arrays take the place of."""
    yield "", model
    for name in ENCODED:
        yield from getattr(model, name).named_modules(prefix=name)


def _check_tensors(model: VisionTransformer) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            where = f"{name} is on {tensor.device}, and packed models run on the CPU"
            _refuse("this model", where, "call model.cpu() first")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            _refuse("this model", f"{name} is {tensor.dtype}", "call model.float() first")


def _check_conv(conv: nn.Module) -> None:
    fits = type(conv) is nn.Conv2d and conv.groups == 1 and conv.dilation == (1, 1)
    if not (fits and conv.stride == conv.kernel_size and conv.padding == (0, 0)):
        _refuse("patch_embed", "its patches are not those of a plain convolution side by side")


def _check_norm(place: str, norm: nn.Module, width: int) -> None:
    if type(norm) not in _NORMS or norm.normalized_shape != (width,):
        _refuse(place, f"its norm is a {type(norm).__name__}, not a LayerNorm of {width} channels")


def _check_block(place: str, block: Any, width: int) -> None:
    if type(block) not in (Block, SlimBlock):
        _refuse(place, f"it is a {type(block).__name__}, not timm's Block")
    attn, mlp = block.attn, block.mlp
    why = None if type(attn) is SlimAttention else why_not_attention(attn)
    why = why or (None if type(mlp) is SlimMlp else why_not_mlp(mlp))
    if why is not None:
        _refuse(place, why.split(", and cutting")[0])
    if activation(mlp.act) is None:
        known = ", ".join(ACTIVATIONS[1:])
        _refuse(place, f"its activation is a {type(mlp.act).__name__}, not one of {known}")
    linears = {"qkv": attn.qkv, "proj": attn.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
    for name, layer in linears.items():
        if type(layer) is not nn.Linear:
            _refuse(place, f"its {name} is a {type(layer).__name__}, not a Linear")
    narrow = [attn.qkv.in_features, attn.proj.out_features, mlp.fc1.in_features]
    if {*narrow, mlp.fc2.out_features} != {width}:
        _refuse(place, f"it does not map {width} channels to {width}")
    between = (attn.qkv.out_features, mlp.fc1.out_features)
    if between != (3 * attn.proj.in_features, mlp.fc2.in_features):
        _refuse(place, "its layers do not fit each other")
    for name in ("norm1", "norm2"):
        _check_norm(f"{place}.{name}", getattr(block, name), width)
    for name in ("ls1", "ls2"):
        if type(getattr(block, name)) not in (nn.Identity, LayerScale):
            _refuse(place, f"its {name} is a {type(getattr(block, name)).__name__}")
    for name in ("drop_path1", "drop_path2"):
        if type(getattr(block, name)) not in (nn.Identity, DropPath):
            _refuse(place, f"its {name} is a {type(getattr(block, name)).__name__}")
