"""The README.md of a saved model: what it is, and how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import atomic_write

_MARK = "<!-- written by vitslim.save -->"


def write_model_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes README.md beside a saved model, unless there is one that somebody else wrote.

    Args:
        folder: Of the model.
        config: Its config.json.
    """
    path = folder / "README.md"
    if path.exists() and _MARK not in path.read_text(errors="replace"):
        return
    atomic_write(path, _card(config))


def _card(config: Mapping[str, Any]) -> str:
    told = config["model_args"]
    base = told.get("base", {"model": config["architecture"]})
    kind = "slim" if told.get("plan") else "masked" if told.get("masks") else "dense"
    channels, height, width = config["pretrained_cfg"]["input_size"]
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags: [image-classification, timm, transformers, vitslim]",
        "---",
        _MARK,
        f"# A {kind} {base['model']}",
        "",
        f"Takes images of {channels} x {height} x {width}, gives {config['num_classes']} classes.",
    ]
    if names := config.get("label_names"):
        shown = ", ".join(names[:30])
        lines += ["", f"The classes: {shown}{' ...' if len(names) > 30 else ''}."]
    if told.get("plan"):
        reached = told["plan"]["reached"]
        macs, params = reached.get("macs", 0) / 1e9, reached.get("params", 0) / 1e6
        lines += ["", f"Cut to {params:.4g} M parameters and {macs:.4g} G multiply-accumulates."]
    lines += ["", "## Use", "", "```python", "import timm"]
    if config["architecture"] != base["model"]:
        lines += ["import vitslim  # needed: it tells timm and transformers of this architecture"]
    lines += [
        "",
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)',
        "",
        "# or",
        "from transformers import AutoModelForImageClassification",
        "",
        'model = AutoModelForImageClassification.from_pretrained("THIS_FOLDER")',
        "```",
    ]
    return "\n".join(lines) + "\n"
