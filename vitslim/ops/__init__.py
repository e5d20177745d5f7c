"""The ops as functions: checked arguments, gradients, and a backend chosen by `_dispatch`."""

from ._dispatch import OPS, backend_of, is_forced, use_backend, why_not
from .gated_layer_norm import gated_layer_norm
from .masked_mlp import masked_mlp
from .ragged_attention import ragged_attention

__all__ = [
    "OPS",
    "backend_of",
    "gated_layer_norm",
    "is_forced",
    "masked_mlp",
    "ragged_attention",
    "use_backend",
    "why_not",
]
