"""A vision transformer from the image to its last tokens, dense or slim, in one call.

    x = start + patches(image) W^T                 start: class tokens, positions, patch bias
    in each block, where x loses the rows that the block drops first:
      x += ls1 * proj(ragged_attention(qkv(gate * layer_norm(x))))
      x += ls2 * fc2(f(fc1(gate * layer_norm(x))))
    out = layer_norm(x)[:rows]

The model stands in three arrays, with C = embed_dim and D the sum of the heads' widths:

`layout`, integers: 1 (the version), in_chans, patch_height, patch_width, embed_dim, prefix (leading
rows of start that have no patch), pre_norm, final_norm (0 or 1), number of blocks, then for each
block heads, hidden, activation, selects, gated (0 or 1), kept, the heads' widths, and if the block
selects, the `kept` rows of x that stay.

`vectors`, each piece filled up with zeros to a multiple of 16: with pre_norm (eps), weight, bias
[C]; each block (softmax scale, eps of norm1, eps of norm2), norm1 weight, bias [C], qkv bias [3 D],
proj bias, ls1, norm2 weight, bias [C], fc1 bias [hidden], fc2 bias, ls2 [C], if gated the gate
[tokens of the block]; with final_norm (eps), weight, bias [C].

`panels`, packed as packed_linear says: patches [C, in_chans * patch_height * patch_width], then of
each block qkv [3 D, C], proj [C, D], fc1 [hidden, C], fc2 [C, hidden].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .packed_linear import ACTIVATIONS, PANEL, packed_linear_forward, panel_elements
from .ragged_attention import ragged_attention_forward

VERSION = 1


def vit_encoder_forward(
    images: Tensor,
    start: Tensor,
    vectors: Tensor,
    panels: Tensor,
    layout: Tensor,
    rows: int,
    bfloat16_products: bool,
) -> Tensor:
    """Returns the first `rows` tokens, normed, [B, rows, C] in start's dtype.

    Args:
        images: [B, in_chans, height, width].
        start: [N, C].
        vectors: 1-D, in start's dtype.
        panels: 1-D, in any dtype; bfloat16 in pairs.
        layout: int64, 1-D.
        rows: At most as many as the last block keeps.
        bfloat16_products: Round what meets a packed weight to bfloat16.
    """
    read = _Reader(layout, vectors, panels, bfloat16_products)
    model = read.head()
    width = model.embed_dim
    x = _embed(images, start, model, read)  # [B, N, C]
    if model.pre_norm:
        x = F.layer_norm(x, [width], *read.norm(width))
    for _ in range(model.blocks):
        x = _block(x, read)
    if model.final_norm:
        x = F.layer_norm(x, [width], *read.norm(width))
    read.end()
    _require(0 <= rows <= x.shape[1], f"rows is {rows}, the last block keeps {x.shape[1]}")
    return x[:, :rows].contiguous()


@dataclass
class _Model:
    in_chans: int
    patch_height: int
    patch_width: int
    embed_dim: int
    prefix: int
    pre_norm: int
    final_norm: int
    blocks: int


def _embed(images: Tensor, start: Tensor, model: _Model, read: "_Reader") -> Tensor:
    batch, channels, height, width = images.shape
    down, across = height // model.patch_height, width // model.patch_width
    _require(channels == model.in_chans, f"images have {channels} channels, not {model.in_chans}")
    expected = (model.prefix + down * across, model.embed_dim)
    _require(
        tuple(start.shape) == expected,
        f"start must be {list(expected)} for images of {height} x {width}, got {list(start.shape)}",
    )
    _require(
        height % model.patch_height == 0 and width % model.patch_width == 0,
        f"images of {height} x {width} cannot be cut into patches of "
        f"{model.patch_height} x {model.patch_width}",
    )
    grid = (batch, channels, down, model.patch_height, across, model.patch_width)
    patches = images.reshape(grid).permute(0, 2, 4, 1, 3, 5)
    depth = channels * model.patch_height * model.patch_width
    patches = patches.reshape(batch, down * across, depth).to(start.dtype)
    x = start.expand(batch, -1, -1).clone()
    x[:, model.prefix :] += read.linear(patches, model.embed_dim)
    return x


def _block(x: Tensor, read: "_Reader") -> Tensor:
    width = x.shape[2]
    heads, hidden, activation, selects, gated, kept = read.integers(6)
    _require(max(selects, gated) <= 1, "selects and gated must be 0 or 1")
    _require(kept <= x.shape[1], f"a block keeps {kept} rows of {x.shape[1]}")
    head_dims = read.integers(heads)
    if selects:
        chosen = read.integers(kept)
        _require(all(row < x.shape[1] for row in chosen), "a block keeps a row that is not there")
        x = x[:, chosen]
    total = sum(head_dims)
    scale, eps1, eps2 = read.vector(3).tolist()
    norm1, qkv_bias = (read.vector(width), read.vector(width), eps1), read.vector(3 * total)
    proj_bias, scale1 = read.vector(width), read.vector(width)
    norm2, fc1_bias = (read.vector(width), read.vector(width), eps2), read.vector(hidden)
    fc2_bias, scale2 = read.vector(width), read.vector(width)
    gate = read.vector(x.shape[1]).unsqueeze(1) if gated else 1.0
    _require(activation < len(ACTIVATIONS), f"there is no activation {activation}")
    function = tuple(ACTIVATIONS)[activation]

    normed = gate * F.layer_norm(x, [width], *norm1)
    qkv = read.linear(normed, 3 * total, qkv_bias)
    attended = ragged_attention_forward(qkv, head_dims, scale, None)[0]
    x = read.linear(attended, width, proj_bias, residual=x, scale=scale1)
    normed = gate * F.layer_norm(x, [width], *norm2)
    units = read.linear(normed, hidden, fc1_bias, activation=function)
    return read.linear(units, width, fc2_bias, residual=x, scale=scale2)


class _Reader:
    """Takes one piece after the other from the three arrays, and says so where one ends early."""

    def __init__(self, layout: Tensor, vectors: Tensor, panels: Tensor, bfloat16: bool) -> None:
        self._layout: Sequence[int] = layout.tolist()
        self._vectors, self._panels, self._bfloat16 = vectors, panels, bfloat16
        self._at = {"layout": 0, "vectors": 0, "panels": 0}

    def head(self) -> _Model:
        _require(self.integers(1) == [VERSION], f"layout must begin with version {VERSION}")
        model = _Model(*self.integers(8))
        smallest = min(model.in_chans, model.patch_height, model.patch_width, model.embed_dim)
        _require(smallest > 0, "channels, patches and embed_dim must be positive")
        return model

    def integers(self, count: int) -> list[int]:
        taken = list(self._take("layout", self._layout, count, count))
        _require(all(each >= 0 for each in taken), "layout holds a negative number")
        return taken

    def vector(self, count: int) -> Tensor:
        piece: Tensor = self._take("vectors", self._vectors, count, -(-count // PANEL) * PANEL)
        return piece

    def norm(self, width: int) -> tuple[Tensor, Tensor, float]:
        eps = float(self.vector(1))
        return self.vector(width), self.vector(width), eps

    def linear(
        self,
        x: Tensor,
        out_features: int,
        bias: Tensor | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        count = panel_elements(out_features, x.shape[-1], self._panels.dtype)
        panels = self._take("panels", self._panels, count, count)
        epilogue = (bias, out_features, activation, residual, scale)
        return packed_linear_forward(x, panels, *epilogue, None, None, 0.0, self._bfloat16)

    def end(self) -> None:
        lengths = (len(self._layout), self._vectors.numel(), self._panels.numel())
        for (name, at), length in zip(self._at.items(), lengths, strict=True):
            _require(at == length, f"{name} has {length} elements, the layout takes {at}")

    def _take(self, name: str, array: Any, count: int, step: int) -> Any:
        at = self._at[name]
        self._at[name] = at + step
        _require(self._at[name] <= len(array), f"{name} ends early, at {len(array)} elements")
        return array[at : at + count]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"vit_encoder: {message}; the arrays do not fit each other")
