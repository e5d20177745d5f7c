"""Ridge regression of a linear layer, from sums that any number of rows can be added to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Strengths that are tried, as shares of the diagonal of the second moments.
STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
# One batch in so many is held out where the strength of a ridge is chosen.
HELD = 6


class Moments:
    """The sums of a weighted least squares problem y ~ x W^T + b, in float64.

    Args:
        layer: What is to be refitted; with p = in_features + 1 where it has a bias, else without,
            `inner` is [x 1]^T w [x 1], [p, p], and `cross` [x 1]^T w y, [p, out_features].
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, columns = layer, layer.in_features + (layer.bias is not None)
        double = {"dtype": torch.float64, "device": layer.weight.device}
        self.inner = torch.zeros(columns, columns, **double)
        self.cross = torch.zeros(columns, layer.out_features, **double)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Adds rows x [rows, inputs], y [rows, outputs] that count weight [rows] each."""
        # Products of 16-bit numbers would be rounded to 16 bits.
        exact = torch.promote_types(x.dtype, torch.float32)
        x, y, weight = x.to(exact), y.to(exact), weight.to(exact)
        if self.layer.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        weighted = (x * weight.unsqueeze(1)).T
        # Products of a batch in the model's dtype, sums over batches in float64.
        self.inner += weighted @ x
        self.cross += weighted @ y
        self.rows += len(x)

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(self.layer)
        both.inner, both.cross = self.inner + other.inner, self.cross + other.cross
        both.rows = self.rows + other.rows
        return both

    def solve(self, start: Tensor, strength: float) -> Tensor:
        """Returns argmin_W |[x 1] W - y|^2 + strength * |W - start|^2_diag(inner).

        The strength acts on what a column adds by itself, so that units of any scale are held
        alike; columns that are always zero stay as they were.

        Args:
            start: The weights there were, as `weights_of` gives them.
            strength: Of the ridge, relative to the diagonal.
        """
        diagonal = self.inner.diagonal()
        # A thousandth of the smallest strength for directions in which there is nothing at all.
        ridge = strength * diagonal + 1e-7 * diagonal.mean().clamp(
            min=torch.finfo(start.dtype).tiny
        )
        factor, failed = torch.linalg.cholesky_ex(self.inner + torch.diag(ridge))
        while failed:
            # Rounding has made a direction negative in which there is next to nothing.
            ridge = 10 * ridge
            factor, failed = torch.linalg.cholesky_ex(self.inner + torch.diag(ridge))
        return start + torch.cholesky_solve(self.cross - self.inner @ start, factor)

    def error(self, weights: Tensor, scale: Tensor) -> float:
        """Returns |([x 1] W - y) scale|^2, less what no W changes."""
        each = (weights * (self.inner @ weights - 2 * self.cross)).sum(0)
        return float((each * scale.square()).sum())


class Fit:
    """A layer that is refitted: one batch in `HELD` is held out to choose the ridge's strength.

    Args:
        layer: What is refitted.
        scale: Of its outputs, [out_features] or [1], what an error counts.
    """

    def __init__(self, layer: nn.Linear, scale: Tensor) -> None:
        self.start, self.scale = weights_of(layer), scale.double()
        self.fitted, self.held = Moments(layer), Moments(layer)
        self._batches = 0

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Adds a batch: x [..., inputs], y [..., outputs], weight [...]."""
        held = self._batches % HELD == HELD - 1
        self._batches += 1
        moments = self.held if held else self.fitted
        moments.add(x.flatten(0, -2), y.flatten(0, -2), weight.flatten())

    def solve(self, strengths: Sequence[float]) -> Tensor:
        """Returns the weights of all batches, with the strength that is best on those held out."""
        strength = sorted(strengths)[len(strengths) // 2]
        if self.held.rows and len(strengths) > 1:
            errors = {
                each: self.held.error(self.fitted.solve(self.start, each), self.scale)
                for each in strengths
            }
            strength = min(errors, key=lambda each: errors[each])
        return (self.fitted + self.held).solve(self.start, strength)


def weights_of(layer: nn.Linear) -> Tensor:
    """Returns the weight and, in a last row, the bias if there is one, in float64."""
    rows = [layer.weight.T] if layer.bias is None else [layer.weight.T, layer.bias.unsqueeze(0)]
    return torch.cat(rows).detach().double()


def put_weights(layer: nn.Linear, weights: Tensor) -> None:
    """Writes what `weights_of` reads."""
    layer.weight.data.copy_(weights[: layer.in_features].T)
    if layer.bias is not None:
        layer.bias.data.copy_(weights[-1])
