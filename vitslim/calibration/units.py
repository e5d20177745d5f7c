"""What the kept units of a model compute, of what the first layer of a half gives."""

import torch
from torch import Tensor

from ..families.family import Half
from ..layers import MaskedAttention
from ..plan import BlockPlan


def values_of_units(half: Half, output: Tensor, keep: BlockPlan) -> Tensor:
    """Returns what the units that are kept compute, in the order in which a slim layer has them.

    Args:
        half: Of a dense or masked block.
        output: [..., out_features] of its first layer: q, k and v of all heads, or hidden units.
        keep: What the plan keeps of the block.
    """
    if half.kind == "mlp":
        return output[..., torch.tensor(keep.hidden, dtype=torch.long, device=output.device)]
    width, total = half.layer.head_dim, half.layer.num_heads * half.layer.head_dim
    places = [
        part * total + head * width + dim
        for part in range(3)
        for head, dims in enumerate(keep.heads or ())
        for dim in dims
    ]
    if isinstance(half.layer, MaskedAttention):
        # The mask is folded into qkv when the heads are cut.
        output = output * half.layer.expanded_mask().flatten().repeat(3)
    return output[..., torch.tensor(places, dtype=torch.long, device=output.device)]
