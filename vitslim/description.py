"""What a model is, as JSON, and building it again: the description that `save` writes.

timm's name and arguments say most of it, a plan or the arguments of `mask` what we made of it. The
rest is found by building that much on "meta" and comparing all modules, see `parts`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .errors import VitslimError
from .families import family_of
from .families.plain import plain
from .parts import apply_part, differences, refuse_what_is_no_data
from .plan import BlockPlan, Plan
from .surgery import MaskedModel, SlimModel
from .surgery.classes import dense_class, masked_from, slim_from
from .wrapped import bare, plain_type


def describe(model: nn.Module, ignore_hooks: bool = False) -> dict[str, Any]:
    """Describes a bare model as it stands, and proves that it is built again from what is said.

    Args:
        model: Dense, masked or slim.
        ignore_hooks: Whether it may have hooks, of which nothing is told.

    Returns:
        {"base": {"model", "args"}}, with {"plan"} of a slim model or {"masks"} of a masked one, and
        where they are needed {"parts"}, {"tied": groups of parameters that are one}, and {"dtypes":
        of the whole model under "", of tensors that differ by their names}.

    Raises:
        VitslimError: A part cannot be described; the sentence names it.
    """
    family = family_of(model, "saved")
    refuse_what_is_no_data(model, ignore_hooks)
    base = family.describe(model)
    if not timm.is_model(base["model"]):
        raise VitslimError(
            f"{base['model']} is not a name timm can build; make the model with timm.create_model "
            "so that it can be saved with the arguments that build it again"
        )
    told: dict[str, Any] = {"base": base}
    depth = len(family.sites(model))
    if isinstance(model, SlimModel):
        # Blocks may have been taken off the end since.
        blocks = [*model.plan.blocks[:depth], *[BlockPlan()] * (depth - len(model.plan.blocks))]
        plan = Plan(base, model.plan.budget, model.plan.reached, model.plan.round_to, blocks)
        told["plan"] = plan.to_dict()
    elif isinstance(model, MaskedModel):
        told["masks"] = dict(model.mask_args)
    dtypes = _dtypes(model)
    told |= {"dtypes": dtypes} if dtypes != {"": "float32"} else {}
    if tied := _tied(model):
        told["tied"] = tied
    twin = _on_meta(told)
    if dense_class(twin) is not dense_class(model):
        raise VitslimError(
            f"the model is a {dense_class(model).__name__} and timm builds {base['model']} as a "
            f"{dense_class(twin).__name__}: a class of your own cannot be saved in a config"
        )
    if parts := dict(differences(model, twin)):
        told["parts"] = parts
    _prove(model, _on_meta(told) if parts else twin)
    return told


def build(told: Mapping[str, Any], **changes: Any) -> Any:
    """Builds the model of a description, with random weights.

    Args:
        told: What `describe` returned, perhaps read from JSON.
        **changes: Arguments of timm.create_model that win over those told, such as num_classes.

    Raises:
        VitslimError: The description is broken, or the changes do not go with it.
    """
    base = told["base"]
    plan = None if told.get("plan") is None else _plan(told["plan"])
    model = dense_of(base, **changes)
    family = family_of(model, "loaded")
    if plan is not None:
        family.check_plan(model, plan, family.grid_of(base))
        model = slim_from(model, plan, fold=False, exactly=False, keep=False)
    elif told.get("masks") is not None:
        model = masked_from(model, told["masks"], keep=False)
    asked = {name for name, value in changes.items() if plain(value) != base["args"].get(name)}
    reset = family.classifiers(model) if "num_classes" in asked else ()
    for name, part in (told.get("parts") or {}).items():
        if not f"{name}.".startswith(tuple(f"{each}." for each in reset)):
            apply_part(model, name, part, lenient=bool(asked))
    for group in told.get("tied") or ():
        _tie(model, group)
    _cast(model, told.get("dtypes") or {})
    # As a timm of today records it, for `describe`.
    made = {name: value for name, value in told.items() if value is not None}
    model._model_args = {**getattr(model, "_model_args", {}), **made}
    return model


def dense_of(base: Mapping[str, Any], **changes: Any) -> Any:
    """Builds the dense model that a description or a plan is based on, with random weights.

    Args:
        base: {"model", "args"}.
        **changes: Arguments of timm.create_model that win over those told.
    """
    return timm.create_model(base["model"], **{**base["args"], **changes})


def base_of(model: nn.Module) -> dict[str, Any]:
    """Returns {"model", "args"} of the dense model that a masked or slim one, or itself, is of."""
    model = bare(model)
    return family_of(model).describe(model)


def _on_meta(told: Mapping[str, Any]) -> Any:
    # Building must draw no random numbers that a training would miss.
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build(told)
        except (RuntimeError, NotImplementedError):
            # An older timm reads numbers off tensors while it builds, which "meta" has not.
            return build(told)


def _prove(model: nn.Module, twin: nn.Module) -> None:
    """Raises VitslimError if a model and what was built from its description differ anywhere."""
    for name, _ in differences(model, twin):
        raise VitslimError(
            f"{name or 'the model'} cannot be described so that it is built again; put a layer of "
            "torch's or timm's in its place"
        )
    kinds = [{n: plain_type(m).__name__ for n, m in _modules(each)} for each in (model, twin)]
    states = [
        {name: (list(tensor.shape), tensor.dtype) for name, tensor in each.state_dict().items()}
        for each in (model, twin)
    ]
    for mine, built in (kinds, states):
        odd = [name for name in {**mine, **built} if mine.get(name) != built.get(name)]
        if odd or list(mine) != list(built):
            raise VitslimError(
                f"{odd[0] if odd else 'the order of the modules'} cannot be described so that it "
                "is built again; put a layer of torch's or timm's in its place"
            )
    if _tied(model) != _tied(twin):
        raise VitslimError("parameters are shared in a way that cannot be described; clone them")


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields all modules but the model itself; what stands in two places comes twice."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            yield name, module


def _plan(data: Mapping[str, Any]) -> Plan:
    try:
        return Plan.from_dict(data)
    except ValueError as error:
        raise VitslimError(f"the plan in config.json is broken: {error}") from None


def _tied(model: nn.Module) -> list[list[str]]:
    """Returns the names of parameters that are one and the same, group by group."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(model: nn.Module, names: list[str]) -> None:
    first = model.get_parameter(names[0])
    for name in names[1:]:
        place, _, leaf = name.rpartition(".")
        # Another number of classes may have given one of them another shape.
        if model.get_parameter(name).shape == first.shape:
            model.get_submodule(place).register_parameter(leaf, first)


def _dtypes(model: nn.Module) -> dict[str, str]:
    """Returns the dtype of most of a model under "", and of tensors that have another one."""
    tensors = {k: each for k, each in model.state_dict().items() if isinstance(each, Tensor)}
    state = {name: each for name, each in tensors.items() if each.is_floating_point()}
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel()
    most = sizes.most_common(1)[0][0] if sizes else torch.float32
    odd = {name: tensor.dtype for name, tensor in state.items() if tensor.dtype != most}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in {"": most, **odd}.items()}


def _cast(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    for name, text in dtypes.items():
        dtype = getattr(torch, text, None)
        if not isinstance(dtype, torch.dtype):
            raise VitslimError(f"the config names a dtype {text!r}, which torch has not")
        if not name:
            model.to(dtype)
            continue
        place, _, leaf = name.rpartition(".")
        module = model.get_submodule(place)
        if leaf in module._parameters:
            old = module._parameters[leaf]
            module.register_parameter(leaf, nn.Parameter(old.detach().to(dtype), old.requires_grad))
        else:
            module._buffers[leaf] = module._buffers[leaf].to(dtype)
