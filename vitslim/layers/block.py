"""timm's pre-norm block with token gates while searching, and with token removal when slim."""

from typing import Any

import torch
import torch.fx
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import VitslimError
from .tokens import TokenGate, TokenSelect


class _Block(nn.Module):
    """The parts of timm's Block under timm's names; norms take a gate where there is one."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.drop_path1 = block.drop_path1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.drop_path2 = block.drop_path2
        self.training = block.training

    def _residuals(self, x: Tensor, gate: Tensor | None, options: dict[str, Any]) -> Tensor:
        gates = () if gate is None else (gate,)
        # Only what was given is passed on: a block left alone may be of a timm without is_causal.
        given = {k: v for k, v in options.items() if v is not None and v is not False}
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x, *gates), **given)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x, *gates))))


class MaskedBlock(_Block):
    """A block that is searched: masked attention, masked MLP, gated norms, any of them or all.

    Args:
        block: timm's Block with its attention, MLP and norms already replaced.
        tokens: The gates of this layer's tokens, or None.
    """

    def __init__(self, block: Block, tokens: TokenGate | None = None) -> None:
        super().__init__(block)
        self.tokens = tokens

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Maps x [B, N, C] to [B, N, C]."""
        gate = None
        if self.tokens is not None and self.tokens.place == "keys":
            bias = self.tokens.key_bias().to(x.dtype)  # [N]
            attn_mask, is_causal = _with_bias(bias, attn_mask, is_causal), False
        elif self.tokens is not None:
            gate = self.tokens()  # [N]
        return self._residuals(x, gate, {"attn_mask": attn_mask, "is_causal": is_causal})


class SlimBlock(_Block):
    """A block of a slim model; tokens that this layer drops leave before anything is computed.

    Args:
        block: timm's Block with its attention, MLP and norms already replaced.
        tokens: What stays of the tokens, or None where the search left them alone.
    """

    def __init__(self, block: Block, tokens: TokenSelect | None = None) -> None:
        super().__init__(block)
        self.tokens = tokens

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Maps x [B, N, C] to [B, kept N, C]."""
        gate = None
        if self.tokens is not None:
            x, gate = self.tokens(_without_mask(x, attn_mask)), self.tokens.gate
            attn_mask = None
        return self._residuals(x, gate, {"attn_mask": attn_mask, "is_causal": is_causal})


# Calls in a graph of torch.fx, for which timm's arguments without a value are unknown.
@torch.fx.wrap
def _without_mask(x: Tensor, attn_mask: Tensor | None) -> Tensor:
    if attn_mask is not None:
        raise VitslimError(
            "attn_mask speaks of tokens that this slim model has dropped; call it without"
        )
    return x


@torch.fx.wrap
def _with_bias(bias: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Returns an attn_mask [..., N, N] that adds bias [N] to the scores of every key."""
    square = bias.expand(len(bias), -1)
    if is_causal:
        # torch takes a mask or is_causal, not both.
        causal = torch.ones_like(square, dtype=torch.bool).tril()
        square = square.masked_fill(~causal, -torch.inf)
    if attn_mask is None:
        return square
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, square, -torch.inf)
    return attn_mask + square
