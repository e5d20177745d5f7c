"""Settings that JSON can hold: numbers, text, and lists of them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

NOT_PLAIN = object()


def plain(value: Any) -> Any:
    """Returns a setting as JSON has it, NumPy's numbers as Python's; else NOT_PLAIN."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else NOT_PLAIN
    if value is None or isinstance(value, bool):
        return value
    # An enum or a size of torch's may be a subclass of these.
    if isinstance(value, int):
        return int(value) if type(value).__str__ is int.__str__ else NOT_PLAIN
    if isinstance(value, str):
        return str(value) if type(value) is str else NOT_PLAIN
    if isinstance(value, list | tuple):
        items = [plain(each) for each in value]
        return NOT_PLAIN if any(each is NOT_PLAIN for each in items) else items
    if isinstance(value, dict):
        entries = {key: plain(each) for key, each in value.items()}
        odd = any(type(key) is not str or each is NOT_PLAIN for key, each in entries.items())
        return NOT_PLAIN if odd else entries
    return NOT_PLAIN


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of some settings that JSON can hold."""
    both = {name: plain(value) for name, value in settings.items()}
    return {name: value for name, value in both.items() if value is not NOT_PLAIN}
