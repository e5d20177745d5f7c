"""Recipes: YAML files of options, those that come with vitslim and a user's own.

model: deit_small_patch16_224      what holds for the whole run stands at the top,
weight_decay: 0.05                 and so do settings of every stage;
search: {epochs: 50}               a section holds those of one stage alone,
retrain-epochs: 300                which can be written like a flag too
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ...errors import VitslimError
from .option import STAGES

_FOLDER = files("vitslim") / "recipes"


@cache
def shipped() -> tuple[str, ...]:
    """Returns the names of the recipes that come with vitslim."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


class _Once(yaml.SafeLoader):
    """YAML's safe loader, but that a key must not come twice, where YAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes a dict of a mapping, or raises YAMLError at a key that was there before."""
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} is there twice")
        return super().construct_mapping(node, deep)


def open_recipe(name: str) -> dict[str, Any]:
    """Reads a recipe: options by name, and a dict of them for each section.

    Args:
        name: Of a shipped recipe, or the path of a file.

    Raises:
        VitslimError: There is no such recipe, or it is not YAML of options by name.
    """
    source = _FOLDER / f"{name}.yaml" if name in shipped() else Path(name)
    if not source.is_file():
        raise VitslimError(
            f"There is no recipe {name!r}: it is neither a file nor one of {', '.join(shipped())}."
        )
    try:
        content = yaml.load(source.read_text(encoding="utf-8"), _Once) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise VitslimError(f"Cannot read {name}: {reason}.") from error
    if not isinstance(content, dict):
        raise VitslimError(f"{name} must hold options by name, such as `epochs: 10`.")
    for stage in STAGES:
        if not isinstance(content.get(stage) or {}, dict):
            raise VitslimError(f"In {name}, {stage} must hold options by name.")
    return nested(content)


def nested(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Writes names with underscores, and moves `search-epochs` into the section `search`."""
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for key, value in content.items():
        name = _plain(key)
        stage, _, rest = name.partition("_")
        if name in STAGES:
            sections[name] |= {_plain(inner): each for inner, each in (value or {}).items()}
        elif stage in STAGES and rest:
            sections[stage][rest] = value
        else:
            top[name] = value
    return top | {stage: section for stage, section in sections.items() if section}


def _plain(key: Any) -> str:
    return str(key).replace("-", "_")
