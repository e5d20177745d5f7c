"""How much every unit matters to a model as it stands: scores that no training is needed for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..allowed import CRITERIA, GRANULARITIES, KINDS
from ..calibration import Images
from ..errors import VitslimError
from ..families import Family, family_of
from ..families.family import Site
from ..layers.attention import why_not_cut_attention
from ..layers.mlp import why_not_cut_mlp
from ..masks import Masks
from ..surgery.classes import MaskedModel, SlimModel
from ..wrapped import bare
from .criteria import activations, magnitudes, random_scores, sensitivities, shared
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
        each = magnitudes(model, family, chosen)
    elif criterion == "random":
        each = random_scores(model, family, chosen, seed)
    elif criterion == "activation":
        images = _images(data, model, criterion, batch_size)
        each = activations(model, family, chosen, images, quiet)
    elif criterion == "obs":
        images = _images(data, model, criterion, batch_size)
        each = surgeon_scores(model, family, chosen, images, seed, quiet)
        if "token" in chosen:
            drawn = torch.Generator().manual_seed(seed)
            rows = sensitivities(model, family, ("token",), images, granularity, drawn, quiet)
            each = [one | other for one, other in zip(each, rows, strict=True)]
    else:
        images = _images(data, model, criterion, batch_size)
        labels = torch.Generator().manual_seed(seed) if criterion == "fisher" else None
        each = sensitivities(model, family, chosen, images, granularity, labels, quiet)
    columns = {kind: [scores.get(kind) for scores in each] for kind in KINDS}
    if criterion in ("activation", "magnitude", "random"):
        columns["attention"] = [shared(each, granularity) for each in columns["attention"]]
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
