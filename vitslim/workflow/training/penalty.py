"""The search's penalty in a training loop: how heavy it is by now, and in which way it acts."""

from typing import Any

import torch
from torch import Tensor, nn

from ...masks import sparsity_loss
from ..options.settings import Settings
from .proximal import Proximal


class Penalty:
    """The penalty of a search, as settings have it.

    As a subgradient it is added to the loss. As a proximal step it is not: masks are moved towards
    zero after each update, and stay there once they have arrived.

    Args:
        settings: Weights, how they are spread, how they act, and how long they grow.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.in_loss = settings.l1_step == "subgradient"
        self._proximal: Proximal | None = None

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Is told what is trained, before the first update."""
        if not self.in_loss:
            self._proximal = Proximal(model, optimizer, **self._weights())

    def __call__(self, model: nn.Module, progress: float) -> Tensor:
        """Returns the penalty of a model after so many epochs, a float32 scalar."""
        cost = sparsity_loss(model, **self._weights())
        return cost if (scale := self.scale(progress)) == 1 else cost * scale

    def after_step(self, progress: float, clipped: float) -> None:
        """Moves the masks, where that is the way.

        Args:
            progress: Epochs done.
            clipped: What clipping left of the gradient, from 0 to 1. The penalty is clipped with
                it, as it would be in the loss.
        """
        if self._proximal is not None:
            self._proximal.step(self.scale(progress) * clipped)

    def scale(self, progress: float) -> float:
        """Returns the fraction of the full weight after so many epochs."""
        growing = self.settings.l1_warmup_epochs
        return min(1.0, progress / growing) if growing else 1.0

    def _weights(self) -> dict[str, Any]:
        chosen = self.settings
        return {
            "attention": chosen.l1_attention,
            "mlp": chosen.l1_mlp,
            "token": chosen.l1_token,
            "per": chosen.l1_per,
        }
