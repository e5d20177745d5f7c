"""The penalty as a proximal step: masks reach exactly zero, and stay there while they should.

An update of an optimiser is a step of size t_i for element i, against the gradient g of the loss:

    z_i <- z_i - t_i g_i                  SGD   t_i = lr / (1 - momentum)
                                          Adam  t_i = lr / (sqrt(v_i) + eps), v bias-corrected

It descends in the metric sum_i (z_i - u_i)^2 / t_i. The penalty w_i |z_i| follows by its proximal
operator in the same metric,

    argmin_u  sum_i (u_i - z_i)^2 / (2 t_i) + w_i |u_i|  =  sign(z_i) max(|z_i| - t_i w_i, 0)

so that an element at rest obeys g_i = -w_i sign(z_i), or is zero and |g_i| <= w_i: the minimum of
loss + penalty, whatever the metric. A subgradient step has the same minimum and never arrives: it
goes to and fro around zero.

What momentum gathers from a steady gradient is 1 / (1 - momentum) of it, hence SGD's t; Adam takes
a mean and needs nothing of the kind. Token gates are penalised as w |tanh(raw)|, which is concave
on either side of zero; its tangent at raw, w (1 - tanh(raw)^2) |raw| and a constant, lies above it,
so that a step on the tangent is one on the penalty. Thresholds are those of raw then.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.optim import Adan, Lamb, NAdamW
from torch import Tensor, nn

from ...errors import VitslimError
from ...masks import mask_weights

# Those whose steps are the ones above. Others of the Adam family differ in ways that move the
# minimum: Adopt does not correct the bias of v, RAdam begins without it.
KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, NAdamW, Adan, Lamb)
# So does what changes a step beside them, where a group of parameters has it.
CHANGES = ("max_grad_norm", "clipping_threshold", "caution")


class Proximal:
    """The proximal operator of the penalty, in the metric of an optimiser.

    In place of `sparsity_loss` in the loss, with the same weights. Masks that the optimiser does
    not train are left alone.

    Args:
        model: A masked model, wrapped or not.
        optimizer: torch's SGD, Adam or AdamW, or timm's NAdamW, Adan, or Lamb without clipping.
        attention: Weight of the attention masks; the paper's values are the defaults.
        mlp: Weight of the MLP masks.
        token: Weight of the token gates.
        per: How weights are spread: "kind", the paper's, "unit" or "mac".

    Raises:
        VitslimError: The model has no masks, or the optimiser's steps have no metric known here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        attention: float = 2e-4,
        mlp: float = 5e-5,
        token: float = 1e-4,
        per: str = "kind",
    ) -> None:
        changed = [n for group in optimizer.param_groups for n in CHANGES if group.get(n)]
        if type(optimizer) not in KNOWN or changed:
            name = type(optimizer).__name__ + (f" with {changed[0]}" if changed else "")
            raise VitslimError(
                "a proximal step knows the metric of SGD, Adam, AdamW, NAdamW and Adan, not that "
                f"of {name}: use --l1-step subgradient, or --opt adamw"
            )
        self.optimizer = optimizer
        self._masks = partial(mask_weights, model, attention, mlp, token, per)
        self._masks()

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Moves every mask towards zero; called after the optimiser's step.

        Args:
            scale: Multiplies all weights, while they grow.
        """
        # Asked for anew each time: sharding changes parameters, loading changes groups.
        parts = {part.parameter: (part, weight) for part, weight in self._masks()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in parts:
                    continue
                part, weight = parts[parameter]
                size = self._step_size(group, parameter)
                if size is None:
                    continue
                threshold = size * (weight * scale)
                if part.kind == "token":
                    threshold = threshold * (1 - part.values().square())
                shrunk = (parameter.abs() - threshold).clamp_(min=0)
                parameter.copy_(shrunk.mul_(parameter.sign()))

    def _step_size(self, group: Mapping[str, Any], parameter: Tensor) -> Tensor | float | None:
        """Returns the t of every element, None for a mask that has had no gradient yet."""
        state, lr, betas = self.optimizer.state.get(parameter, {}), group["lr"], group.get("betas")
        if betas is None:
            momentum = group["momentum"]
            # Dampening weakens what momentum gathers, and acts only where something is gathered.
            gathered = 1 - group["dampening"] if momentum else 1
            return lr * gathered / (1 - momentum)
        if not state:
            return None
        # AMSGrad divides by the largest so far. Lamb and Adan count steps by the group.
        square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        step = state["step"] if "step" in state else group["step"]
        return lr / ((square / (1 - betas[-1] ** step)).sqrt() + group["eps"])
