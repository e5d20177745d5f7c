"""An option: a dataclass field that carries its help, and how a value for it is read."""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any

from ...errors import VitslimError

# The stages of a run, and all that a recipe can have a section for.
OF_A_RUN = ("dense", "search", "retrain")
STAGES = (*OF_A_RUN, "finetune")


def option(
    default: Any,
    text: str,
    *,
    free: bool = False,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """Makes a field.

    Args:
        default: Its value where none was given.
        text: Its help.
        free: Whether it decides how, not what, and may differ on resuming.
        choices: All that it may be, or that each of several values may be.
        least: A number, or each of two, is not smaller.
        above: A number is larger.
        most: A number is not larger.
        below: A number is smaller.
    """
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    limits = {how: limit for how, limit in limits.items() if limit is not None}
    metadata = {"help": text, "free": free, "choices": choices, "limits": limits}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def kind_of(field: "dataclasses.Field[Any]") -> tuple[Any, bool]:
    """Returns the type of a field's value, and whether it may be none as well."""
    if not isinstance(field.type, types.UnionType):
        return field.type, False
    kinds = [kind for kind in typing.get_args(field.type) if kind is not type(None)]
    return kinds[0], True


def read_value(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Reads what YAML gives: lists for tuples, `none` for nothing, 1e-3, which it takes for text.

    Raises:
        ValueError: The value does not fit; the message goes on after the name of the option.
    """
    kind, optional = kind_of(field)
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    try:
        read = _READERS[kind](value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be {_WANTED[kind]}, not {value!r}") from None
    choices = field.metadata["choices"]
    # Told with its place in a recipe.
    for each in (read if isinstance(read, tuple) else (read,)) if choices else ():
        if each not in choices:
            raise ValueError(f"is one of {', '.join(choices)}, not {each!r}")
    return read


def check_value(field: "dataclasses.Field[Any]", value: Any) -> None:
    """Raises VitslimError where a value of the right type is none that the option can have."""
    if value is None:
        return
    option = f"--{field.name.replace('_', '-')}"
    choices, limits = field.metadata["choices"], field.metadata["limits"]
    if choices and not set(value if isinstance(value, tuple) else [value]) <= set(choices):
        raise VitslimError(f"{option} is one of {', '.join(choices)}, not {value!r}.")
    values = value if isinstance(value, tuple) else (value,)
    numbers = [each for each in values if isinstance(each, int | float)]
    within = all(_WITHIN[how](each, limit) for each in numbers for how, limit in limits.items())
    if not within or not all(map(math.isfinite, numbers)):
        wanted = " and ".join(f"{how} {limit:g}" for how, limit in limits.items()) or "finite"
        raise VitslimError(f"{option} must be {wanted}, not {_shown(value)}.")
    if numbers != sorted(numbers):
        raise VitslimError(f"{option} takes the smaller number first, not {_shown(value)}.")


def _shown(value: Any) -> str:
    return " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else f"{value:g}"


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _pair(value: Any) -> tuple[float, float]:
    first, second = (_number(each) for each in _list(value))
    return first, second


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(each) for each in ([value] if isinstance(value, str) else _list(value)))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return list(value)


def _by_name(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {_text(name): each for name, each in value.items()}


_WITHIN: dict[str, typing.Callable[[float, float], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}
_READERS: dict[Any, typing.Callable[[Any], Any]] = {
    bool: _flag,
    int: _whole,
    float: _number,
    str: _text,
    tuple[float, float]: _pair,
    tuple[str, ...]: _texts,
    Mapping[str, Any]: _by_name,
}
_WANTED: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[float, float]: "two numbers",
    tuple[str, ...]: "text or a list of it",
    Mapping[str, Any]: "values by name",
}
