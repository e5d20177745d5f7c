"""Notices that a model has changed since it was read: its tensors, its modules, its settings."""

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, str)
_SAMPLES = 4


class Watch:
    """A picture of a model. Asking it costs microseconds: counters are read, and a few vectors.

    An in-place change of a tensor raises its version, which torch counts; any other change puts
    another object in place. Changes through `parameter.data` are not counted; those of a whole
    model show in the sampled vectors, those of a single tensor may go unseen.

    Args:
        model: What to watch. Its own settings count too (`global_pool`), not those of its parts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._settings, self._plain = vars(model), _plain_settings(model)
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []
        self._modules: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in model.modules():
            self._modules.append((module._modules, dict(module._modules)))
            for tensors in (module._parameters, module._buffers):
                here = [(name, each) for name, each in tensors.items() if each is not None]
                self._places += [(tensors, *each) for each in here]
        # A tensor made in inference mode counts no versions.
        counted = [tensor for *_, tensor in self._places if not tensor.is_inference()]
        self._counted, self._versions = counted, [tensor._version for tensor in counted]
        vectors = [each for each in model.parameters() if each.dim() == 1 and each.numel() > 0]
        # As bits, for a NaN equals nothing. A strided vector has no such view, and is rare.
        sampled = [each.detach() for each in vectors if each.is_contiguous()]
        bits = [each.view(torch.uint8) for each in sampled[:: -(-len(sampled) // _SAMPLES) or 1]]
        self._samples = [(each, each.clone()) for each in bits]

    def changed(self) -> bool:
        """Returns whether anything is not as it was."""
        if [tensor._version for tensor in self._counted] != self._versions:
            return True
        for tensors, name, tensor in self._places:
            if tensors.get(name) is not tensor:
                return True
        for now, before in self._modules:
            if now != before:
                return True
        settings = self._settings
        if any(settings.get(name) != value for name, value in self._plain.items()):
            return True
        return not all(torch.equal(now, before) for now, before in self._samples)


def _plain_settings(model: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module that are numbers, texts or None, but not its mode."""
    return {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, _PLAIN) and not name.startswith("_") and name != "training"
    }
