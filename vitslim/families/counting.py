"""MACs of parts that no search changes, by PyTorch's flop counter."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import VitslimError
from ..wrapped import copy_of


def counted_macs(module: nn.Module, *shape: int) -> int:
    """Returns the MACs of a module on an input of this shape; VitslimError where it has none."""
    if not any(True for _ in module.parameters()):
        return 0
    ghost = copy_of(module).to("meta").eval().requires_grad_(False)
    dtype = next(ghost.parameters()).dtype
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ghost(torch.empty(shape, device="meta", dtype=dtype))
    # Whatever a layer of the user's may raise without data.
    except Exception as error:
        kind = type(module).__name__
        raise VitslimError(f"the MACs of its {kind} cannot be counted ({error})") from error
    return int(counter.get_total_flops() // 2)
