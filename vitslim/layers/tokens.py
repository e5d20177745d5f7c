"""Token masks: a learnable gate per patch while searching, physical removal when slim."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..allowed import TOKEN_GATES, TOKEN_STARTS

RAW_START = 3.0  # the paper's start of the raw values: tanh(3) = 0.995


class TokenGate(nn.Module):
    """One gate per patch, tanh(raw); prefix tokens (class, distillation, register) pass at 1.

    On the input, the paper's way, a gate g scales the normed input of attention and of the MLP. On
    the keys it stands before a token's share in every softmax,

        A_ij = g_j exp(s_ij) / sum_k g_k exp(s_ik) = softmax(s_i + log g)_j,    g = |tanh(raw)|

    so that at g = 0 nothing reads the token any more, in this layer, as if it had been removed.

    Args:
        num_patches: Patches of an image.
        num_prefix_tokens: Tokens before the patches.
        start: "paper" starts the gates at tanh(3) = 0.995, "one" divides them by tanh(3) so that
            they start at exactly 1 and the masked model equals the dense one.
        place: Where the gates act: "input" or "keys".
    """

    def __init__(
        self,
        num_patches: int,
        num_prefix_tokens: int = 1,
        start: str = "paper",
        place: str = "input",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if start not in TOKEN_STARTS:
            raise ValueError(f"start must be one of {', '.join(TOKEN_STARTS)}, got {start!r}")
        if place not in TOKEN_GATES:
            raise ValueError(f"place must be one of {', '.join(TOKEN_GATES)}, got {place!r}")
        self.num_prefix_tokens = num_prefix_tokens
        self.start, self.place = start, place
        raw = torch.full((num_patches,), RAW_START, device=device, dtype=dtype)
        self.raw = nn.Parameter(raw)
        self.register_buffer("unit", None, persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fills the buffers that no checkpoint holds, as timm asks of a module built on "meta"."""
        if self.start == "one":
            # The divisor goes through the same tanh, so that equal values give exactly 1.
            self.unit = torch.tanh(self.raw.detach().new_tensor([RAW_START]))

    def gate(self) -> Tensor:
        """Returns tanh(raw), [num_patches]: what is penalised and ranked."""
        return torch.tanh(self.raw)

    def forward(self) -> Tensor:
        """Returns the gate of every token of the sequence, [num_prefix_tokens + num_patches]."""
        gate = self.gate() if self.unit is None else self.gate() / self.unit
        return torch.cat([gate.new_ones(self.num_prefix_tokens), gate])

    def key_bias(self) -> Tensor:
        """Returns log |gate| of every token of the sequence, [num_prefix_tokens + num_patches].

        A share grows linearly with its gate, so that the gradient of the log, 1 / gate, has a
        finite limit in all that follows. To keep it at a gate of 0, which can then open again,
        gates are raised to the dtype's epsilon, too little for a softmax to see, and 0 counts as
        positive.
        """
        gate = self()
        gate = torch.where(gate < 0, -gate, gate)
        tiny = torch.finfo(gate.dtype).eps
        # A clamp would pass on no gradient where it acts.
        raised = gate + (gate.detach().clamp(min=tiny) - gate.detach())
        return raised.log()

    def extra_repr(self) -> str:
        return f"num_patches={self.raw.shape[0]}, start={self.start!r}, place={self.place!r}"


class TokenSelect(nn.Module):
    """Lets the kept patches through and removes the others from the sequence, for good.

    Args:
        keep: The patches that stay, by their number in the image.
        arriving: The patches that arrive, in the order of the sequence.
        num_prefix_tokens: Tokens before the patches; they always stay.

    Attributes:
        keep: As given.
        gate: [num_prefix_tokens + len(keep)], what the gates of the kept tokens learned on the
            input, 1 where they acted on the keys. A constant: it scales normed rows, which no
            weight can absorb.
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
        self._rows = [*range(num_prefix_tokens), *(places[patch] for patch in keep)]
        self.register_buffer("rows", torch.tensor(self._rows, device=device), persistent=False)
        self.register_buffer("gate", torch.ones(len(self._rows), device=device, dtype=dtype))

    def init_non_persistent_buffers(self) -> None:
        """Fills the buffers that no checkpoint holds, as timm asks of a module built on "meta"."""
        self.rows = torch.tensor(self._rows, device=self.gate.device)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, prefix + arriving, C] to [B, prefix + kept, C]."""
        return x if len(self.keep) == self.arriving else x.index_select(1, self.rows)

    def extra_repr(self) -> str:
        return f"{self.arriving} -> {len(self.keep)} patches"
