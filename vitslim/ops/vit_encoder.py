"""`vit_encoder`: a packed vision transformer from the image to its last tokens, in one call."""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ._checks import check
from ._dispatch import LIBRARY, define
from .packed_linear import check_floats, check_panels, only_forward

_OP = "vit_encoder"
define(
    _OP,
    "vit_encoder_forward",
    "(Tensor images, Tensor start, Tensor vectors, Tensor panels, Tensor layout, int rows, "
    "bool bfloat16_products) -> Tensor",
)


def vit_encoder(
    images: Tensor,
    start: Tensor,
    vectors: Tensor,
    panels: Tensor,
    layout: Tensor,
    rows: int,
    bfloat16_products: bool = False,
) -> Tensor:
    """Runs the patch embedding, all blocks and the norms around them. For inference.

    Args:
        images: [B, in_chans, height, width], float32; the reference takes float64 too.
        start: [N, C], what every image's tokens start from: class tokens, positions, patch bias.
        vectors: 1-D, norms, biases, scales and gates.
        panels: 1-D, the packed weights, in float32 or bfloat16.
        layout: 1-D, int64, which says what the two hold. csrc/vit_encoder.h has the whole format;
            `vitslim.pack` makes the three of a model.
        rows: How many of the last block's tokens to compute.
        bfloat16_products: Round what meets a weight to bfloat16, and sum in float32. Needs panels
            in bfloat16.

    Returns:
        [B, rows, C] in start's dtype.

    Raises:
        ValueError: A shape, dtype or device does not fit. What the backend finds wrong in the
            layout comes as a ValueError or a RuntimeError.
    """
    shape = list(images.shape)
    check(images.dim() == 4, _OP, f"images must be [batch, channels, height, width], got {shape}")
    check_floats(_OP, "images", images)
    check_panels(_OP, panels, images, bfloat16_products)
    check(start.dim() == 2, _OP, f"start must be [tokens, embed_dim], got {list(start.shape)}")
    check(rows >= 0, _OP, f"rows must not be negative, got {rows}")
    for name, tensor in (("vectors", vectors), ("panels", panels), ("layout", layout)):
        check(tensor.dim() == 1, _OP, f"{name} must be 1-D, got {list(tensor.shape)}")
    for name, tensor in (("start", start), ("vectors", vectors)):
        fits = tensor.dtype == images.dtype
        check(fits, _OP, f"{name} is {tensor.dtype}, images are {images.dtype}")
    check(layout.dtype == torch.int64, _OP, f"layout must be int64, got {layout.dtype}")
    for name, tensor in (("start", start), ("vectors", vectors), ("panels", panels)):
        there = tensor.device == images.device
        check(there, _OP, f"{name} is on {tensor.device}, the images on {images.device}")
    forward = torch.ops.vitslim.vit_encoder_forward
    arrays = (start, vectors, panels, layout)
    out: Tensor = forward(images.contiguous(), *arrays, rows, bfloat16_products)
    return out


@register_fake("vitslim::vit_encoder_forward", lib=LIBRARY)
def _forward_fake(
    images: Tensor,
    start: Tensor,
    vectors: Tensor,
    panels: Tensor,
    layout: Tensor,
    rows: int,
    bfloat16_products: bool,
) -> Tensor:
    return start.new_empty(images.shape[0], rows, start.shape[1])


register_autograd(
    "vitslim::vit_encoder_forward",
    only_forward(_OP, "train the model that was packed, and pack it again"),
    lib=LIBRARY,
)


@register_flop_formula(torch.ops.vitslim.vit_encoder_forward, get_raw=True)
def _forward_flops(
    images: Tensor,
    start: Tensor,
    vectors: Tensor,
    panels: Tensor,
    layout: Tensor,
    rows: int,
    *_: Any,
    **__: Any,
) -> int:
    """Counts what is computed: of the last block, the queries and the MLP of `rows` tokens."""
    numbers = layout.tolist()
    in_chans, patch_height, patch_width, width, prefix, _, _, blocks = numbers[1:9]
    batch, tokens, at = images.shape[0], start.shape[0], 9
    macs = (tokens - prefix) * width * in_chans * patch_height * patch_width
    for block in range(blocks):
        heads, hidden, _, selects, _, kept = numbers[at : at + 6]
        attn_dim = sum(numbers[at + 6 : at + 6 + heads])
        at += 6 + heads + kept
        tokens = kept if selects else tokens
        queries = rows if block == blocks - 1 else tokens
        linears = tokens * 2 * attn_dim + queries * (2 * attn_dim + 2 * hidden)
        macs += width * linears + 2 * queries * tokens * attn_dim
    return int(2 * batch * macs)
