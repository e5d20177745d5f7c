"""Parameters and MACs (multiply-accumulates) of a model or of a Plan, in closed form.

Counted are the linear layers with their biases, the two attention products, the patch embedding
and the classifier: what papers on ViTs print as "FLOPs", and half of what PyTorch's flop counter
says of the same model. Masks are not counted, they do not survive the search.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from .errors import VitslimError
from .families import Family, family_of
from .layers import SlimAttention, TokenSelect
from .layers.walk import masked_parts
from .plan import BlockPlan, Plan
from .wrapped import bare

# What a model that is of no family "cannot be".
_COUNTED = "counted in parameters and MACs"


class Cost(NamedTuple):
    """params: parameters. macs: multiply-accumulates of one image's forward pass."""

    params: int
    macs: int


class UnitMacs(NamedTuple):
    """The MACs of a block by unit: an attention dimension, a hidden unit, a token."""

    attention: int
    mlp: int
    token: int


@dataclass(frozen=True)
class BlockShape:
    """The sizes of one block that a plan can change.

    Attributes:
        attn_dim: Sum of the widths of all heads.
        hidden: Hidden units of the MLP.
        tokens: Tokens in the sequence, prefix tokens included.
        dim: Channels of a token; no plan changes them.
    """

    attn_dim: int
    hidden: int
    tokens: int
    dim: int

    def unit_macs(self) -> UnitMacs:
        """Returns the MACs of one unit of every kind.

        A dimension is its part of qkv, of proj and of the two attention products. A token is its
        row of everything, so that the tokens of a block share the MACs of the whole block: that
        is the mean of what is saved by removing them one by one.
        """
        attention = self.tokens * (4 * self.dim + 2 * self.tokens)
        mlp = self.tokens * 2 * self.dim
        linears = self.dim * (4 * self.attn_dim + 2 * self.hidden)
        return UnitMacs(attention, mlp, linears + 2 * self.tokens * self.attn_dim)


@dataclass(frozen=True)
class Geometry:
    """What the cost of a model depends on.

    Attributes:
        num_prefix_tokens: Class, distillation and register tokens.
        num_patches: Patches of an image.
        heads: (heads, head_dim) of every dense block; (0, 0) where that cannot be cut.
        blocks: The shape of every block as the model stands.
        block_params: Per block, the parameters that one unit of attn_dim and of hidden costs.
        fixed_params: Parameters that no plan changes.
        fixed_macs: MACs that no plan changes: the patch embedding and the classifier.
        token_macs: MACs of the head per token that leaves the last block.
    """

    num_prefix_tokens: int
    num_patches: int
    heads: tuple[tuple[int, int], ...]
    blocks: tuple[BlockShape, ...]
    block_params: tuple[tuple[int, int], ...]
    fixed_params: int
    fixed_macs: int
    token_macs: int

    @classmethod
    def of(cls, model: nn.Module) -> "Geometry":
        """Reads the geometry of a dense, masked or slim model; works on the meta device."""
        model = _counted(model)
        family = family_of(model, _COUNTED)
        family.check(model, done=_COUNTED)
        sites = family.sites(model)
        for site in sites:
            if not (hasattr(site.block, "attn") and hasattr(site.block, "mlp")):
                raise VitslimError(
                    f"the cost of {site.name}, a {type(site.block).__name__}, cannot be counted"
                )
        down, across = family.grid(model)
        shapes, unit_params, heads = _shapes(model, family), [], []
        for site, shape in zip(sites, shapes, strict=True):
            attn, mlp = site.block.attn, site.block.mlp
            unit_params.append(_unit_params(attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
            ragged = isinstance(attn, SlimAttention)
            heads.append((0, 0) if ragged else (attn.num_heads, shape.attn_dim // attn.num_heads))
        masks = sum(part.parameter.numel() for part in masked_parts(model))
        params = sum(parameter.numel() for parameter in model.parameters()) - masks
        cut = sum(
            shape.attn_dim * per_dim + shape.hidden * per_unit
            for shape, (per_dim, per_unit) in zip(shapes, unit_params, strict=True)
        )
        fixed_macs, token_macs = family.ends(model)
        return cls(
            family.num_prefix_tokens(model),
            down * across,
            tuple(heads),
            tuple(shapes),
            tuple(unit_params),
            params - cut,
            fixed_macs,
            token_macs,
        )

    def cost(self, blocks: Sequence[BlockShape] | None = None) -> Cost:
        """Returns the cost with these block shapes, or as the model stands."""
        blocks = self.blocks if blocks is None else blocks
        params, macs = self.fixed_params, self.fixed_macs
        for shape, (per_dim, per_unit) in zip(blocks, self.block_params, strict=True):
            params += shape.attn_dim * per_dim + shape.hidden * per_unit
            macs += shape.tokens * shape.unit_macs().token
        return Cost(params, macs + self.token_macs * blocks[-1].tokens)

    def planned(self, blocks: Sequence[BlockPlan]) -> list[BlockShape]:
        """Returns the shapes that a plan gives; parts it leaves alone keep theirs."""
        shapes, tokens = [], self.num_prefix_tokens + self.num_patches
        for shape, plan in zip(self.blocks, blocks, strict=True):
            if plan.tokens is not None:
                tokens = self.num_prefix_tokens + len(plan.tokens)
            shape = replace(shape, tokens=tokens)
            if plan.heads is not None:
                shape = replace(shape, attn_dim=sum(len(head) for head in plan.heads))
            if plan.hidden is not None:
                shape = replace(shape, hidden=len(plan.hidden))
            shapes.append(shape)
        return shapes


def block_shapes(model: nn.Module) -> list[BlockShape]:
    """Returns the shape of every block of a dense, masked or slim model."""
    model = _counted(model)
    return _shapes(model, family_of(model, _COUNTED))


def cost(model: nn.Module, plan: Plan | None = None) -> Cost:
    """Returns the parameters and MACs of a model, or of what a plan makes of it.

    Args:
        model: Dense, masked, slim or packed, wrapped or not; for `plan` the dense or masked one.
            May be on "meta".
        plan: What every block keeps.
    """
    geometry = Geometry.of(model)
    return geometry.cost() if plan is None else geometry.cost(geometry.planned(plan.blocks))


def _unit_params(
    qkv: nn.Linear, proj: nn.Linear, fc1: nn.Linear, fc2: nn.Linear
) -> tuple[int, int]:
    """Returns the parameters of one attention dimension (q, k, v, proj) and one hidden unit."""
    attention = 3 * (qkv.in_features + (qkv.bias is not None)) + proj.out_features
    return attention, fc1.in_features + (fc1.bias is not None) + fc2.out_features


def _counted(model: nn.Module) -> Any:
    """Returns the bare model whose cost is asked for."""
    model = bare(model)
    return bare(getattr(model, "source", model))  # a packed model costs what it was made of


def _shapes(model: nn.Module, family: Family) -> list[BlockShape]:
    prefix, shapes, kept = family.num_prefix_tokens(model), [], None
    for site in family.sites(model):
        select = getattr(site.block, "tokens", None)
        if isinstance(select, TokenSelect):
            kept = prefix + len(select.keep)
        attn_dim, hidden = site.block.attn.proj.in_features, site.block.mlp.fc2.in_features
        shapes.append(BlockShape(attn_dim, hidden, kept or site.tokens, site.dim))
    return shapes
