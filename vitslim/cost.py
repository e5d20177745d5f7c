"""Parameters and MACs (multiply-accumulates) of a model or of a Plan, in closed form.

Counted are the linear layers with their biases, the two attention products, the patch embedding
and the classifier: what papers on ViTs print as "FLOPs", and half of what PyTorch's flop counter
says of the same model. Masks are not counted, they do not survive the search.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import VitslimError
from .layers import SlimAttention, TokenSelect
from .layers.walk import masked_parts
from .plan import BlockPlan, Plan


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
    """

    attn_dim: int
    hidden: int
    tokens: int

    def unit_macs(self, embed_dim: int) -> UnitMacs:
        """Returns the MACs of one unit of every kind.

        A dimension is its part of qkv, of proj and of the two attention products. A token is its
        row of everything, so that the tokens of a block share the MACs of the whole block: that
        is the mean of what is saved by removing them one by one.
        """
        attention = self.tokens * (4 * embed_dim + 2 * self.tokens)
        mlp = self.tokens * 2 * embed_dim
        linears = embed_dim * (4 * self.attn_dim + 2 * self.hidden)
        return UnitMacs(attention, mlp, linears + 2 * self.tokens * self.attn_dim)


@dataclass(frozen=True)
class Geometry:
    """What the cost of a model depends on.

    Attributes:
        embed_dim: Channels of a token.
        num_prefix_tokens: Class, distillation and register tokens.
        num_patches: Patches of an image.
        heads: (heads, head_dim) of every dense block; (0, 0) where that cannot be cut.
        blocks: The shape of every block as the model stands.
        block_params: Per block, the parameters that one unit of attn_dim and of hidden costs.
        fixed_params: Parameters that no plan changes.
        fixed_macs: MACs that no plan changes: the patch embedding and the classifier.
        token_macs: MACs of the head per token that leaves the last block.
    """

    embed_dim: int
    num_prefix_tokens: int
    num_patches: int
    heads: tuple[tuple[int, int], ...]
    blocks: tuple[BlockShape, ...]
    block_params: tuple[tuple[int, int], ...]
    fixed_params: int
    fixed_macs: int
    token_macs: int

    @classmethod
    def of(cls, model: VisionTransformer) -> "Geometry":
        """Reads the geometry of a dense, masked or slim model; works on the meta device."""
        model = getattr(model, "source", model)  # a packed model costs what it was made of
        if not isinstance(getattr(model, "_orig_mod", model), VisionTransformer):
            raise VitslimError(
                f"the cost of a {type(model).__name__} cannot be counted: only that of timm's "
                "VisionTransformer can, that is its vit_* and deit_* models"
            )
        for part in (model.patch_embed, *model.blocks):
            if not (type(part) is PatchEmbed or (hasattr(part, "attn") and hasattr(part, "mlp"))):
                raise VitslimError(
                    f"the cost of a {type(part).__name__}, which this model has, cannot be counted"
                )
        prefix, patches = model.num_prefix_tokens, int(model.patch_embed.num_patches)
        shapes, unit_params, heads = block_shapes(model), [], []
        for block, shape in zip(model.blocks, shapes, strict=True):
            attn, mlp = block.attn, block.mlp
            unit_params.append(_unit_params(attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
            ragged = isinstance(attn, SlimAttention)
            heads.append((0, 0) if ragged else (attn.num_heads, shape.attn_dim // attn.num_heads))
        masks = sum(part.parameter.numel() for part in masked_parts(model))
        params = sum(parameter.numel() for parameter in model.parameters()) - masks
        cut = sum(
            shape.attn_dim * per_dim + shape.hidden * per_unit
            for shape, (per_dim, per_unit) in zip(shapes, unit_params, strict=True)
        )
        fixed_macs, token_macs = _ends(model)
        return cls(
            model.embed_dim,
            prefix,
            patches,
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
            macs += shape.tokens * shape.unit_macs(self.embed_dim).token
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


def block_shapes(model: VisionTransformer) -> list[BlockShape]:
    """Returns the shape of every block of a dense, masked or slim model."""
    prefix = model.num_prefix_tokens
    tokens, shapes = prefix + int(model.patch_embed.num_patches), []
    for block in model.blocks:
        select = getattr(block, "tokens", None)
        if isinstance(select, TokenSelect):
            tokens = prefix + len(select.keep)
        shapes.append(BlockShape(block.attn.proj.in_features, block.mlp.fc2.in_features, tokens))
    return shapes


def cost(model: VisionTransformer, plan: Plan | None = None) -> Cost:
    """Returns the parameters and MACs of a model, or of what a plan makes of it.

    Args:
        model: Dense, masked, slim or packed; for `plan` the dense or masked one. May be on "meta".
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


def _ends(model: VisionTransformer) -> tuple[int, int]:
    """Returns the MACs before and after the blocks: fixed ones, and those per final token."""
    channels, size = model.patch_embed.proj.weight.shape[1], model.patch_embed.img_size
    fixed = _counted(model.patch_embed, 1, channels, *size)
    heads = [head for name in ("head", "head_dist") if (head := getattr(model, name, None))]
    linear = sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))
    pool = getattr(model, "attn_pool", None)
    per_token = linear if not model.global_pool else 0
    fixed += 0 if per_token else linear
    if pool is not None:
        # Pooling by attention is affine in the number of tokens: two counts give both terms.
        one, two = (_counted(pool, 1, tokens, model.embed_dim) for tokens in (16, 32))
        per_token += (two - one) // 16
        fixed += one - (two - one)
    return fixed, per_token


def _counted(module: nn.Module, *shape: int) -> int:
    """Returns the MACs of a module on an input of this shape, by PyTorch's flop counter."""
    ghost = copy.deepcopy(module).to("meta").eval().requires_grad_(False)
    dtype = next(ghost.parameters()).dtype
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ghost(torch.empty(shape, device="meta", dtype=dtype))
    return int(counter.get_total_flops() // 2)
