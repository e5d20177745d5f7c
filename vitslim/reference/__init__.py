"""Plain PyTorch: what each op means, and the backend of last resort.

Accumulates in float32 (float64 for float64 input) and rounds once, on the way out.
"""

import torch

from .gated_layer_norm import gated_layer_norm_backward, gated_layer_norm_forward
from .masked_mlp import masked_mlp_backward, masked_mlp_forward
from .packed_linear import packed_linear_forward
from .ragged_attention import ragged_attention_backward, ragged_attention_forward
from .vit_encoder import vit_encoder_forward

DEVICES: tuple[str, ...] | None = None  # any device torch knows
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

__all__ = [
    "DEVICES",
    "DTYPES",
    "gated_layer_norm_backward",
    "gated_layer_norm_forward",
    "masked_mlp_backward",
    "masked_mlp_forward",
    "packed_linear_forward",
    "ragged_attention_backward",
    "ragged_attention_forward",
    "vit_encoder_forward",
]
