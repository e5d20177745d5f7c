"""The state of any optimiser as tensors, for safetensors, and JSON: nothing is pickled."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import VitslimError


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits the state of an optimiser into tensors by their place, and JSON with the places."""
    tensors: dict[str, Tensor] = {}
    facts = _pack(optimizer.state_dict(), "", tensors)
    try:
        return tensors, json.loads(json.dumps(facts))
    except TypeError as error:
        name = type(optimizer).__name__
        raise VitslimError(f"The state of {name} cannot be saved: choose another --opt.") from error


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Gives an optimiser the state that `pack_optimizer` took."""
    whole = _unpack(facts, tensors)
    whole["state"] = {int(index): slots for index, slots in whole["state"].items()}
    optimizer.load_state_dict(whole)


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor at": place}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {key: _pack(each, f"{place}.{key}", tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        items = [_pack(each, f"{place}.{index}", tensors) for index, each in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if list(value) == ["tensor at"]:
            return tensors[value["tensor at"]]
        if list(value) == ["dtype"]:
            return getattr(torch, value["dtype"])
        if list(value) == ["tuple"]:
            return tuple(_unpack(each, tensors) for each in value["tuple"])
        return {key: _unpack(each, tensors) for key, each in value.items()}
    return [_unpack(each, tensors) for each in value] if isinstance(value, list) else value
