"""Token masks: a learnable gate per patch while searching, physical removal when slim."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

RAW_START = 3.0  # the paper's start of the raw values: tanh(3) = 0.995
TOKEN_STARTS = ("paper", "one")


class TokenGate(nn.Module):
    """One gate per patch, tanh(raw); prefix tokens (class, distillation, register) pass at 1.

    Args:
        num_patches: Patches of an image.
        num_prefix_tokens: Tokens before the patches.
        start: "paper" starts the gates at tanh(3) = 0.995, "one" divides them by tanh(3) so that
            they start at exactly 1 and the masked model equals the dense one.
    """

    def __init__(
        self,
        num_patches: int,
        num_prefix_tokens: int = 1,
        start: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if start not in TOKEN_STARTS:
            raise ValueError(f"start must be one of {', '.join(TOKEN_STARTS)}, got {start!r}")
        self.num_prefix_tokens = num_prefix_tokens
        self.start = start
        raw = torch.full((num_patches,), RAW_START, device=device, dtype=dtype)
        self.raw = nn.Parameter(raw)
        # The divisor goes through the same tanh, so that equal values give exactly 1.
        unit = torch.tanh(raw.detach().new_tensor([RAW_START])) if start == "one" else None
        self.register_buffer("unit", unit, persistent=False)

    def gate(self) -> Tensor:
        """Returns tanh(raw), [num_patches]: what is penalised and ranked."""
        return torch.tanh(self.raw)

    def forward(self) -> Tensor:
        """Returns the gate of every token of the sequence, [num_prefix_tokens + num_patches]."""
        gate = self.gate() if self.unit is None else self.gate() / self.unit
        return torch.cat([gate.new_ones(self.num_prefix_tokens), gate])

    def extra_repr(self) -> str:
        return f"num_patches={self.raw.shape[0]}, start={self.start!r}"


class TokenSelect(nn.Module):
    """Lets the kept patches through and removes the others from the sequence, for good.

    Args:
        keep: The patches that stay, by their number in the image.
        arriving: The patches that arrive, in the order of the sequence.
        num_prefix_tokens: Tokens before the patches; they always stay.

    Attributes:
        keep: As given.
        gate: [num_prefix_tokens + len(keep)], what the gates of the kept tokens learned. A
            constant: it scales normed rows, which no weight can absorb.
    """

    def __init__(
        self,
        keep: Sequence[int],
        arriving: Sequence[int],
        num_prefix_tokens: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.keep, self.arriving = list(keep), len(arriving)
        places = {patch: num_prefix_tokens + place for place, patch in enumerate(arriving)}
        rows = [*range(num_prefix_tokens), *(places[patch] for patch in keep)]
        self.register_buffer("rows", torch.tensor(rows, device=device), persistent=False)
        self.register_buffer("gate", torch.ones(len(rows), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, prefix + arriving, C] to [B, prefix + kept, C]."""
        return x if len(self.keep) == self.arriving else x.index_select(1, self.rows)

    def extra_repr(self) -> str:
        return f"{self.arriving} -> {len(self.keep)} patches"
