"""What a packed model is made of: a timm VisionTransformer, dense or slim, written as three arrays.

csrc/vit_encoder.h has the format.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitslimError
from ..layers import SlimAttention
from ..ops import pack_weight
from ..ops.packed_linear import ACTIVATIONS, PANEL, panel_elements
from .packable import activation, is_identity

VERSION = 1
_POSITIONS = "this model cannot be packed: its positions do not fit its patches"
_RESIZE = "call model.set_input_size, which resizes them"


class PackedArrays(NamedTuple):
    """The arrays that `ops.vit_encoder` takes.

    Attributes:
        vectors: float32, 1-D.
        panels: float32 or bfloat16, 1-D.
        layout: int64, 1-D.
    """

    vectors: Tensor
    panels: Tensor
    layout: Tensor


@torch.no_grad()
def packed_arrays(model: Any, dtype: torch.dtype) -> PackedArrays:
    """Writes a model as arrays.

    Args:
        model: One that packable.py lets through.
        dtype: Of the panels.
    """
    conv = model.patch_embed.proj
    norms = (not is_identity(model.norm_pre), not is_identity(model.norm))
    channels, *patch = conv.weight.shape[1:]
    layout = [VERSION, channels, *patch, conv.weight.shape[0], model.num_prefix_tokens]
    layout += [*(int(norm) for norm in norms), len(model.blocks)]
    vectors = _norm(model.norm_pre, conv.weight) if norms[0] else []
    weights = [conv.weight.flatten(1)]
    for block in model.blocks:
        gate, rows = _tokens(block)
        attn, mlp = block.attn, block.mlp
        head_dims = _head_dims(attn)
        function = ACTIVATIONS.index(activation(mlp.act) or "none")
        layout += [len(head_dims), len(mlp.fc1.weight), function]
        layout += [int(rows is not None), int(gate is not None), len(rows or ()), *head_dims]
        layout += rows or ()
        eps = conv.weight.new_tensor([_softmax_scale(attn), block.norm1.eps, block.norm2.eps])
        vectors += [eps, *_norm(block.norm1, eps)[1:], _bias(attn.qkv), _bias(attn.proj)]
        vectors += [_scale(block.ls1, attn.proj), *_norm(block.norm2, eps)[1:], _bias(mlp.fc1)]
        vectors += [_bias(mlp.fc2), _scale(block.ls2, mlp.fc2)]
        vectors += [] if gate is None else [gate]
        weights += [attn.qkv.weight, attn.proj.weight, mlp.fc1.weight, mlp.fc2.weight]
    vectors += _norm(model.norm, conv.weight) if norms[1] else []
    padded = [F.pad(each.detach(), (0, -each.numel() % PANEL)) for each in vectors]
    empty = conv.weight.new_empty(0)
    return PackedArrays(torch.cat([*padded, empty]), _panels(weights, dtype), torch.tensor(layout))


def tokens_kept(model: Any) -> int | None:
    """Returns how many tokens the last block returns, None where no block drops any."""
    kept = None
    for block in model.blocks:
        rows = _tokens(block)[1]
        kept = kept if rows is None else len(rows)
    return kept


@torch.no_grad()
def start_tokens(model: Any, size: tuple[int, int] | None = None) -> Tensor:
    """Returns what the tokens of every image start from, [N, C]: all but the patches' product.

    Args:
        model: Its own way to add positions, class and register tokens is used.
        size: Of the images, where the model takes any; else its own.
    """
    patches = model.patch_embed
    down, across = patches.grid_size if size is None else patches.dynamic_feat_size(size)
    tokens = _bias(patches.proj).expand(1, down, across, -1)
    # As in eval mode, without touching the mode of a model that may be at work elsewhere.
    quiet = copy.copy(model)
    vars(quiet)["_modules"] = {**model._modules, "pos_drop": nn.Identity()}
    height, width = patches.img_size if size is None else size
    covered = (height // patches.patch_size[0]) * (width // patches.patch_size[1])
    try:
        x = quiet._pos_embed(tokens.flatten(1, 2) if patches.flatten else tokens.contiguous())
    # Whatever timm and torch say of positions that were put in and do not fit.
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise VitslimError(f"{_POSITIONS} ({error}); {_RESIZE}") from error
    if x.shape[1] != model.num_prefix_tokens + covered:
        raise VitslimError(f"{_POSITIONS} ({x.shape[1]} tokens for {covered} patches); {_RESIZE}")
    return x[0].detach().clone()


def takes_any_size(model: Any) -> bool:
    """Returns whether the model takes images of any size, as timm's dynamic_img_size does."""
    dropping = any(_tokens(block)[0] is not None or _tokens(block)[1] for block in model.blocks)
    return bool(model.dynamic_img_size) and not dropping


def _tokens(block: nn.Module) -> tuple[Tensor | None, list[int] | None]:
    """Returns the gate of a block's tokens if it changes any, and the rows kept if any leave."""
    select = getattr(block, "tokens", None)
    if select is None:
        return None, None
    gate = None if bool((select.gate == 1).all()) else select.gate
    whole = len(select.keep) == select.arriving
    return gate, None if whole else select.rows.tolist()


def _head_dims(attn: Any) -> list[int]:
    if isinstance(attn, SlimAttention):
        return list(attn.head_dims)
    return [len(attn.qkv.weight) // 3 // attn.num_heads] * attn.num_heads


def _softmax_scale(attn: Any) -> float:
    # torch's kernel, which timm's fused attention is, is not told of `scale`.
    told = isinstance(attn, SlimAttention) or not attn.fused_attn
    return float(attn.scale if told else attn.head_dim**-0.5)


def _norm(norm: nn.LayerNorm, like: Tensor) -> list[Tensor]:
    """Returns eps [1], weight [C] and bias [C]."""
    width = norm.normalized_shape[0]
    weight = like.new_ones(width) if norm.weight is None else norm.weight
    bias = like.new_zeros(width) if norm.bias is None else norm.bias
    return [like.new_tensor([norm.eps]), weight, bias]


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    zeros: Tensor = layer.weight.new_zeros(layer.weight.shape[0])
    return zeros if layer.bias is None else layer.bias


def _scale(scale: nn.Module, layer: nn.Linear) -> Tensor:
    gamma = getattr(scale, "gamma", None)
    return layer.weight.new_ones(len(layer.weight)) if gamma is None else gamma


def _panels(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Packs weights into one array, one at a time so that none is held twice."""
    sizes = [panel_elements(len(weight), weight.shape[1], dtype) for weight in weights]
    panels = torch.empty(sum(sizes), dtype=dtype)
    for place, weight in zip(panels.split(sizes), weights, strict=True):
        place.copy_(pack_weight(weight, dtype))
    return panels
