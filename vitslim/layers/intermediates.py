"""forward_intermediates for a model that drops tokens: feature maps keep their full grid."""

from typing import Any

from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .tokens import TokenSelect

_POSITIONAL = (
    "indices",
    "return_prefix_tokens",
    "norm",
    "stop_early",
    "output_fmt",
    "intermediates_only",
    "output_dict",
)


def forward_intermediates(self: VisionTransformer, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """timm's forward_intermediates; patches dropped by then come back as zeros.

    Bound to a slim model in place of timm's method. Arguments and results are timm's.
    """
    kwargs |= dict(zip(_POSITIONAL, args, strict=False))
    as_grid = kwargs.pop("output_fmt", "NCHW") == "NCHW"
    taken, _ = feature_take_indices(len(self.blocks), kwargs.get("indices"))
    result = type(self).forward_intermediates(self, x, output_fmt="NLC", **kwargs)
    if isinstance(result, dict):
        maps = result["image_intermediates"]
        maps = [_restored(self, m, i, as_grid) for m, i in zip(maps, taken, strict=True)]
        return result | {"image_intermediates": maps}
    final, maps = (None, result) if kwargs.get("intermediates_only") else result
    maps = [
        (_restored(self, m[0], i, as_grid), m[1])
        if isinstance(m, tuple)
        else _restored(self, m, i, as_grid)
        for m, i in zip(maps, taken, strict=True)
    ]
    return maps if final is None else (final, maps)


def _restored(model: VisionTransformer, patches: Tensor, index: int, as_grid: bool) -> Tensor:
    """Maps patches [B, kept, C] after block `index` to [B, N, C] or [B, C, H, W]."""
    height, width = model.patch_embed.grid_size
    kept = list(range(height * width))
    for block in model.blocks[: index + 1]:
        if isinstance(getattr(block, "tokens", None), TokenSelect):
            kept = block.tokens.keep
    whole = patches.new_zeros(patches.shape[0], height * width, patches.shape[2])
    whole[:, kept] = patches
    if not as_grid:
        return whole
    return whole.view(-1, height, width, patches.shape[2]).permute(0, 3, 1, 2).contiguous()
