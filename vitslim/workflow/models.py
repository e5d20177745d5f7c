"""The model a command works on: a timm name, a saved folder, or the small one for digits."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..checkpoint import load
from ..description import base_of, dense_of
from ..errors import VitslimError
from ..packed import PackedVisionTransformer, pack
from ..plan import Plan
from ..wrapped import bare
from .data.datasets import DIGITS_CLASSES, DIGITS_MEAN, DIGITS_STD
from .options.recipes import open_recipe
from .training.state import read_json

# 16 patches of 2x2 pixels, 3 heads of 32, 0.7 M parameters: trains in a minute on two cores.
DIGITS_MODEL = "vit_tiny_patch16_224"
DIGITS_KWARGS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": DIGITS_CLASSES,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "weight_init": "jax",
}


def digits_model() -> nn.Module:
    """Builds the small dense ViT for digits, from torch's random state."""
    preprocessing = {
        "input_size": (1, 8, 8),
        "mean": (DIGITS_MEAN,),
        "std": (DIGITS_STD,),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    model = timm.create_model(DIGITS_MODEL, pretrained_cfg_overlay=preprocessing, **DIGITS_KWARGS)
    # A patch of four pixels says little without its place, which timm's 0.02 would whisper.
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    return model


def open_model(
    name: str, pretrained: bool = False, model_kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """Opens a model by timm's name or from a folder that `vitslim.save` wrote.

    Args:
        name: A folder or a name in timm's list.
        pretrained: Whether timm loads its weights for the name.
        model_kwargs: timm's arguments for the constructor, such as img_size and num_classes.
    """
    kwargs = dict(model_kwargs or {})
    if name == "digits" and not kwargs:
        return digits_model()
    if Path(name).is_dir():
        return load(name, **kwargs)
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        raise VitslimError(f"{name!r} is neither a folder nor a model timm knows.")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    # Whatever timm's constructors and downloads may raise.
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        weights = " with its weights" if pretrained else ""
        raise VitslimError(f"timm cannot make {name}{weights}: {reason}.") from error


def open_teacher(
    name: str, dense: nn.Module | None, device: torch.device, num_classes: int | None
) -> nn.Module:
    """Opens the model that a student is to imitate, with weights, ready to be asked.

    Args:
        name: `dense`, a folder, or the name of any timm model, which brings its weights.
        dense: What `dense` means; the teacher is a copy of it, for it may be trained itself.
        device: Where the student is.
        num_classes: Of the student; None where features are imitated, which have no classes.

    Raises:
        VitslimError: There is no such model, its weights cannot be had, or its classes differ.
    """
    if name != "dense":
        teacher: nn.Module = open_model(name, pretrained=True)
    elif dense is None:
        raise VitslimError("The teacher is the dense model, and there is none: give --dense.")
    else:
        teacher = copy.deepcopy(dense)
    classes = getattr(teacher, "num_classes", None)
    if num_classes is not None and classes != num_classes:
        raise VitslimError(
            f"The teacher {name} has {classes} classes and the student {num_classes}: take a "
            "teacher of the same classes, or --distill-type feature."
        )
    return teacher.to(device).eval().requires_grad_(False)


def open_dense(search: Path, name: str | None = None) -> nn.Module:
    """Opens the dense model that a search began with.

    Args:
        search: The folder of the search.
        name: What the user says that the model is, a folder or a name in timm's list.

    Raises:
        VitslimError: It is not to be found, or it had no weights.
    """
    if name is not None:
        return open_model(name, pretrained=True)
    if (beside := search.parent / "dense" / "config.json").exists():
        return load(beside.parent)
    args = search / "args.yaml"
    told = open_recipe(str(args)) if args.exists() else {}
    base, pretrained = told.get("model") or "", bool(told.get("pretrained"))
    if not base or not (pretrained or Path(base).is_dir()):
        raise VitslimError(
            f"{search} does not tell of a dense model with weights that it began with: "
            "name one with --dense."
        )
    return open_model(base, pretrained, told.get("model_kwargs"))


def base_model(model: nn.Module) -> nn.Module:
    """Builds the dense model that a masked or slim one came from, with random weights."""
    model = bare(model)
    return dense_of(base_of(model)).to(next(model.parameters()).device)


def meta_model(name: str, model_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Opens a model without weights or memory, for its shapes: the dense one of a saved folder.

    Args:
        name: A folder or a name in timm's list.
        model_kwargs: timm's arguments for the constructor.
    """
    kwargs = dict(model_kwargs or {})
    if Path(name).is_dir():
        config = read_json(Path(name) / "config.json")
        base = config.get("model_args", {}).get("base")
        base = base or {"model": config.get("architecture"), "args": config.get("model_args", {})}
        name, kwargs = base["model"], {**base["args"], **kwargs}
    try:
        with torch.device("meta"):
            return open_model(name, False, kwargs)
    except VitslimError:
        # An older timm reads numbers off tensors while it builds, which "meta" has not.
        return open_model(name, False, kwargs)


def plan_of(name: str) -> Plan | None:
    """Reads the plan that a saved folder was cut to; None where it is not slim, or is no folder."""
    if not Path(name).is_dir():
        return None
    plan = read_json(Path(name) / "config.json").get("model_args", {}).get("plan")
    return None if plan is None else Plan.from_dict(plan)


def packed_for(model: nn.Module, device: torch.device, weights: str) -> PackedVisionTransformer:
    """Packs a model of the command line.

    Args:
        model: Dense or slim.
        device: Where it is to run; packed models run on the CPU alone.
        weights: "float32" or "bfloat16".
    """
    if device.type != "cpu":
        raise VitslimError(f"--pack is for the CPU, and the device is {device}: add --device cpu.")
    return pack(model.float(), weights=getattr(torch, weights))


def open_plan(path: str | Path) -> Plan:
    """Reads a plan, or says in one sentence that it is not one."""
    try:
        return Plan.load(path)
    except ValueError as error:
        raise VitslimError(str(error)) from error
