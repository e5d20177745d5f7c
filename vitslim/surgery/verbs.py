"""`mask` and `slim`: what a user asks for, checked before anything is copied."""

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..allowed import KINDS, TOKEN_GATES
from ..calibration import Images, felt_tokens, refit
from ..errors import VitslimError
from ..families import Family, family_of
from ..families.family import head_width
from ..plan import Plan
from ..wrapped import bare
from .classes import MaskedModel, SlimModel, masked_from, slim_from
from .swap import check_depth


def mask(
    model: nn.Module,
    granularity: str = "head_dim",
    kinds: Iterable[str] | None = KINDS,
    token_start: str = "paper",
    skip: Iterable[str] = (),
    token_gate: str = "input",
) -> Any:
    """Returns a copy of a timm vision transformer with learnable masks in every block.

    The copy is of a class of its own, such as MaskedVisionTransformer, which is the model's class
    otherwise. Hooks, training mode, dtype, device and what is frozen stay as they are.

    Args:
        model: ViT, DeiT, DeiT distilled, DeiT-III, with or without register tokens; bare, or
            wrapped by torch.compile, data parallelism, FSDP2 or a moving average.
        granularity: Of the attention masks: "head_dim", "uniform" or "head".
        kinds: Which masks to learn, of "attention", "mlp" and "token"; None is all that make
            sense for the model's family.
        token_start: "paper" starts token gates at tanh(3) = 0.995, "one" at exactly 1.
        skip: Names of parts to leave alone, with wildcards: "blocks.0", "blocks.*.mlp".
        token_gate: Where token gates act. "input", the paper's: a gate scales the normed input of
            attention and MLP, and is kept as a constant when slim. "keys": its logarithm is added
            to the attention scores of the token as a key, whose limit is removal; the fast kernels
            of a slim model have no place for it, so that `slim` drops it for the tokens it keeps.

    Raises:
        VitslimError: The model, or a part that `skip` does not name, cannot be masked, or `skip`
            names what is not there.
    """
    model = bare(model)
    family = family_of(model)
    kinds, skip = family.kinds if kinds is None else tuple(kinds), tuple(skip)
    for kind in kinds:
        if kind not in KINDS:
            raise VitslimError(f"no kind of mask is called {kind!r}; use {KINDS}")
        if kind not in family.kinds:
            raise VitslimError(
                f"{kind} masks make no sense for a {type(model).__name__}; use {family.kinds}"
            )
    if token_gate not in TOKEN_GATES:
        raise VitslimError(f"no token gate is called {token_gate!r}; use {TOKEN_GATES}")
    family.check(model, kinds)
    for variant, state in ((MaskedModel, "masked"), (SlimModel, "slim")):
        if isinstance(model, variant):
            raise VitslimError(f"this model is {state} already; mask the dense one it was made of")
    _check_skip(skip, [site.name for site in family.sites(model)])
    masks = {
        "granularity": granularity,
        "kinds": list(kinds),
        "token_start": token_start,
        "skip": list(skip),
        "token_gate": token_gate,
    }
    return masked_from(model, masks)


def slim(
    model: nn.Module,
    plan: Plan,
    fold: bool = True,
    calibrate: Any = None,
    *,
    target: nn.Module | None = None,
) -> Any:
    """Returns a physically smaller copy: ragged heads, narrower MLPs, fewer tokens, no masks.

    The copy is of a class of its own, such as SlimVisionTransformer, which is the model's class
    otherwise. Hooks, training mode, dtype, device and what is frozen stay as they are.

    With `calibrate`, what is kept makes up for what is cut, without training: proj, fc2 and their
    biases are refitted, block by block, so that on these images the residual stream comes as near
    as it can to that of the model before the cut. See `vitslim.calibration.refit`.

    Args:
        model: A masked model, or the dense one it was made of; wrapped or not, as for `mask`.
        plan: What every block keeps, from `vitslim.threshold`.
        fold: Multiply what the kept masks learned into the weights, so that the slim model
            computes what the masked one does with the dropped units at zero; else the masks are
            forgotten, as the published code does. What kept tokens learned as a bias of their keys
            is forgotten in any case.
        calibrate: Normalised images [n, channels, height, width], or a list or DataLoader of
            batches of them, at least as many as a head is wide; the model is in evaluation mode.
            256 do, 1,000 do better. Labels are not looked at.
        target: With `calibrate`, the model to come near to, if not `model`: after a search, say,
            the dense model that it began with.

    Raises:
        VitslimError: The plan does not fit the model, a part that it cuts is no plain layer, or
            the images are not what the model takes.
    """
    model = bare(model)
    family = family_of(model)
    if isinstance(model, SlimModel):
        raise VitslimError("this model is slim already; slim the masked or dense model instead")
    family.check(model)
    if not isinstance(plan, Plan):
        raise VitslimError(
            f"the plan is a {type(plan).__name__}; read one with vitslim.Plan.load(path) or "
            "vitslim.Plan.from_dict(data)"
        )
    check_depth(plan, family.sites(model))
    _check_base(plan, model, family)
    if calibrate is None:
        return slim_from(model, plan, fold)
    if target is not None:
        target = bare(target)
        _check_twin(model, target)
    widest = head_width(family.sites(model))
    images = Images(calibrate, model, least=widest, what_for=f"heads {widest} wide")
    slimmed = slim_from(model, plan, fold)
    goal = model if target is None else target
    # What a unit of another model computes is not what this one's should.
    own = plan if target is None and fold else None
    refit(slimmed, goal, images, plan=own, felt=felt_tokens(goal, family, images))
    return slimmed


def _check_base(plan: Plan, model: nn.Module, family: Family) -> None:
    """Refuses a plan for images or patches of another size, whose indices may fit all the same."""
    args, before = family.describe(model)["args"], plan.base.get("args", {})
    for name in ("img_size", "patch_size", "embed_dim"):
        if name in before and before[name] != args.get(name):
            raise VitslimError(
                f"the plan was made for a model whose {name} is {before[name]}, and this one's is "
                f"{args.get(name)}; make a plan for this one with vitslim.threshold"
            )


def _check_twin(model: nn.Module, target: nn.Module) -> None:
    """Refuses a target whose blocks are not those of the model that is cut."""
    one, other = (family_of(each, "calibrated").sites(each) for each in (model, target))
    if [(s.dim, s.tokens) for s in one] != [(s.dim, s.tokens) for s in other]:
        raise VitslimError(
            f"the target has {len(other)} blocks of {other[0].dim} channels and {other[0].tokens} "
            f"tokens, the model {len(one)} of {one[0].dim} and {one[0].tokens}; they must be alike"
        )
    if target.training:
        raise VitslimError("the target is in training mode; call target.eval() first")


def _check_skip(skip: tuple[str, ...], blocks: list[str]) -> None:
    """Refuses a name that would be skipped and is of no part: a slip would mask what it meant."""
    parts = [*blocks, *(f"{b}.{part}" for b in blocks for part in ("attn", "mlp", "tokens"))]
    for name in skip:
        if not fnmatch.filter(parts, name):
            raise VitslimError(
                f"skip names {name!r}, of which the model has none; its parts are {blocks[0]} to "
                f"{blocks[-1]}, and .attn, .mlp and .tokens of each"
            )
