"""Where a number stopped being finite: the first layer to blame, by name."""

import torch
from torch import Tensor, nn


def first_non_finite(model: nn.Module, images: Tensor, backward: bool) -> str:
    """Names the first thing that is not finite: images, a parameter, an activation, a gradient.

    Args:
        model: The model as it was when the loss or a gradient went wrong.
        images: The batch it saw [B, C, H, W].
        backward: Whether the loss was finite, so that it went wrong on the way back.
    """
    # A sharded model answers all processes at once, so each asks the same, whatever it has found.
    parameters = [name for name, p in model.named_parameters() if not _finite(p)]
    gradients = [
        name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)
    ]
    # Last, for it leaves some parameters whole, and those have no gradients.
    layer = _first_activation(model, images)
    if not _finite(images):
        return "the images"
    if parameters:
        return f"the parameter {parameters[0]}"
    if layer is not None:
        return f"the output of {layer}"
    # Gradients flow backwards: the last layer with a bad one is where it came from.
    return f"the gradient of {gradients[-1]}" if backward and gradients else "the loss itself"


def _first_activation(model: nn.Module, images: Tensor) -> str | None:
    found: list[str] = []

    def watch(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    # Inner modules end before the outer ones that hold them, so the first one is the innermost.
    return found[0] if found else None


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
