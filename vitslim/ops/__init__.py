"""The ops as functions: checked arguments, gradients, and a backend chosen by `_dispatch`."""

from ._dispatch import LAYER_OPS, OPS, backend_of, is_forced, use_backend, why_not
from .gated_layer_norm import gated_layer_norm
from .masked_mlp import masked_mlp
from .packed_linear import pack_weight, packed_linear
from .ragged_attention import ragged_attention
from .vit_encoder import vit_encoder

__all__ = [
    "LAYER_OPS",
    "OPS",
    "backend_of",
    "gated_layer_norm",
    "is_forced",
    "masked_mlp",
    "pack_weight",
    "packed_linear",
    "ragged_attention",
    "use_backend",
    "vit_encoder",
    "why_not",
]
