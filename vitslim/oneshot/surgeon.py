"""Optimal brain surgeon: what is lost with a unit although all others make up for it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Images
from ..families import Family
from .moments import BlockMoments, felt, moments_of

# Of the diagonal, against a singular matrix.
_RIDGE = 1e-3
# A layer loses all its units in about so many steps.
_STEPS = 96


@torch.no_grad()
def surgeon_scores(
    model: Any, family: Family, kinds: tuple[str, ...], images: Images, seed: int, quiet: bool
) -> list[dict[str, Tensor]]:
    """Returns by block and kind what the loss of every unit adds to the model's, in nats.

    Units of a layer are removed one after the other, always the one that costs least, and proj or
    fc2 is refitted to what is left each time. With the moments C of the layer's input and F of what
    the loss feels of its output, unit j with column w_j costs

        1/2 |w_j F|^2 / (C^-1)_jj

    of what is left of C^-1 and w. A dimension of a head costs besides what its scores q_j k_j^T
    are worth, 1/2 C_q,jj C_k,jj / E[sum g^2], which nothing makes up for.
    """
    moments = moments_of(model, family, images, hidden="mlp" in kinds, seed=seed, quiet=quiet)
    scores: list[dict[str, Tensor]] = []
    for site, each in zip(family.sites(model), moments, strict=True):
        attn, mlp = family.halves(site.block)
        found: dict[str, Tensor] = {}
        if "attention" in kinds:
            alone = _worth_of_scores(each)  # [heads, d]
            costs = removal(each.outputs / 2, _columns(attn.last, felt(attn, each.after[0])), alone)
            found["attention"] = costs.view_as(alone)
        if "mlp" in kinds:
            writes = _columns(mlp.last, felt(mlp, each.after[1]))
            found["mlp"] = removal(each.hidden / 2, writes)
        scores.append({kind: values.float().cpu() for kind, values in found.items()})
    return scores


def removal(moments: Tensor, writes: Tensor, alone: Tensor | None = None) -> Tensor:
    """Returns what the removal of every unit costs when its turn comes, never less than before.

    Args:
        moments: [p, p] second moments C of the units.
        writes: [p, k] what they write, w F.
        alone: [p] a cost of each unit that others cannot make up for.
    """
    count, diagonal = len(moments), moments.diagonal()
    tiny = torch.finfo(moments.dtype).tiny
    # In units of equal size, which costs do not depend on: else what is large in an inverse of
    # units of any size drowns what is small.
    size = (diagonal + 1e-6 * diagonal.mean().clamp(min=tiny)).sqrt().unsqueeze(1)
    even = moments / size / size.T
    even.diagonal().add_(_RIDGE)
    inverse, writes = torch.linalg.inv(even), writes * size
    least = 1 / (1 + _RIDGE)  # of the diagonal of any inverse; less is rounding
    extra = moments.new_zeros(count) if alone is None else alone.flatten().to(moments)
    numbers = torch.arange(count, device=moments.device)  # of the rows that are left
    gone = torch.zeros(count, dtype=torch.bool, device=moments.device)
    costs, highest = moments.new_zeros(count), moments.new_zeros(1)
    step = max(1, count // _STEPS)
    for start in range(0, count, step):
        now = writes.square().sum(1) / inverse.diagonal().clamp(min=least) + extra
        cheapest = now.masked_fill(gone, torch.inf).topk(min(step, count - start), largest=False)
        taken = cheapest.indices
        # Rising by a hair, so that the order of removal is the order of the scores.
        rising = torch.cummax(torch.cat([highest, cheapest.values]), 0).values[1:]
        rising = rising * (1 + 1e-6 * torch.arange(1, len(taken) + 1, device=rising.device))
        costs[numbers[taken]], highest = rising, rising[-1:]
        gone[taken] = True
        rows = inverse[taken]
        # Rounding may have left nothing of a unit that others make up for whole.
        share = torch.linalg.pinv(rows[:, taken], hermitian=True) @ rows  # [step, what is left]
        writes.addmm_(share.T, writes[taken], alpha=-1)
        inverse.addmm_(rows.T, share, alpha=-1)
        if int(gone.sum()) > len(gone) // 8:
            left = ~gone
            inverse, writes = inverse[left][:, left], writes[left]
            numbers, extra, gone = numbers[left], extra[left], gone[left]
    return costs


def _worth_of_scores(moments: BlockMoments) -> Tensor:
    """Returns what the scores of every dimension of every head are worth, [heads, d]."""
    q, k = (each.diagonal(dim1=-2, dim2=-1) for each in (moments.queries, moments.keys))
    tiny = torch.finfo(q.dtype).tiny
    return q * k / (2 * moments.scores.unsqueeze(1).clamp(min=tiny))


def _columns(layer: nn.Linear, felt: Tensor) -> Tensor:
    return layer.weight.detach().double().T @ felt
