"""The only file that swaps modules in a timm model, in place: masked parts, then slim ones."""

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..allowed import KINDS
from ..errors import VitslimError
from ..families import Family, Site, family_of
from ..layers import (
    GatedLayerNorm,
    MaskedAttention,
    MaskedMlp,
    SlimAttention,
    SlimMlp,
    TokenGate,
    TokenSelect,
)
from ..layers.attention import why_not_attention, why_not_cut_attention
from ..layers.carry import carry_over
from ..layers.mlp import why_not_cut_mlp, why_not_mlp
from ..masks import mask_parameters
from ..plan import BlockPlan, Plan


def put_masks(
    model: nn.Module,
    granularity: str = "head_dim",
    kinds: Iterable[str] | None = None,
    token_start: str = "paper",
    skip: Iterable[str] = (),
    token_gate: str = "input",
) -> dict[str, Any]:
    """Puts masks into a dense model, and returns the arguments, which are those of `mask`.

    Raises:
        VitslimError: A part that `skip` does not name cannot be masked.
    """
    family = family_of(model)
    kinds, skip = family.kinds if kinds is None else tuple(kinds), tuple(skip)
    for site in family.sites(model):
        masked = _masked(model, family, site, granularity, kinds, token_start, skip, token_gate)
        if masked is not site.block:
            model.set_submodule(site.name, masked)
    if not mask_parameters(model):
        raise VitslimError("nothing is left to mask: `kinds` and `skip` leave every block alone")
    return {
        "granularity": granularity,
        "kinds": list(kinds),
        "token_start": token_start,
        "skip": list(skip),
        "token_gate": token_gate,
    }


def cut(model: nn.Module, plan: Plan, fold: bool, exactly: bool = True) -> None:
    """Cuts a dense or masked model to a plan, in place.

    Args:
        model: Dense or masked.
        plan: As for `slim`.
        fold: Likewise.
        exactly: Whether the plan must have been made for this model. Else parts that do not fit
            get random weights of the plan's sizes, for a model whose weights are loaded next.

    Raises:
        VitslimError: The plan does not fit the model, or a part that it cuts is no plain layer.
    """
    family = family_of(model)
    check_depth(plan, family.sites(model))
    down, across = family.grid(model)
    arriving = list(range(down * across))
    for site, keep in zip(family.sites(model), plan.blocks, strict=True):
        name, block = site.name, site.block
        if (keep.heads, keep.hidden, keep.tokens) == (None, None, None):
            continue
        if type(block) not in (*family.block_types, family.masked_block):
            raise VitslimError(f"the plan cuts {name}, which is a {type(block).__name__}")
        if keep.heads is not None:
            block.attn = carry_over(block.attn, _slim_attention(name, block, keep, fold, exactly))
        if keep.hidden is not None:
            block.mlp = carry_over(block.mlp, _slim_mlp(name, block, keep, fold, exactly))
        tokens = None
        if keep.tokens is not None:
            tokens = _select(model, family, site, keep.tokens, arriving, fold)
            arriving = keep.tokens
            _gate_norms(block)
        model.set_submodule(name, carry_over(block, family.slim_block(block, tokens)))


def check_depth(plan: Plan, sites: list[Site]) -> None:
    """Raises VitslimError where a plan has more blocks than a model, or fewer."""
    if len(plan.blocks) != len(sites):
        raise VitslimError(
            f"the plan has {len(plan.blocks)} blocks, the model {len(sites)}; "
            "it was made for another model"
        )


