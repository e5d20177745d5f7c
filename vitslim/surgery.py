"""The only file that swaps modules in a timm model: `mask` before the search, `slim` after it."""

import copy
import fnmatch
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from .errors import VitslimError
from .layers import (
    GatedLayerNorm,
    MaskedAttention,
    MaskedBlock,
    MaskedMlp,
    SlimAttention,
    SlimBlock,
    SlimMlp,
    TokenGate,
    TokenSelect,
)
from .layers.attention import why_not_attention
from .layers.intermediates import forward_intermediates
from .layers.mlp import why_not_mlp
from .layers.norm import why_not_norm
from .layers.tokens import TOKEN_GATES
from .masks import KINDS, mask_parameters
from .plan import BlockPlan, Plan


def mask(
    model: VisionTransformer,
    granularity: str = "head_dim",
    kinds: Iterable[str] = KINDS,
    token_start: str = "paper",
    skip: Iterable[str] = (),
    token_gate: str = "input",
) -> VisionTransformer:
    """Returns a copy of a timm VisionTransformer with learnable masks in every block.

    Args:
        model: ViT, DeiT, DeiT distilled, DeiT-III, with or without register tokens.
        granularity: Of the attention masks: "head_dim", "uniform" or "head".
        kinds: Which masks to learn, of "attention", "mlp" and "token".
        token_start: "paper" starts token gates at tanh(3) = 0.995, "one" at exactly 1.
        skip: Names of parts to leave alone, with wildcards: "blocks.0", "blocks.*.mlp".
        token_gate: Where token gates act. "input", the paper's: a gate scales the normed input of
            attention and MLP, and is kept as a constant when slim. "keys": its logarithm is added
            to the attention scores of the token as a key, whose limit is removal; the fast kernels
            of a slim model have no place for it, so that `slim` drops it for the tokens it keeps.

    Raises:
        VitslimError: The model, or a part that `skip` does not name, cannot be masked, or `skip`
            names what is not there.
    """
    kinds, skip = tuple(kinds), tuple(skip)
    if unknown := set(kinds) - set(KINDS):
        raise VitslimError(f"no kind of mask is called {sorted(unknown)[0]!r}; use {KINDS}")
    if token_gate not in TOKEN_GATES:
        raise VitslimError(f"no token gate is called {token_gate!r}; use {TOKEN_GATES}")
    check_model(model, kinds)
    for attribute, state in (("mask_args", "masked"), ("plan", "slim")):
        if getattr(model, attribute, None) is not None:
            raise VitslimError(f"this model is {state} already; mask the dense one it was made of")
    _check_skip(skip, len(model.blocks))
    masked = copy.deepcopy(model)
    for index, block in enumerate(masked.blocks):
        masked.blocks[index] = _mask_block(
            masked, index, block, granularity, kinds, token_start, skip, token_gate
        )
    if not mask_parameters(masked):
        raise VitslimError("nothing is left to mask: `kinds` and `skip` leave every block alone")
    masked.no_weight_decay = MethodType(_no_weight_decay, masked)
    masked.mask_args = {
        "granularity": granularity,
        "kinds": list(kinds),
        "token_start": token_start,
        "skip": list(skip),
        "token_gate": token_gate,
    }
    return masked


def slim(model: VisionTransformer, plan: Plan, fold: bool = True) -> VisionTransformer:
    """Returns a physically smaller copy: ragged heads, narrower MLPs, fewer tokens, no masks.

    Args:
        model: A masked model, or the dense one it was made of.
        plan: What every block keeps, from `vitslim.threshold`.
        fold: Multiply what the kept masks learned into the weights, so that the slim model
            computes what the masked one does with the dropped units at zero; else the masks are
            forgotten, as the published code does. What kept tokens learned as a bias of their keys
            is forgotten in any case.

    Raises:
        VitslimError: The plan does not fit the model.
    """
    if getattr(model, "plan", None) is not None:
        raise VitslimError("this model is slim already; slim the masked or dense model instead")
    check_model(model)
    if len(plan.blocks) != len(model.blocks):
        raise VitslimError(
            f"the plan has {len(plan.blocks)} blocks, the model {len(model.blocks)}; "
            "it was made for another model"
        )
    _check_base(plan, model)
    small = copy.deepcopy(model)
    arriving = list(range(_num_patches(model)))
    for index, (block, keep) in enumerate(zip(small.blocks, plan.blocks, strict=True)):
        if (keep.heads, keep.hidden, keep.tokens) == (None, None, None):
            continue
        small.blocks[index] = _slim_block(small, index, block, keep, arriving, fold)
        arriving = arriving if keep.tokens is None else keep.tokens
    small.plan = plan
    for name in ("no_weight_decay", "mask_args"):
        small.__dict__.pop(name, None)
    if len(arriving) < _num_patches(model):
        small.forward_intermediates = MethodType(forward_intermediates, small)
    return small


