"""What units are scored by: gradients of masks, what units give, their weights, or chance."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration import Images
from ..calibration.fisher import drawn_loss
from ..calibration.watching import Point, watching
from ..families import Family
from ..families.family import Site

# A score per unit of a block, by kind: [heads, head_dim], [hidden], [patches].
Scores = dict[str, Tensor]


def sensitivities(
    model: nn.Module,
    family: Family,
    kinds: tuple[str, ...],
    images: Images,
    granularity: str,
    drawn: torch.Generator | None,
    quiet: bool,
) -> list[Scores]:
    """Returns 1/2 mean (dL/dz)^2 for the mask z of every unit, where z multiplies values v.

    At z = 1, dL/dz is the sum over tokens of v dL/dv, so that no mask has to be there.
    """
    sites = family.sites(model)
    points = [
        *(Point((i, "attention", 0), s.block.attn.qkv, "output") for i, s in enumerate(sites)),
        *_hidden_and_rows(family, sites),
    ]
    points = [point for point in points if point.key[1] in kinds]
    sums: list[Scores] = [{} for _ in sites]
    for batch, labels in images.shown("scores", quiet):
        with watching(points) as seen, torch.enable_grad():
            logits = model(batch.detach().clone().requires_grad_())
            if drawn is None:
                loss = F.cross_entropy(logits, labels, reduction="sum")
            else:
                loss = drawn_loss(logits, int(getattr(model, "num_classes", 0)), drawn)
        gradients = torch.autograd.grad(loss, list(seen.values()))
        slopes: list[Scores] = [{} for _ in sites]
        for ((index, kind, _), values), gradient in zip(seen.items(), gradients, strict=True):
            slope = (values.detach() * gradient).sum(-1 if kind == "token" else 1)
            slopes[index][kind] = slopes[index].get(kind, 0) + slope
        for site, total, slope in zip(sites, sums, slopes, strict=True):
            for kind, each in slope.items():
                if kind == "attention":
                    each = each.view(len(each), 3, site.block.attn.num_heads, -1).sum(1)
                    # A mask that heads or dimensions share has the sum of their slopes.
                    shared = {"uniform": 1, "head": 2}.get(granularity)
                    each = each if shared is None else each.sum(shared, True).expand_as(each)
                elif kind == "token":
                    each = each[:, family.num_prefix_tokens(model) :]
                total[kind] = total.get(kind, 0) + each.double().square().sum(0)
    return [{k: _ready(v / (2 * images.count)) for k, v in total.items()} for total in sums]


@torch.no_grad()
def activations(
    model: nn.Module, family: Family, kinds: tuple[str, ...], images: Images, quiet: bool
) -> list[Scores]:
    """Returns the root mean square of what every unit gives."""
    sites = family.sites(model)
    points = [
        *(Point((i, "attention", 0), s.block.attn.proj, "input") for i, s in enumerate(sites)),
        *_hidden_and_rows(family, sites),
    ]
    points = [point for point in points if point.key[1] in kinds]
    sums: list[Scores] = [{} for _ in sites]
    for batch, _ in images.shown("scores", quiet):
        with watching(points) as seen:
            model(batch)
        for (index, kind, _), values in seen.items():
            squares = values.double().square().mean(-1 if kind == "token" else 1).sum(0)
            if kind == "attention":
                squares = squares.view(sites[index].block.attn.num_heads, -1)
            elif kind == "token":
                squares = squares[family.num_prefix_tokens(model) :]
            sums[index][kind] = sums[index].get(kind, 0) + squares
    return [{k: _ready((v / images.count).sqrt()) for k, v in total.items()} for total in sums]


def _hidden_and_rows(family: Family, sites: list[Site]) -> list[Point]:
    """Returns where hidden units and the rows of tokens are seen."""
    points = []
    for index, site in enumerate(sites):
        points.append(Point((index, "mlp", 0), site.block.mlp.fc2, "input"))
        for number, half in enumerate(family.halves(site.block)):
            points.append(Point((index, "token", number), half.norm, "output"))
    return points


def magnitudes(model: nn.Module, family: Family, kinds: tuple[str, ...]) -> list[Scores]:
    """Returns the l2 norm of all weights and biases of every unit."""
    scores: list[Scores] = []
    for site in family.sites(model):
        attn, mlp = site.block.attn, site.block.mlp
        each: Scores = {}
        if "attention" in kinds:
            rows = _squares(attn.qkv).view(3, attn.num_heads, -1).sum(0)
            columns = attn.proj.weight.detach().double().square().sum(0).view_as(rows)
            each["attention"] = _ready((rows + columns).sqrt())
        if "mlp" in kinds:
            columns = mlp.fc2.weight.detach().double().square().sum(0)
            each["mlp"] = _ready((_squares(mlp.fc1) + columns).sqrt())
        scores.append(each)
    return scores


def random_scores(
    model: nn.Module, family: Family, kinds: tuple[str, ...], seed: int
) -> list[Scores]:
    """Returns uniform random numbers."""
    generator = torch.Generator().manual_seed(seed)
    down, across = family.grid(model)
    scores: list[Scores] = []
    for site in family.sites(model):
        attn = site.block.attn
        sizes = {
            "attention": (attn.num_heads, attn.proj.in_features // attn.num_heads),
            "mlp": (site.block.mlp.fc2.in_features,),
            "token": (down * across,),
        }
        scores.append({kind: torch.rand(sizes[kind], generator=generator) for kind in kinds})
    return scores


def _squares(layer: nn.Linear) -> Tensor:
    """Returns the squared norm of every output's weights and bias."""
    bias = 0 if layer.bias is None else layer.bias.detach().double().square()
    return layer.weight.detach().double().square().sum(1) + bias


def shared(scores: Tensor | None, granularity: str) -> Tensor | None:
    """Gives units that are cut together the root mean square of their scores."""
    over = {"uniform": 0, "head": 1}.get(granularity)
    if scores is None or over is None:
        return scores
    return scores.square().mean(over, keepdim=True).sqrt().expand_as(scores).contiguous()


def _ready(scores: Tensor) -> Tensor:
    return scores.float().cpu().contiguous()
