"""Rotation: an equal model in whose heads the first dimensions matter most."""

from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Images
from ..errors import VitslimError
from ..families import family_of
from ..families.family import head_width
from ..layers.plain import kind_of, why_not_cut
from ..surgery.classes import MaskedModel, SlimModel
from ..wrapped import bare, copy_of
from .moments import felt, moments_of, roots


@torch.no_grad()
def rotate(
    model: nn.Module, images: Any, *, batch_size: int = 32, seed: int = 0, quiet: bool = False
) -> Any:
    """Returns a copy that computes the same, with the dimensions of every head in order of worth.

    The scores of a head depend on q k^T alone, and its output on v W_p, W_p being its columns of
    proj, so that an invertible map may stand between:

        q M, k M^-T                   C_q^1/2 C_k^1/2 = U S V^T            M = C_q^-1/2 U S^1/2
        v R, (R^-1 W_p^T)^T           C_o^1/2 W_p^T G^1/2 = U S V^T        R = C_o^-1/2 U

    with the second moments C_q of q, C_k of the keys less their mean over an image, which no
    softmax sees, and C_o of the head's output, in which a token counts as much as the loss feels a
    change of it; G is that of the gradients of the stream that the head writes to. The first r
    dimensions then are the best approximation of rank r, and `vitslim.threshold` can cut from the
    end. Gradients are those of labels drawn from the model's own output, so none are needed. The
    maps are folded into qkv and proj in float64.

    Where q or k is normalised or a rotary embedding stands between, q and k stay as they are;
    where the output is normalised or gated before proj, v does.

    Args:
        model: A dense timm vision transformer, wrapped or not, in evaluation mode.
        images: As for `vitslim.importance`; at least as many as a head is wide.
        batch_size: Images that are computed at once.
        seed: Of the labels that are drawn.
        quiet: Whether there is no progress bar.

    Raises:
        VitslimError: The model cannot be rotated, or the images are not what it takes.
    """
    model = bare(model)
    family = family_of(model, "rotated")
    if isinstance(model, MaskedModel | SlimModel):
        raise VitslimError("this model is masked or slim already; rotate the dense one")
    family.check(model, done="rotated")
    sites = family.sites(model)
    for site in sites:
        if type(site.block) not in family.block_types:
            raise VitslimError(f"{site.name} cannot be rotated: it is a {kind_of(site.block)}")
        if why := why_not_cut({"qkv": site.block.attn.qkv, "proj": site.block.attn.proj}):
            raise VitslimError(f"{site.name} cannot be rotated: {why}")
    widest = head_width(sites)
    seen = Images.of(images, model, batch_size, widest, f"heads {widest} wide")
    rotated = copy_of(model)
    moments = moments_of(model, family, seen, hidden=False, seed=seed, quiet=quiet)
    for site, each in zip(family.sites(rotated), moments, strict=True):
        half, *_ = family.halves(site.block)
        if not (_is_there(half.layer, "q_norm") or _is_there(half.layer, "k_norm")):
            _rotate_scores(half.layer, each.queries, each.keys)
        if not (_is_there(half.layer, "norm") or _is_there(half.layer, "gate")):
            _rotate_output(half.layer, each.outputs, felt(half, each.after[0]))
    return rotated


def _rotate_scores(attn: Any, queries: Tensor, keys: Tensor) -> None:
    """Turns q and k of every head, in place."""
    heads, dim = attn.num_heads, attn.head_dim
    root_q, inverse_q = roots(queries)
    root_k, _ = roots(keys)
    left, values, _ = torch.linalg.svd(root_q @ root_k)
    to_q = (inverse_q @ left * values.sqrt().unsqueeze(-2)).mT  # M^T
    to_k = torch.linalg.inv(to_q.mT)  # equal to that of the formula, and exact to rounding
    weight = attn.qkv.weight.data.unflatten(0, (3, heads, dim))
    bias = None if attn.qkv.bias is None else attn.qkv.bias.data.unflatten(0, (3, heads, dim))
    for which, turn in ((0, to_q), (1, to_k)):
        weight[which] = turn @ weight[which].double()
        if bias is not None:
            bias[which] = (turn @ bias[which].double().unsqueeze(-1)).squeeze(-1)


def _rotate_output(attn: Any, outputs: Tensor, felt: Tensor) -> None:
    """Turns v of every head and its columns of proj, in place."""
    heads, dim = attn.num_heads, attn.head_dim
    own = outputs.unflatten(0, (heads, dim)).unflatten(2, (heads, dim))
    root, inverse = roots(own.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    columns = attn.proj.weight.data.unflatten(1, (heads, dim))  # [channels, heads, d]
    writes = columns.permute(1, 2, 0).double()  # [heads, d, channels]
    left, _, _ = torch.linalg.svd(root @ writes @ felt, full_matrices=False)
    turn = (inverse @ left).mT  # R^T
    columns.copy_((torch.linalg.inv(turn.mT) @ writes).permute(2, 0, 1))
    weight = attn.qkv.weight.data.unflatten(0, (3, heads, dim))
    weight[2] = turn @ weight[2].double()
    if attn.qkv.bias is not None:
        bias = attn.qkv.bias.data.unflatten(0, (3, heads, dim))
        bias[2] = (turn @ bias[2].double().unsqueeze(-1)).squeeze(-1)


def _is_there(attn: nn.Module, name: str) -> bool:
    part = getattr(attn, name, None)
    return part is not None and not isinstance(part, nn.Identity)
