"""Attention over heads of different widths, all of them packed in one tensor.

    S = scale (q z) (k z)^T        P = softmax(S)        O = P (v z)

z is the mask of a head's dimensions (ViT-Slim, equation of the masked attention), 1 if absent.
Backward, with q' = q z and so on, G the gradient of O and delta = rowsum(G * O):

    grad_v' = P^T G      dS = P * (G v'^T - delta)      grad_q' = scale dS k'
    grad_k' = scale dS^T q'
    grad_q = grad_q' z   grad_z = sum over batch and tokens of grad_q' q + grad_k' k + grad_v' v
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def ragged_attention_forward(
    qkv: Tensor, head_dims: Sequence[int], scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns out [B, N, D] in qkv's dtype and lse [B, H, N], the log of each softmax's sum."""
    outs, lses = [], []
    for q, k, v in _heads(_masked(qkv, mask), head_dims):
        scores = scale * (q @ k.mT)  # [B, N, N]
        outs.append(scores.softmax(-1) @ v)  # [B, N, head_dim]
        lses.append(scores.logsumexp(-1))  # [B, N]
    return torch.cat(outs, -1).to(qkv.dtype), torch.stack(lses, 1)


def ragged_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    head_dims: Sequence[int],
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns grad_qkv [B, N, 3 D] and grad_mask [D], which is empty without a mask."""
    masked = _masked(qkv, mask)
    grad_outs = grad_out.to(masked.dtype).split(list(head_dims), -1)
    outs = out.to(masked.dtype).split(list(head_dims), -1)
    grads = []
    for head, (q, k, v) in enumerate(_heads(masked, head_dims)):
        grad, lse_head = grad_outs[head], lse[:, head].unsqueeze(-1)
        probabilities = (scale * (q @ k.mT) - lse_head).exp()  # [B, N, N]
        delta = (grad * outs[head]).sum(-1, keepdim=True)  # [B, N, 1]
        grad_scores = scale * probabilities * (grad @ v.mT - delta)  # [B, N, N]
        grads.append((grad_scores @ k, grad_scores.mT @ q, probabilities.mT @ grad))
    grad_masked = torch.cat([grad for part in zip(*grads, strict=True) for grad in part], -1)
    if mask is None:
        return grad_masked.to(qkv.dtype), lse.new_empty(0)
    grad_mask = (grad_masked * qkv).sum((0, 1)).view(3, -1).sum(0)  # [D]
    return (grad_masked * mask.repeat(3)).to(qkv.dtype), grad_mask


def _masked(qkv: Tensor, mask: Tensor | None) -> Tensor:
    accumulated = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    return accumulated if mask is None else accumulated * mask.repeat(3)


def _heads(qkv: Tensor, head_dims: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(part.split(list(head_dims), -1) for part in qkv.chunk(3, -1)), strict=True)
