"""How much every unit matters to a model as it stands: scores that no training is needed for."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..allowed import CRITERIA, GRANULARITIES, KINDS
from ..calibration import Images
from ..calibration.fisher import drawn_loss
from ..calibration.watching import Point, watching
from ..errors import VitslimError
from ..families import Family, family_of
from ..families.family import Site
from ..layers.attention import why_not_cut_attention
from ..layers.mlp import why_not_cut_mlp
from ..masks import Masks
from ..surgery.classes import MaskedModel, SlimModel
from ..wrapped import bare
from .surgeon import surgeon_scores


def importance(
    model: nn.Module,
    data: Any = None,
    criterion: str = "obs",
    *,
    kinds: Iterable[str] | None = ("attention", "mlp"),
    granularity: str = "head_dim",
    batch_size: int = 32,
    seed: int = 0,
    quiet: bool = False,
) -> Masks:
    """Scores every unit of a dense model without training; `vitslim.threshold` takes the scores.

    With z the masks of `vitslim.mask`, all 1, and L_n the loss of image n:

        obs         what is lost although all other units of the layer make up for it (optimal
                    brain surgeon, see `surgeon_scores`); of tokens as fisher; needs no labels
        fisher      1/2 mean_n (dL_n/dz)^2, L the cross-entropy with labels that are drawn from
                    the model's own output: needs no labels
        taylor      the same with the labels of the data
        activation  root mean square of what the unit gives: a dimension of a head's output, a
                    hidden unit, a token's row before attention and MLP
        magnitude   l2 norm of all weights of the unit; of no tokens, and needs no images
        random      uniform

    The first three are in nats, the loss that is expected to be added when a unit is removed, so
    that they compare between kinds: see `ranking="macs"` of `vitslim.threshold`.

    Args:
        model: A dense timm vision transformer, wrapped or not, in evaluation mode.
        data: Normalised images [n, channels, height, width], (images, labels), or a list or
            DataLoader of batches of either. Labels are class numbers [n].
        criterion: As above.
        kinds: Of units, of "attention", "mlp" and "token"; None is all that the criterion and the
            family know.
        granularity: Of the attention's scores: "head_dim", "uniform" or "head".
        batch_size: Images that are computed at once.
        seed: Of labels that are drawn and of random scores.
        quiet: Whether there is no progress bar.

    Raises:
        VitslimError: A criterion or kind does not exist, labels or images are missing, or the
            images are not what the model takes.
    """
    model = bare(model)
    family = family_of(model, "scored")
    if criterion not in CRITERIA:
        raise VitslimError(f"no criterion is called {criterion!r}; use {CRITERIA}")
    if granularity not in GRANULARITIES:
        raise VitslimError(f"no granularity is called {granularity!r}; use {GRANULARITIES}")
    if criterion == "obs" and granularity != "head_dim":
        raise VitslimError("obs scores every dimension of every head: take fisher for others")
    if isinstance(model, MaskedModel | SlimModel):
        raise VitslimError("this model is masked or slim already; score the dense one")
    chosen = _kinds(family, kinds, criterion)
    family.check(model, chosen, "scored")
    for site in family.sites(model):
        _check_site(family, site, chosen)
    if criterion == "magnitude":
        each = _magnitudes(model, family, chosen)
    elif criterion == "random":
        each = _random(model, family, chosen, seed)
    elif criterion == "activation":
        images = _images(data, model, criterion, batch_size)
        each = _activations(model, family, chosen, images, quiet)
    elif criterion == "obs":
        images = _images(data, model, criterion, batch_size)
        each = surgeon_scores(model, family, chosen, images, seed, quiet)
        if "token" in chosen:
            drawn = torch.Generator().manual_seed(seed)
            rows = _sensitivities(model, family, ("token",), images, granularity, drawn, quiet)
            each = [one | other for one, other in zip(each, rows, strict=True)]
    else:
        images = _images(data, model, criterion, batch_size)
        labels = torch.Generator().manual_seed(seed) if criterion == "fisher" else None
        each = _sensitivities(model, family, chosen, images, granularity, labels, quiet)
    columns = {kind: [scores.get(kind) for scores in each] for kind in KINDS}
    if criterion in ("activation", "magnitude", "random"):
        columns["attention"] = [_shared(each, granularity) for each in columns["attention"]]
    return Masks(**columns, granularity=granularity)


def _kinds(family: Family, kinds: Iterable[str] | None, criterion: str) -> tuple[str, ...]:
    known = tuple(k for k in family.kinds if k != "token" or criterion != "magnitude")
    chosen = known if kinds is None else tuple(kinds)
    for kind in chosen:
        if kind not in known:
            raise VitslimError(f"{criterion} scores no kind called {kind!r}; use {known}")
    if not chosen:
        raise VitslimError(f"no kind is to be scored; use some of {known}")
    return chosen


def _check_site(family: Family, site: Site, kinds: tuple[str, ...]) -> None:
    """Refuses a block of which `slim` could not cut what would be scored."""
    whole = None
    if type(site.block) not in family.block_types:
        whole = f"it is a {type(site.block).__name__}"
    why = {
        "attention": lambda: why_not_cut_attention(site.block.attn),
        "mlp": lambda: why_not_cut_mlp(site.block.mlp),
        "token": lambda: family.why_not_tokens(site.block, "input"),
    }
    for kind in kinds:
        if reason := whole or why[kind]():
            raise VitslimError(f"the {kind} of {site.name} cannot be cut, so not scored: {reason}")


def _images(data: Any, model: nn.Module, criterion: str, batch_size: int) -> Images:
    if data is None:
        raise VitslimError(
            f"{criterion} looks at images: give some, or take magnitude, which needs none"
        )
    images = Images.of(data, model, batch_size, what_for=f"{criterion} scores")
    if criterion == "taylor" and not images.labelled:
        raise VitslimError(
            "taylor needs labels: give (images, labels), or take fisher, which needs none"
        )
    return images


# A score per unit of a block, by kind: [heads, head_dim], [hidden], [patches].
_Scores = dict[str, Tensor]


def _sensitivities(
    model: nn.Module,
    family: Family,
    kinds: tuple[str, ...],
    images: Images,
    granularity: str,
    drawn: torch.Generator | None,
    quiet: bool,
) -> list[_Scores]:
    """Returns 1/2 mean (dL/dz)^2 for the mask z of every unit, where z multiplies values v.

    At z = 1, dL/dz is the sum over tokens of v dL/dv, so that no mask has to be there.
    """
    sites = family.sites(model)
    points = [
        *(Point((i, "attention", 0), s.block.attn.qkv, "output") for i, s in enumerate(sites)),
        *_hidden_and_rows(family, sites),
    ]
    points = [point for point in points if point.key[1] in kinds]
    sums: list[_Scores] = [{} for _ in sites]
    for batch, labels in images.shown("scores", quiet):
        with watching(points) as seen, torch.enable_grad():
            logits = model(batch.detach().clone().requires_grad_())
            if drawn is None:
                loss = F.cross_entropy(logits, labels, reduction="sum")
            else:
                loss = drawn_loss(logits, int(getattr(model, "num_classes", 0)), drawn)
        gradients = torch.autograd.grad(loss, list(seen.values()))
        slopes: list[_Scores] = [{} for _ in sites]
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
def _activations(
    model: nn.Module, family: Family, kinds: tuple[str, ...], images: Images, quiet: bool
) -> list[_Scores]:
    """Returns the root mean square of what every unit gives."""
    sites = family.sites(model)
    points = [
        *(Point((i, "attention", 0), s.block.attn.proj, "input") for i, s in enumerate(sites)),
        *_hidden_and_rows(family, sites),
    ]
    points = [point for point in points if point.key[1] in kinds]
    sums: list[_Scores] = [{} for _ in sites]
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


def _magnitudes(model: nn.Module, family: Family, kinds: tuple[str, ...]) -> list[_Scores]:
    """Returns the l2 norm of all weights and biases of every unit."""
    scores: list[_Scores] = []
    for site in family.sites(model):
        attn, mlp = site.block.attn, site.block.mlp
        each: _Scores = {}
        if "attention" in kinds:
            rows = _squares(attn.qkv).view(3, attn.num_heads, -1).sum(0)
            columns = attn.proj.weight.detach().double().square().sum(0).view_as(rows)
            each["attention"] = _ready((rows + columns).sqrt())
        if "mlp" in kinds:
            columns = mlp.fc2.weight.detach().double().square().sum(0)
            each["mlp"] = _ready((_squares(mlp.fc1) + columns).sqrt())
        scores.append(each)
    return scores


def _random(model: nn.Module, family: Family, kinds: tuple[str, ...], seed: int) -> list[_Scores]:
    generator = torch.Generator().manual_seed(seed)
    down, across = family.grid(model)
    scores: list[_Scores] = []
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


def _shared(scores: Tensor | None, granularity: str) -> Tensor | None:
    """Gives units that are cut together the root mean square of their scores."""
    over = {"uniform": 0, "head": 1}.get(granularity)
    if scores is None or over is None:
        return scores
    return scores.square().mean(over, keepdim=True).sqrt().expand_as(scores).contiguous()


def _ready(scores: Tensor) -> Tensor:
    return scores.float().cpu().contiguous()
