"""Save and load: safetensors and a config.json that timm reads too. Nothing is ever unpickled."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import save as serialize
from timm.models import load_pretrained, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from timm.utils import unwrap_model

from .errors import VitslimError
from .files import atomic_write
from .plan import Plan
from .surgery import describe, mask, slim

ARCHITECTURE = "vitslim_vit"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


def save(model: VisionTransformer, folder: str | os.PathLike[str]) -> None:
    """Writes a dense, masked or slim model as `model.safetensors` and `config.json`.

    After `import vitslim`, `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it; a
    dense model needs timm alone. Each file is written beside and renamed, the config last.

    Args:
        model: Made by timm.create_model, then perhaps by vitslim.mask or vitslim.slim.
        folder: Made if it is not there; files of those names in it are replaced.
    """
    model, folder = unwrap_model(model), Path(folder)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    weights = serialize(state, metadata={"format": "pt"})
    config = _config(model)
    config["vitslim"] = {"sha256": hashlib.sha256(weights).hexdigest()}
    atomic_write(folder / _WEIGHTS, weights)
    atomic_write(folder / _CONFIG, json.dumps(config, indent=1) + "\n")


def load(folder: str | os.PathLike[str], **kwargs: Any) -> VisionTransformer:
    """Loads what `save` wrote.

    Args:
        folder: Holds config.json and model.safetensors.
        **kwargs: Passed to timm.create_model, e.g. num_classes=10 for a new classifier.

    Raises:
        VitslimError: A file is missing, truncated, edited, or not of a model of ours.
    """
    folder = Path(folder)
    _verify(folder)
    try:
        model: VisionTransformer = timm.create_model(f"local-dir:{folder}", True, **kwargs)
    except (RuntimeError, SafetensorError, KeyError, TypeError, AssertionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise VitslimError(
            f"{folder} does not hold a model that fits its config.json: {reason[0][:200]}"
        ) from error
    return model


@register_model
def vitslim_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's way in: builds the dense model that `base` names, then masks it or slims it."""
    base, plan, masks = (kwargs.pop(name, None) for name in ("base", "plan", "masks"))
    if base is None:
        raise VitslimError(
            "vitslim_vit is built from a saved folder: timm.create_model('local-dir:FOLDER')"
        )
    given = kwargs.pop("pretrained_cfg", None)
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    for name in ("cache_dir", "pretrained_model_args"):
        kwargs.pop(name, None)
    config = resolve_pretrained_cfg(ARCHITECTURE, given, overlay).to_dict()
    if config.get("source") == "local-dir" and pretrained:
        _verify(Path(config["file"]))
    model = timm.create_model(base["model"], **{**base["args"], **kwargs})
    if plan is not None:
        model = slim(model, _plan(plan))
    elif masks is not None:
        model = mask(model, **masks)
    architecture = model.pretrained_cfg["architecture"]
    model.pretrained_cfg = model.default_cfg = config | {"architecture": architecture}
    if pretrained:
        channels = model.patch_embed.proj.weight.shape[1]
        load_pretrained(model, config, num_classes=model.num_classes, in_chans=channels)
    return model


def _config(model: VisionTransformer) -> dict[str, Any]:
    plan, masks = getattr(model, "plan", None), getattr(model, "mask_args", None)
    base = describe(model) if plan is None else dict(plan.base)
    if not timm.is_model(base["model"]):
        raise VitslimError(
            f"{base['model']} is not a name timm can build; make the model with timm.create_model "
            "so that it can be saved with the arguments that build it again"
        )
    # A new classifier may have been put on after the search.
    now = {"num_classes": model.num_classes, "global_pool": model.global_pool}
    base["args"] = base["args"] | now
    known = getattr(model, "pretrained_cfg", None) or {}
    preprocessing = {name: known[name] for name in _PREPROCESSING if known.get(name) is not None}
    channels, size = model.patch_embed.proj.weight.shape[1], model.patch_embed.img_size
    preprocessing |= {
        "input_size": [channels, *size],
        "fixed_input_size": True,
        "num_classes": model.num_classes,
        "first_conv": known.get("first_conv", "patch_embed.proj"),
        "classifier": known.get("classifier", "head"),
    }
    whole: dict[str, Any] = {"architecture": base["model"], "model_args": base["args"]}
    if plan is not None or masks is not None:
        whole["architecture"] = ARCHITECTURE
        whole["model_args"] = {"base": base}
        whole["model_args"] |= {"plan": plan.to_dict()} if plan is not None else {"masks": masks}
    return whole | {
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "pretrained_cfg": preprocessing,
    }


def _plan(data: dict[str, Any]) -> Plan:
    try:
        return Plan.from_dict(data)
    except ValueError as error:
        raise VitslimError(f"the plan in {_CONFIG} is broken: {error}") from None


def _verify(folder: Path) -> None:
    """Raises one sentence if the two files are not there, not whole, or not a pair."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
        weights = (folder / _WEIGHTS).read_bytes()
    except OSError as error:
        raise VitslimError(
            f"{folder} is not a saved model: {Path(str(error.filename)).name} cannot be read "
            f"({error.strerror})"
        ) from None
    except ValueError as error:
        raise VitslimError(f"{folder / _CONFIG} is damaged, it is not JSON: {error}") from None
    if not isinstance(config, dict) or "architecture" not in config:
        raise VitslimError(f"{folder / _CONFIG} is not the config of a model: no `architecture`")
    expected = (config.get("vitslim") or {}).get("sha256")
    if expected is not None and hashlib.sha256(weights).hexdigest() != expected:
        raise VitslimError(
            f"{folder / _WEIGHTS} is truncated or was changed: its checksum is not the one in "
            f"{_CONFIG}; save or copy the model again"
        )
