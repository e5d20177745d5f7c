"""Drop-in modules for timm models: Masked* while searching, Slim* when slim."""

from .attention import MaskedAttention, SlimAttention
from .block import MaskedBlock, SlimBlock
from .mlp import MaskedMlp, SlimMlp
from .norm import GatedLayerNorm
from .tokens import TokenGate, TokenSelect

__all__ = [
    "GatedLayerNorm",
    "MaskedAttention",
    "MaskedBlock",
    "MaskedMlp",
    "SlimAttention",
    "SlimBlock",
    "SlimMlp",
    "TokenGate",
    "TokenSelect",
]
