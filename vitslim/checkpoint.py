"""Save and load: safetensors and a config.json that timm and transformers read too.

Nothing is ever unpickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save as serialize
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from .description import build, describe
from .errors import VitslimError
from .families import family_of
from .families.plain import plain_settings
from .files import atomic_write
from .model_card import write_model_card
from .surgery.classes import ARCHITECTURE
from .wrapped import bare, is_sharded, whole

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


def save(model: nn.Module, folder: str | os.PathLike[str], *, ignore_hooks: bool = False) -> None:
    """Writes a dense, masked or slim model as it stands: `model.safetensors` and `config.json`.

    After `import vitslim`, `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and
    so does transformers' AutoModelForImageClassification; a dense model whose every part timm's
    arguments describe needs timm alone. Before anything is written, the model is built again from
    its description and compared. Each file is written beside and renamed, the config last; a
    README.md says how to load it, unless there is one that is not of ours.

    Args:
        model: Made by timm.create_model, then perhaps by vitslim.mask or vitslim.slim; bare, or
            wrapped by torch.compile, data parallelism or a moving average. One that is sharded
            (FSDP2) must be saved by all processes, of which the first writes.
        folder: Made if it is not there; files of those names in it are replaced.
        ignore_hooks: Save a model that has hooks, without them. They may change what it computes,
            so that it is refused otherwise.

    Raises:
        VitslimError: A part cannot be described, such as an adapter or a hook. Nothing is written.
    """
    model, folder = bare(model), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise VitslimError(f"{folder} is a file, and a model is saved as a folder; name another")
    if isinstance(getattr(model, "source", None), nn.Module):
        model.state_dict()  # of a packed model, which says so where it has forgotten its source's
        model = model.source
    told = describe(model, ignore_hooks)
    weights = serialize(_state(model), metadata={"format": "pt"})
    config = _config(model, told)
    config["vitslim"] = {"sha256": hashlib.sha256(weights).hexdigest()}
    if is_sharded(model) and torch.distributed.get_rank() != 0:
        return
    atomic_write(folder / _WEIGHTS, weights)
    write_model_card(folder, config)
    atomic_write(folder / _CONFIG, json.dumps(config, indent=1) + "\n")


def load(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Loads what `save` wrote.

    Args:
        folder: Holds config.json and model.safetensors.
        **kwargs: Passed to timm.create_model: num_classes=10 for a new classifier, in_chans=1 and
            img_size=384 to fit the weights to other images as timm does, features_only=True for a
            backbone. Token masks are resampled to the new grid of patches.

    Raises:
        VitslimError: A file is missing, truncated, edited, or not of a model of ours; or a slim
            model that drops patches was asked for at another size.
    """
    folder = Path(folder)
    _verify(folder)
    try:
        model = timm.create_model(f"local-dir:{folder}", True, **kwargs)
    except VitslimError:
        raise
    except (
        *(RuntimeError, SafetensorError, KeyError, TypeError),
        *(ValueError, AssertionError, AttributeError),
    ) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        wrong = "does not hold a model that fits its config.json"
        if kwargs:
            asked = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
            wrong = f"cannot be loaded with {asked}"
        raise VitslimError(f"{folder} {wrong}: {reason[0][:200]}") from error
    return model


@register_model
def vitslim_vit(pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's way in: builds what a saved description tells, and lets timm load it."""
    told = {name: kwargs.pop(name, None) for name in _DESCRIPTION}
    base = told["base"]
    if base is None:
        raise VitslimError(
            "vitslim_vit is built from a saved folder: timm.create_model('local-dir:FOLDER')"
        )
    given = kwargs.get("pretrained_cfg") or {}
    if isinstance(given, Mapping) and given.get("source") == "local-dir" and pretrained:
        _verify(Path(given["file"]))
    if not given:
        # As transformers asks, which keeps it to itself; timm would take its own defaults.
        kwargs["pretrained_cfg"] = _input(base)
    kwargs.pop("pretrained_model_args", None)
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    model = build_model_with_cfg(
        lambda **given: build(told, **given),
        ARCHITECTURE,
        pretrained,
        pretrained_cfg_overlay={**overlay, "architecture": ARCHITECTURE},
        pretrained_filter_fn=_resampled(base),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )
    return model


def _input(base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns timm's record of what a model takes and gives, as far as `base` tells it."""
    args = base["args"]
    return {
        "input_size": [args["in_chans"], *args["img_size"]],
        "fixed_input_size": True,
        "num_classes": args["num_classes"],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


# What a description tells, see `description`.
_DESCRIPTION = ("base", "plan", "masks", "parts", "tied", "dtypes")


def _resampled(base: Mapping[str, Any]) -> Any:
    """Returns timm's filter of a state dict: it fits one of other images to the model."""

    def fit(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        family = family_of(model, "loaded")
        return family.resampled(state, model, family.grid_of(base))

    return fit


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a model as safetensors takes them: on the CPU, whole and apart."""
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise VitslimError(f"{name} is a {type(value).__name__}, and files hold only tensors")
        if value.is_meta:
            raise VitslimError(
                f"{name} is on the meta device, where tensors have no values to save"
            )
        tensor = whole(value.detach()).cpu().contiguous()
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            raise VitslimError(
                f"{name} is a {type(value).__name__} that safetensors cannot hold; save the model "
                "before it is quantized"
            )
        storage = tensor.untyped_storage()
        # Tied ones, and views of a larger tensor.
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        state[name] = tensor
    return state


def _config(model: nn.Module, told: Mapping[str, Any]) -> dict[str, Any]:
    base = told["base"]
    known = getattr(model, "pretrained_cfg", None) or {}
    preprocessing = {name: known[name] for name in _PREPROCESSING if known.get(name) is not None}
    names = {name: known[name] for name in ("first_conv", "classifier") if known.get(name)}
    preprocessing |= {**_input(base), **names}
    alone = set(told) == {"base"}
    labels = known.get("label_names")
    # timm and transformers read names of classes here.
    if not isinstance(labels, list | tuple) or len(labels) != base["args"]["num_classes"]:
        labels = None
    return {
        **({"label_names": list(labels)} if labels else {}),
        "architecture": base["model"] if alone else ARCHITECTURE,
        "model_args": base["args"] if alone else dict(told),
        "num_classes": base["args"]["num_classes"],
        "num_features": int(model.num_features),
        "global_pool": base["args"]["global_pool"],
        "pretrained_cfg": plain_settings(preprocessing),
    }


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
