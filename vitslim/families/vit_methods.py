"""The methods of timm's VisionTransformer that differ once a model is masked or slim."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import VitslimError
from ..layers import TokenGate, TokenSelect

# timm's order of arguments of forward_intermediates; later ones are given by name.
_POSITIONAL = (
    "indices",
    "return_prefix_tokens",
    "norm",
    "stop_early",
    "output_fmt",
    "intermediates_only",
    "output_dict",
)


class MaskedVit:
    """A masked VisionTransformer's own methods, in front of timm's class."""

    blocks: nn.Sequential
    patch_embed: Any

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        resample_masks: bool = False,
    ) -> None:
        """timm's set_input_size; token masks belong to patches, so they are resampled if asked.

        Args:
            img_size: Of the images from now on, in pixels.
            patch_size: Likewise of the patches.
            resample_masks: Resample what token masks have learned to the new grid.

        Raises:
            VitslimError: The grid changes, there are token masks, and `resample_masks` is False.
        """
        before, after = _grids(self, img_size, patch_size)
        gates = [each for each in self.blocks.modules() if isinstance(each, TokenGate)]
        if gates and before != after and not resample_masks:
            raise VitslimError(
                f"the token masks were learned for {_by(before)} patches, and this size makes "
                f"{_by(after)} of them: pass resample_masks=True to resample the masks, or mask "
                "the dense model again at the new size"
            )
        super().set_input_size(img_size=img_size, patch_size=patch_size)  # type: ignore[misc]
        if before == after:
            return
        for gate in gates:
            values = resampled_raw(gate.raw.detach(), before, after)
            gate.raw = nn.Parameter(values, gate.raw.requires_grad)


class SlimVit:
    """A slim VisionTransformer's own methods, in front of timm's class."""

    blocks: nn.Sequential
    patch_embed: Any

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """timm's set_input_size, where no patches were chosen by their place in the image.

        Raises:
            VitslimError: The grid changes, and the plan names patches of the old one.
        """
        before, after = _grids(self, img_size, patch_size)
        if before != after and any(isinstance(each, TokenSelect) for each in self.blocks.modules()):
            raise VitslimError(plan_again(before, after))
        super().set_input_size(img_size=img_size, patch_size=patch_size)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's forward_intermediates; patches dropped by then come back as zeros."""
        plainly = super().forward_intermediates  # type: ignore[misc]
        grid = tuple(self.patch_embed.grid_size)
        kept = _kept_after(self.blocks, grid[0] * grid[1])
        if all(len(each) == grid[0] * grid[1] for each in kept):
            return plainly(x, *args, **kwargs)
        kwargs |= dict(zip(_POSITIONAL, args, strict=False))
        as_grid = kwargs.pop("output_fmt", "NCHW") == "NCHW"
        taken, _ = feature_take_indices(len(self.blocks), kwargs.get("indices"))

        def whole(maps: Any) -> list[Any]:
            both = zip(maps, taken, strict=True)
            return [
                (_restored(m[0], kept[i], grid, as_grid), m[1])
                if isinstance(m, tuple)
                else _restored(m, kept[i], grid, as_grid)
                for m, i in both
            ]

        result = plainly(x, output_fmt="NLC", **kwargs)
        if isinstance(result, dict):
            return result | {"image_intermediates": whole(result["image_intermediates"])}
        if kwargs.get("intermediates_only"):
            return whole(result)
        final, maps = result
        return final, whole(maps)


def resampled_raw(raw: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Resamples raw token masks [patches] from one grid to another, linearly."""
    sizes = {"new_size": list(after), "old_size": list(before), "num_prefix_tokens": 0}
    # Linearly, for a bicubic curve would leave the range of what was learned.
    out = resample_abs_pos_embed(raw.view(1, -1, 1), interpolation="bilinear", **sizes)
    return out.view(-1).to(raw.dtype)


def plan_again(before: Sequence[int], after: Sequence[int]) -> str:
    """Says why a plan that drops patches is of no use on another grid."""
    return (
        f"the slim model keeps patches of a grid of {_by(before)}, and this size makes one of "
        f"{_by(after)}: resize the masked model (set_input_size with resample_masks=True, or "
        "vitslim.load with img_size), then plan again with vitslim.threshold and slim it"
    )


def _grids(model: Any, img_size: Any, patch_size: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the grid of patches as it is, and as it would be."""
    patches = model.patch_embed
    images = to_2tuple(patches.img_size if img_size is None else img_size)
    sides = to_2tuple(patches.patch_size if patch_size is None else patch_size)
    after = tuple(int(i) // int(s) for i, s in zip(images, sides, strict=True))
    return tuple(int(each) for each in patches.grid_size), after


def _kept_after(blocks: nn.Sequential, patches: int) -> list[list[int]]:
    """Returns the patches that are left after every block."""
    alive, kept = list(range(patches)), []
    for block in blocks:
        select = getattr(block, "tokens", None)
        alive = select.keep if isinstance(select, TokenSelect) else alive
        kept.append(alive)
    return kept


def _restored(patches: Tensor, kept: list[int], grid: tuple[int, ...], as_grid: bool) -> Tensor:
    """Maps patches [B, kept, C] to [B, N, C] or [B, C, H, W], with zeros for the others."""
    batch, _, channels = patches.shape
    whole = patches.new_zeros(batch, grid[0] * grid[1], channels)
    whole[:, torch.tensor(kept, device=patches.device)] = patches
    if not as_grid:
        return whole
    return whole.view(batch, *grid, channels).permute(0, 3, 1, 2).contiguous()


def _by(grid: Sequence[int]) -> str:
    return " x ".join(str(each) for each in grid)