def _masked(
    model: nn.Module,
    family: Family,
    site: Site,
    granularity: str,
    kinds: tuple[str, ...],
    token_start: str,
    skip: tuple[str, ...],
    token_gate: str,
) -> nn.Module:
    name, block = site.name, site.block

    def wanted(kind: str, part: str, reason: str | None) -> bool:
        named = (f"{name}.{part}", name)
        if kind not in kinds or any(fnmatch.fnmatchcase(n, s) for n in named for s in skip):
            return False
        if reason is not None:
            raise VitslimError(
                f"{name} has no {kind} mask to offer: {reason}; leave it alone with skip=['{name}']"
            )
        return True

    if type(block) not in family.block_types:
        whole = f"it is a {type(block).__name__}, not timm's {family.block_types[0].__name__}"
        for kind in KINDS:
            wanted(kind, "*", whole)
        return block
    do = {
        "attention": wanted("attention", "attn", why_not_attention(block.attn)),
        "mlp": wanted("mlp", "mlp", why_not_mlp(block.mlp)),
        "token": wanted("token", "tokens", family.why_not_tokens(block, token_gate)),
    }
    if not any(do.values()):
        return block
    tokens = None
    if do["attention"]:
        block.attn = carry_over(block.attn, MaskedAttention.from_timm(block.attn, granularity))
    if do["mlp"]:
        block.mlp = carry_over(block.mlp, MaskedMlp.from_timm(block.mlp))
    if do["token"]:
        down, across = family.grid(model)
        places = (down * across, family.num_prefix_tokens(model))
        weight = block.norm1.weight
        tokens = TokenGate(*places, token_start, token_gate, weight.device, weight.dtype)
        if token_gate == "input":
            _gate_norms(block)
    return carry_over(block, family.masked_block(block, tokens))


def _slim_attention(name: str, block: Any, keep: BlockPlan, fold: bool, exactly: bool) -> nn.Module:
    attn, heads = block.attn, keep.heads or []
    if no := why_not_cut_attention(attn):
        raise VitslimError(f"the plan cuts the heads of {name}, but {no}")
    head_dim = attn.head_dim
    if exactly or (len(heads) == attn.num_heads and _last(heads) <= head_dim):
        _check_fit(name, "heads", len(heads), attn.num_heads)
        _check_fit(name, "dimensions of a head", _last(heads), head_dim)
        return SlimAttention.from_timm(attn, heads, fold)
    weight, has_bias = attn.qkv.weight, attn.qkv.bias is not None
    slim = SlimAttention(
        attn.qkv.in_features,
        [len(head) for head in heads],
        attn.scale,
        has_bias,
        attn.proj.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    slim.attn_drop, slim.proj_drop = attn.attn_drop, attn.proj_drop
    return slim


def _slim_mlp(name: str, block: Any, keep: BlockPlan, fold: bool, exactly: bool) -> nn.Module:
    mlp, hidden = block.mlp, keep.hidden or []
    if no := why_not_cut_mlp(mlp):
        raise VitslimError(f"the plan cuts the MLP of {name}, but {no}")
    if exactly or _last([hidden]) <= mlp.fc1.out_features:
        _check_fit(name, "hidden units", _last([hidden]), mlp.fc1.out_features)
        return SlimMlp.from_timm(mlp, hidden, fold)
    weight, has_bias = mlp.fc1.weight, mlp.fc1.bias is not None
    like = {"device": weight.device, "dtype": weight.dtype}
    sizes = (mlp.fc1.in_features, len(hidden), mlp.fc2.out_features)
    slim = SlimMlp(*sizes, bias=has_bias, **like)
    slim.act, slim.drop1, slim.drop2 = mlp.act, mlp.drop1, mlp.drop2
    return slim


def _select(
    model: nn.Module,
    family: Family,
    site: Site,
    keep: list[int],
    arriving: list[int],
    fold: bool,
) -> TokenSelect:
    """Returns what drops patches in front of a block, with what its gates have learned."""
    down, across = family.grid(model)
    _check_fit(site.name, "patches", _last([keep]), down * across)
    if missing := sorted(set(keep) - set(arriving)):
        raise VitslimError(f"{site.name} keeps patch {missing[0]}, which was dropped before")
    prefix, weight = family.num_prefix_tokens(model), site.block.norm1.weight
    tokens = TokenSelect(keep, arriving, prefix, weight.device, weight.dtype)
    gates = getattr(site.block, "tokens", None)
    if fold and gates is not None and gates.place == "input":
        kept = torch.tensor(keep, dtype=torch.long, device=weight.device)
        tokens.gate[prefix:] = gates().detach()[prefix:][kept].to(weight.dtype)
    return tokens


def _gate_norms(block: Any) -> None:
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        setattr(block, name, carry_over(norm, GatedLayerNorm.from_timm(norm)))


def _check_fit(name: str, what: str, asked: int, there: int) -> None:
    if asked > there or (what == "heads" and asked != there):
        raise VitslimError(
            f"the plan wants {asked} {what} in {name}, the model has {there}; "
            "it was made for another model"
        )


def _last(indices: list[list[int]]) -> int:
    """Returns how many units there must be for the largest index to exist."""
    return max((each[-1] + 1 for each in indices if each), default=0)
