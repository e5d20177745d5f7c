"""An option: a dataclass field that carries its help, and how a value for it is read."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

STAGES = ("dense", "search", "retrain")


def option(
    default: Any, text: str, *, free: bool = False, choices: tuple[str, ...] | None = None
) -> Any:
    """Makes a field.

    Args:
        default: Its value where none was given.
        text: Its help.
        free: Whether it decides how, not what, and may differ on resuming.
        choices: All that it may be, or that each of several values may be.
    """
    metadata = {"help": text, "free": free, "choices": choices}
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
    except (TypeError, ValueError):
        raise ValueError(f"must be {_WANTED[kind]}, not {value!r}") from None
    choices = field.metadata["choices"]
    for each in (read if isinstance(read, tuple) else (read,)) if choices else ():
        if each not in choices:
            raise ValueError(f"is one of {', '.join(choices)}, not {each!r}")
    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
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
