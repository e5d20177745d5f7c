"""What is asked for: recipes and flags, one over the other, and the record that is a recipe again.

Layers are laid in order. Within one, a setting in a section stands over the same one at the top,
but any later layer, wherever it has the setting, stands over both.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import VitslimError
from .choices import FIELDS as CHOICES
from .choices import PLANNING, Choices
from .option import STAGES, read_value
from .recipes import nested, open_recipe
from .settings import FIELDS as SETTINGS
from .settings import OF_THE_RUN, Settings, belongs, of_stage, overlaid, settings_for

Layer = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What all layers come to.

    Attributes:
        choices: Of the run.
        chosen: Settings of each stage, without defaults.
        recipe: The shipped recipe whose settings are the defaults of the verb, if it has one.
    """

    choices: Choices
    chosen: Mapping[str, Mapping[str, Any]]
    recipe: str | None = None

    def stages(self, *names: str) -> dict[str, Settings]:
        """Returns the settings of stages, defaults included; who imitates has a teacher.

        Raises:
            VitslimError: A setting is out of range, or no stage gives the teacher any weight.
        """
        stages = {name: settings_for(name, self.chosen[name], self.recipe) for name in names}
        named = any(settings.teacher for settings in stages.values())
        if named and not any(settings.distill_loss_weight for settings in stages.values()):
            raise VitslimError("--teacher needs --distill-loss-weight, the weight of imitating it.")
        return {
            name: dataclasses.replace(
                each, teacher=(each.teacher or "dense") if each.distill_loss_weight else None
            )
            for name, each in stages.items()
        }


def ask(recipes: Iterable[str], flags: Mapping[str, Any], recipe: str | None = None) -> Asked:
    """Lays recipes over each other and flags over all of them.

    Args:
        recipes: Shipped names or files; a later one stands over an earlier one.
        flags: By name; `search_lr` is the rate of the search alone.
        recipe: A shipped one whose options are the defaults of the verb, under the data's own.

    Raises:
        VitslimError: A recipe cannot be read, or something in it is unknown or of a wrong type.
    """
    layers = [checked(open_recipe(name), name) for name in recipes]
    layers.append(checked(nested(flags), "the command line"))
    data = next((layer["data"] for layer in reversed(layers) if "data" in layer), Settings.data)
    choices: dict[str, Any] = {}
    if recipe is not None:
        own = checked(open_recipe(recipe), recipe)
        choices = {name: value for name, value in own.items() if name in CHOICES}
    if data == "digits":
        own = checked(open_recipe("digits"), "digits")
        choices |= {name: own[name] for name in PLANNING if name in own}
    chosen: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for layer in layers:
        choices |= {name: value for name, value in layer.items() if name in CHOICES}
        for stage in STAGES:
            chosen[stage] = overlaid(chosen[stage], of_stage(layer, stage))
    return Asked(Choices(**choices), chosen, recipe)


def checked(layer: Layer, source: str) -> dict[str, Any]:
    """Returns a layer with its values as the options want them.

    Args:
        layer: Options by name, and sections.
        source: Where it is from, for the sentence.

    Raises:
        VitslimError: It has keys that no verb knows, or a value does not fit.
    """
    unknown = [_nearest(key, {**CHOICES, **SETTINGS}) for key in _strangers(layer)]
    if unknown:
        raise VitslimError(f"{source} has what no verb knows: {', '.join(unknown)}.")
    whole: dict[str, Any] = {}
    for key, value in layer.items():
        if key in STAGES:
            section = {name: _read(source, f"{key}.{name}", v) for name, v in value.items()}
            whole[key] = section
        else:
            whole[key] = _read(source, key, value)
    return whole


def _strangers(layer: Layer) -> list[str]:
    """Returns the keys that have no place where they stand."""
    found = [key for key in layer if key not in {*CHOICES, *SETTINGS, *STAGES}]
    for stage in STAGES:
        for name in layer.get(stage, {}):
            if name not in SETTINGS or name in OF_THE_RUN or not belongs(name, stage):
                found.append(f"{stage}.{name}")
    return found


def _nearest(key: str, known: Iterable[str]) -> str:
    stage, dot, name = key.rpartition(".")
    if name in SETTINGS:
        where = "for the whole run" if name in OF_THE_RUN else "in another stage"
        return f"{key} (it holds {where})"
    close = difflib.get_close_matches(name, known, n=1)
    return f"{key} (did you mean {stage}{dot}{close[0]}?)" if close else key


def _read(source: str, key: str, value: Any) -> Any:
    name = key.rpartition(".")[2]
    try:
        return read_value(CHOICES.get(name) or SETTINGS[name], value)
    except ValueError as error:
        raise VitslimError(f"In {source}, {key} {error}.") from None


def record(choices: Mapping[str, Any], stages: Mapping[str, Settings]) -> dict[str, Any]:
    """Returns everything, defaults included, as a recipe that asks for the same.

    Args:
        choices: Of the run, those that the verb has.
        stages: Settings of the stages that the verb has.
    """
    top = dict(choices)
    sections: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for name in SETTINGS:
        values = {
            stage: getattr(settings, name)
            for stage, settings in stages.items()
            if belongs(name, stage)
        }
        first = next(iter(values.values()), None)
        same = len(values) > 1 and all(value == first for value in values.values())
        if same or name in OF_THE_RUN:
            top[name] = first
        else:
            for stage, value in values.items():
                sections[stage][name] = value
    return _plain(top | sections)


def _plain(value: Any) -> Any:
    """Writes tuples as the lists that YAML knows."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
