"""What a model computes, weighted by how much its loss feels a change there: one pass of images."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Images
from ..calibration.fisher import drawn_loss
from ..calibration.watching import Point, watching
from ..families import Family
from ..families.family import Half

# The share of unweighted moments that is mixed in, so that what the loss did not feel on these few
# images is not taken for worthless.
_UNWEIGHTED = 0.05
# The share of the moments of gradients that is the same for all directions.
_EVEN = 1e-3
# Eigenvalues of moments below this share of the largest count as this share.
_SMALLEST = 1e-10


@dataclass
class BlockMoments:
    """Second moments of a block's attention and MLP, sums over tokens and means over images.

    With g the gradient of an image's loss in the residual stream, a row x that is read there counts
    |g|^2. With C the moments of x and G those of g, of trace 1, a change D of the layer's weights
    then adds about 1/2 tr(D^T C D G) to the loss, in nats.

    Attributes:
        queries: [heads, d, d] of q, a token counting the squared gradients of its scores.
        keys: Likewise of k, less its mean over an image's tokens, which no softmax sees.
        scores: [heads] the sum of all squared gradients of scores.
        outputs: [D, D] of the heads' outputs together.
        hidden: [hidden, hidden] of the hidden units.
        after: Of both halves, [channels, channels], E[g^T g] of the stream after them, of trace 1.
    """

    queries: Tensor
    keys: Tensor
    scores: Tensor
    outputs: Tensor
    hidden: Tensor
    after: tuple[Tensor, Tensor]


def moments_of(
    model: Any, family: Family, images: Images, *, hidden: bool, seed: int = 0, quiet: bool = False
) -> list[BlockMoments]:
    """Returns the moments of every block.

    Args:
        model: A dense model, in evaluation mode.
        family: Of it.
        images: That it looks at.
        hidden: Whether moments of hidden units are wanted, the most work of all.
        seed: Of the labels that are drawn.
        quiet: Whether there is no progress bar.
    """
    sites, generator = family.sites(model), torch.Generator().manual_seed(seed)
    points = []
    for index, site in enumerate(sites):
        attn, mlp = family.halves(site.block)
        points += [
            Point((index, "qkv"), attn.layer.qkv, "output"),
            Point((index, "out"), attn.last, "input"),
            Point((index, "hidden"), mlp.last, "input"),
            Point((index, "middle"), mlp.norm, "input"),
            Point((index, "end"), site.block, "output"),
        ]
    sums: list[dict[str, Any]] = [{} for _ in sites]
    for batch, _ in images.shown("moments", quiet):
        with watching(points) as seen, torch.enable_grad():
            output = model(batch.detach().clone().requires_grad_())
            loss = drawn_loss(output, int(getattr(model, "num_classes", 0)), generator)
        felt = [(i, name) for i, _ in enumerate(sites) for name in ("out", "middle", "end")]
        slopes = [_exact(each) for each in torch.autograd.grad(loss, [seen[key] for key in felt])]
        slope = dict(zip(felt, slopes, strict=True))
        for index, site in enumerate(sites):
            of = {name: _exact(seen[index, name]) for name in ("qkv", "out", "hidden")}
            found = _heads(site.block.attn, of["qkv"], slope[index, "out"])
            found |= _rows("outputs", of["out"], slope[index, "middle"])
            found |= _stream(0, slope[index, "middle"]) | _stream(1, slope[index, "end"])
            if hidden:
                found |= _rows("hidden", of["hidden"], slope[index, "end"])
            for name, value in found.items():
                sums[index][name] = sums[index].get(name, 0) + value.double()
    return [_finished(each, images.count) for each in sums]


def _exact(values: Tensor) -> Tensor:
    """Returns values in float32 at least, for products of 16-bit numbers are rounded."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _heads(attn: nn.Module, qkv: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """Returns moments of q and k by head, weighted and not, from the slope of the output."""
    heads: int = attn.num_heads
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
    weights = (q @ k.mT * attn.scale).softmax(-1)
    by_weight = slope.unflatten(-1, (heads, -1)).transpose(1, 2) @ v.mT
    of_scores = weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True))
    squares = (of_scores * attn.scale).square()  # of q k^T, [B, heads, N, N]
    by_query, by_key = squares.sum(-1, keepdim=True), squares.sum(-2).unsqueeze(-1)
    tiny = torch.finfo(squares.dtype).tiny
    centre = (k * by_key).sum(-2, keepdim=True) / by_key.sum(-2, keepdim=True).clamp(min=tiny)
    plain = k - k.mean(-2, keepdim=True)
    return {
        "queries": _by_head(q, by_query),
        "plain queries": _by_head(q),
        "keys": _by_head(k - centre, by_key),
        "plain keys": _by_head(plain),
        "scores": squares.sum((0, 2, 3)),
    }


def _by_head(x: Tensor, weight: Tensor | None = None) -> Tensor:
    weighted = x if weight is None else x * weight
    return (weighted.mT @ x).sum(0)


def _rows(name: str, x: Tensor, slope: Tensor) -> dict[str, Tensor]:
    weight, flat = slope.square().sum(-1).flatten().unsqueeze(1), x.flatten(0, 1)
    return {name: (flat * weight).mT @ flat, f"plain {name}": flat.mT @ flat}


def _stream(half: int, slope: Tensor) -> dict[str, Tensor]:
    flat = slope.flatten(0, 1)
    return {f"after {half}": flat.mT @ flat}


def _finished(sums: dict[str, Any], count: int) -> BlockMoments:
    means = {name: value / count for name, value in sums.items()}

    def mixed(name: str) -> Tensor:
        weighted, plain = means.get(name, torch.zeros(0, 0)), means.get(f"plain {name}")
        if plain is None:
            return weighted
        tiny = torch.finfo(torch.float64).tiny
        size, other = (_trace(each).clamp(min=tiny) for each in (weighted, plain))
        return weighted + _UNWEIGHTED * plain * (size / other)

    after = tuple(means[f"after {half}"] / _trace(means[f"after {half}"]) for half in (0, 1))
    return BlockMoments(
        mixed("queries"),
        mixed("keys"),
        means["scores"],
        mixed("outputs"),
        mixed("hidden"),
        (after[0], after[1]),
    )


def _trace(matrices: Tensor) -> Tensor:
    traces: Tensor = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    return traces[..., None, None]


def felt(half: Half, after: Tensor) -> Tensor:
    """Returns F, so that |x F|^2 = E[(g s x)^2] / E|g|^2 for what a half writes before its scale s.

    Args:
        half: The attention or MLP of a block.
        after: The moments of the gradients g in the stream after it, of trace 1.
    """
    gamma = getattr(half.scale, "gamma", None)
    # A little of every direction: on few images the moments of gradients have few.
    even = torch.eye(len(after), dtype=after.dtype, device=after.device) / len(after)
    root, _ = roots(after + _EVEN * even)
    return root if gamma is None else gamma.detach().double().unsqueeze(1) * root


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the square roots of second moments [..., d, d] and their inverses.

    A singular matrix is no error, see `_SMALLEST`.
    """
    values, vectors = torch.linalg.eigh(moments)
    largest = values.amax(-1, keepdim=True)
    # Where nothing was seen at all every direction is as good as another.
    values = torch.where(largest > 0, torch.maximum(values, _SMALLEST * largest), 1.0)
    return (
        vectors @ (values.sqrt().unsqueeze(-1) * vectors.mT),
        vectors @ (values.rsqrt().unsqueeze(-1) * vectors.mT),
    )
