"""Argument checks the ops share: each failure is one sentence with the shape that was given."""

import torch
from torch import Tensor


def check(condition: bool, op: str, message: str) -> None:
    """Raises ValueError("<op>: <message>") unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def check_like(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Checks that `tensor` has `shape` and lives where `x` does."""
    check(
        tuple(tensor.shape) == shape,
        op,
        f"{name} must have shape {list(shape)}, got {list(tensor.shape)}",
    )
    check(tensor.device == x.device, op, f"{name} is on {tensor.device}, the input on {x.device}")


def accumulated(mask: Tensor, x: Tensor) -> Tensor:
    """Returns the mask in the dtype kernels accumulate in: float32, or float64 for float64."""
    return mask.to(torch.promote_types(x.dtype, torch.float32))