def describe(model: VisionTransformer) -> dict[str, Any]:
    """Returns {"model", "args"}: what timm.create_model needs to build the dense model again."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") or type(model).__name__
    args = dict(getattr(model, "_model_args", {}))
    # What a user may have changed after creation, and what a timm before 1.0.27 does not record.
    args |= {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.weight.shape[1],
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "class_token": model.cls_token is not None,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
    }
    return {"model": name, "args": {k: v for k, v in args.items() if _is_json(v)}}


def check_model(model: nn.Module, kinds: tuple[str, ...] = (), done: str = "slimmed") -> None:
    """Raises one sentence where a model cannot be worked on at all.

    Args:
        model: Anything.
        kinds: Of masks that are wanted.
        done: What would be done to the model, for the sentence.
    """
    if not isinstance(model, VisionTransformer):
        raise VitslimError(
            f"a {type(model).__name__} cannot be {done}: only timm's VisionTransformer can, "
            "that is its vit_* and deit_* models"
        )
    if type(model.patch_embed) is not PatchEmbed:
        raise VitslimError(
            f"this model makes its tokens with a {type(model.patch_embed).__name__}; only timm's "
            f"PatchEmbed is supported, so hybrids cannot be {done}"
        )
    if "token" in kinds and getattr(model, "dynamic_img_size", False):
        raise VitslimError(
            "token masks need a fixed number of tokens and this model has dynamic_img_size; "
            "create it without, or leave 'token' out of kinds"
        )
    if "token" in kinds and not isinstance(model.patch_drop, nn.Identity):
        raise VitslimError(
            "token masks and patch_drop_rate both remove tokens; create the model without "
            "patch_drop_rate, or leave 'token' out of kinds"
        )


def _check_base(plan: Plan, model: VisionTransformer) -> None:
    """Refuses a plan for images or patches of another size, whose indices may fit all the same."""
    args, before = describe(model)["args"], plan.base.get("args", {})
    for name in ("img_size", "patch_size", "embed_dim"):
        if name in before and before[name] != args[name]:
            raise VitslimError(
                f"the plan was made for a model whose {name} is {before[name]}, and this one's is "
                f"{args[name]}"
            )


def _check_skip(skip: tuple[str, ...], depth: int) -> None:
    """Refuses a name that would be skipped and is of no part: a slip would mask what it meant."""
    blocks = [f"blocks.{index}" for index in range(depth)]
    parts = [*blocks, *(f"{b}.{part}" for b in blocks for part in ("attn", "mlp", "tokens"))]
    for name in skip:
        if not fnmatch.filter(parts, name):
            raise VitslimError(
                f"skip names {name!r}, of which the model has none; its parts are blocks.0 to "
                f"{blocks[-1]}, and .attn, .mlp and .tokens of each"
            )


def _mask_block(
    model: VisionTransformer,
    index: int,
    block: Any,
    granularity: str,
    kinds: tuple[str, ...],
    token_start: str,
    skip: tuple[str, ...],
    token_gate: str,
) -> nn.Module:
    def wanted(kind: str, part: str, reason: str | None) -> bool:
        name = f"blocks.{index}"
        named = (f"{name}.{part}", name)
        if kind not in kinds or any(fnmatch.fnmatchcase(n, s) for n in named for s in skip):
            return False
        if reason is not None:
            raise VitslimError(
                f"{name} has no {kind} mask to offer: {reason}; leave it alone with skip=['{name}']"
            )
        return True

    whole = None if type(block) is Block else f"it is a {type(block).__name__}, not timm's Block"
    if whole is not None:
        for kind in KINDS:
            wanted(kind, "*", whole)
        return block
    do = {
        "attention": wanted("attention", "attn", why_not_attention(block.attn)),
        "mlp": wanted("mlp", "mlp", why_not_mlp(block.mlp)),
        "token": wanted("token", "tokens", _why_not_tokens(block, token_gate)),
    }
    if not any(do.values()):
        return block
    tokens = None
    if do["attention"]:
        block.attn = MaskedAttention.from_timm(block.attn, granularity)
    if do["mlp"]:
        block.mlp = MaskedMlp.from_timm(block.mlp)
    if do["token"]:
        weight, places = block.norm1.weight, (_num_patches(model), model.num_prefix_tokens)
        tokens = TokenGate(*places, token_start, token_gate, weight.device, weight.dtype)
        if token_gate == "input":
            block.norm1 = GatedLayerNorm.from_timm(block.norm1)
            block.norm2 = GatedLayerNorm.from_timm(block.norm2)
    return MaskedBlock(block, tokens)


def _why_not_tokens(block: Any, token_gate: str) -> str | None:
    """Returns why the tokens of a block cannot be gated, or None if they can."""
    if token_gate == "keys" and type(block.attn) is not Attention:
        return f"its attention is a {type(block.attn).__name__}, which may take no bias"
    # Norms carry no gate on the keys, but they do once tokens are removed.
    return why_not_norm(block.norm1) or why_not_norm(block.norm2)


def _slim_block(
    model: VisionTransformer,
    index: int,
    block: Any,
    keep: BlockPlan,
    arriving: list[int],
    fold: bool,
) -> nn.Module:
    if not isinstance(block, Block | MaskedBlock):
        raise VitslimError(f"the plan cuts blocks.{index}, which is a {type(block).__name__}")
    tokens = None
    if keep.heads is not None:
        if not isinstance(block.attn, MaskedAttention) and (no := why_not_attention(block.attn)):
            raise VitslimError(f"the plan cuts the heads of blocks.{index}, but {no}")
        head_dim = block.attn.qkv.out_features // 3 // block.attn.num_heads
        _check_fit(index, "heads", len(keep.heads), block.attn.num_heads)
        _check_fit(index, "dimensions of a head", _last(keep.heads), head_dim)
        block.attn = SlimAttention.from_timm(block.attn, keep.heads, fold)
    if keep.hidden is not None:
        if not isinstance(block.mlp, MaskedMlp) and (no := why_not_mlp(block.mlp)):
            raise VitslimError(f"the plan cuts the MLP of blocks.{index}, but {no}")
        _check_fit(index, "hidden units", _last([keep.hidden]), block.mlp.fc1.out_features)
        block.mlp = SlimMlp.from_timm(block.mlp, keep.hidden, fold)
    if keep.tokens is not None:
        _check_fit(index, "patches", _last([keep.tokens]), _num_patches(model))
        if missing := sorted(set(keep.tokens) - set(arriving)):
            raise VitslimError(f"blocks.{index} keeps patch {missing[0]}, which was dropped before")
        prefix, weight = model.num_prefix_tokens, block.norm1.weight
        tokens = TokenSelect(keep.tokens, arriving, prefix, weight.device, weight.dtype)
        gates = getattr(block, "tokens", None)
        if fold and gates is not None and gates.place == "input":
            kept = torch.tensor(keep.tokens, dtype=torch.long, device=weight.device)
            tokens.gate[prefix:] = gates().detach()[prefix:][kept].to(weight.dtype)
        block.norm1 = GatedLayerNorm.from_timm(block.norm1)
        block.norm2 = GatedLayerNorm.from_timm(block.norm2)
    return SlimBlock(block, tokens)


def _check_fit(index: int, what: str, asked: int, there: int) -> None:
    if asked > there or (what == "heads" and asked != there):
        raise VitslimError(
            f"the plan wants {asked} {what} in blocks.{index}, the model has {there}; "
            "it was made for another model"
        )


def _last(indices: list[list[int]]) -> int:
    """Returns how many units there must be for the largest index to exist."""
    return max((each[-1] + 1 for each in indices if each), default=0)


def _num_patches(model: VisionTransformer) -> int:
    return int(model.patch_embed.num_patches)


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_json(each) for each in value)
    return value is None or isinstance(value, str | int | float | bool)


def _no_weight_decay(self: VisionTransformer) -> set[str]:
    """timm's set and the masks, which are never decayed."""
    return set(type(self).no_weight_decay(self)) | {name for name, _ in mask_parameters(self)}
