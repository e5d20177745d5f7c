"""timm's VisionTransformer: ViT, DeiT, distilled, DeiT-III, CLIP, SigLIP, DINOv2 and so on."""

import inspect
from collections.abc import Mapping
from typing import Any

from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed, to_2tuple
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from ..errors import VitslimError
from ..layers import MaskedBlock, SlimBlock
from ..layers.norm import why_not_norm
from ..plan import Plan
from .counting import counted_macs
from .family import Family, Half, Site
from .plain import plain_settings
from .vit_methods import MaskedVit, SlimVit, plan_again, resampled_raw


class Vit(Family):
    """The family of timm's VisionTransformer."""

    title = "timm's VisionTransformer, that is its vit_* and deit_* models,"
    model_types = (VisionTransformerDistilled, VisionTransformer)
    block_types, scale_type = (Block,), LayerScale
    kinds = ("attention", "mlp", "token")
    masked_block, slim_block = MaskedBlock, SlimBlock
    masked_methods, slim_methods = MaskedVit, SlimVit

    def check(
        self, model: VisionTransformer, kinds: tuple[str, ...] = (), done: str = "slimmed"
    ) -> None:
        if type(model.patch_embed) is not PatchEmbed:
            raise VitslimError(
                f"this model makes its tokens with a {type(model.patch_embed).__name__}; only "
                f"timm's PatchEmbed is supported, so hybrids cannot be {done}"
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

    def sites(self, model: VisionTransformer) -> list[Site]:
        tokens = self.num_prefix_tokens(model) + int(model.patch_embed.num_patches)
        return [
            Site(f"blocks.{name}", block, model.embed_dim, tokens)
            for name, block in model.blocks.named_children()
        ]

    def embed(self, model: VisionTransformer, images: Tensor) -> Tensor:
        tokens = model._pos_embed(model.patch_embed(images))
        embedded: Tensor = model.norm_pre(model.patch_drop(tokens))
        return embedded

    def halves(self, block: Any) -> tuple[Half, ...]:
        if type(block) not in (*self.block_types, self.masked_block, self.slim_block):
            return ()
        attn, mlp = block.attn, block.mlp
        return (
            Half("attention", block.norm1, attn, attn.qkv, attn.proj, block.ls1),
            Half("mlp", block.norm2, mlp, mlp.fc1, mlp.fc2, block.ls2),
        )

    def why_not_tokens(self, block: Any, token_gate: str) -> str | None:
        if token_gate == "keys" and type(block.attn) is not Attention:
            return f"its attention is a {type(block.attn).__name__}, which may take no bias"
        # Norms carry no gate on the keys, but they do once tokens are removed.
        return why_not_norm(block.norm1) or why_not_norm(block.norm2)

    def grid(self, model: VisionTransformer) -> tuple[int, int]:
        down, across = model.patch_embed.grid_size
        return int(down), int(across)

    def num_prefix_tokens(self, model: VisionTransformer) -> int:
        return int(model.num_prefix_tokens)

    def input_shape(self, model: VisionTransformer) -> tuple[int, int, int]:
        (height, width), proj = model.patch_embed.img_size, model.patch_embed.proj
        # An adapter around the convolution has its weight alone.
        channels = getattr(proj, "in_channels", None) or proj.weight.shape[1]
        return int(channels), int(height), int(width)

    def ends(self, model: VisionTransformer) -> tuple[int, int]:
        fixed = counted_macs(model.patch_embed, 1, *self.input_shape(model))
        heads = [head for name in self.classifiers(model) if (head := getattr(model, name))]
        linear = sum(counted_macs(head, 1, model.embed_dim) for head in heads)
        pool = getattr(model, "attn_pool", None)
        per_token = linear if not model.global_pool else 0
        fixed += 0 if per_token else linear
        if pool is not None:
            # Pooling by attention is affine in the number of tokens: two counts give both terms.
            one, two = (counted_macs(pool, 1, tokens, model.embed_dim) for tokens in (16, 32))
            per_token += (two - one) // 16
            fixed += one - (two - one)
        return fixed, per_token

    def describe(self, model: VisionTransformer) -> dict[str, Any]:
        recorded = getattr(model, "_model_args", {})
        config = getattr(model, "pretrained_cfg", None) or {}
        # Masked and slim models are recorded as a dense one and what was made of it.
        base = recorded.get("base") or {"model": config.get("architecture"), "args": {}}
        name = base["model"] or type(model).__name__
        channels, height, width = self.input_shape(model)
        sites = self.sites(model)
        known = inspect.signature(VisionTransformer).parameters
        args = {k: v for k, v in {**base["args"], **recorded}.items() if k in known}
        # What a user may have changed after creation, and what an older timm does not record.
        args |= {
            "img_size": [height, width],
            "patch_size": list(model.patch_embed.patch_size),
            "in_chans": channels,
            "num_classes": _num_classes(model),
            "global_pool": model.global_pool,
            "class_token": model.cls_token is not None,
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "embed_dim": model.embed_dim,
            "depth": len(sites),
        }
        if model.dynamic_img_size:
            args["dynamic_img_size"] = True
        normed = not isinstance(model.fc_norm, nn.Identity)
        if normed != (model.global_pool in ("avg", "avgmax", "max")):
            args["fc_norm"] = normed
        heads = [getattr(getattr(site.block, "attn", None), "num_heads", None) for site in sites]
        if any(heads):
            args["num_heads"] = next(each for each in heads if each)
        return {"model": name, "args": plain_settings(args)}

    def grid_of(self, base: Mapping[str, Any]) -> tuple[int, int]:
        images, patches = (to_2tuple(base["args"][name]) for name in ("img_size", "patch_size"))
        return int(images[0]) // int(patches[0]), int(images[1]) // int(patches[1])

    def check_plan(self, model: VisionTransformer, plan: Plan, grid: tuple[int, int]) -> None:
        now = self.grid(model)
        if now != grid and any(block.tokens is not None for block in plan.blocks):
            raise VitslimError(plan_again(grid, now))

    def classifiers(self, model: VisionTransformer) -> tuple[str, ...]:
        return tuple(name for name in ("head", "head_dist") if hasattr(model, name))

    def rows_read(self, model: VisionTransformer) -> int | None:
        if isinstance(model, VisionTransformerDistilled):
            return 2
        return 1 if model.attn_pool is None and model.global_pool == "token" else None

    def resampled(
        self, state: Mapping[str, Tensor], model: VisionTransformer, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        state, patch = dict(state), model.patch_embed.patch_size
        weight = state.get("patch_embed.proj.weight")
        if weight is not None and weight.dim() == 4 and tuple(weight.shape[2:]) != tuple(patch):
            state["patch_embed.proj.weight"] = resample_patch_embed(weight, list(patch))
        now = self.grid(model)
        if now == tuple(grid):
            return state
        if "pos_embed" in state:
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            sizes = {"new_size": list(now), "old_size": list(grid), "num_prefix_tokens": prefix}
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], **sizes)
        raws = {name: each for name, each in state.items() if name.endswith(".tokens.raw")}
        return state | {name: resampled_raw(raw, grid, now) for name, raw in raws.items()}


def _num_classes(model: VisionTransformer) -> int:
    """Returns what the classifier gives, of which the model may not have been told."""
    return int(getattr(model.head, "out_features", model.num_classes))
