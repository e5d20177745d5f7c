"""vitslim: vision transformers made smaller, and really faster."""

from . import checkpoint as _checkpoint  # registers the slim model with timm
from .checkpoint import load, save
from .cost import cost
from .errors import VitslimError
from .masks import Masks, sparsity_loss
from .ops import use_backend, why_not
from .plan import Plan
from .surgery import mask, slim
from .workflow.threshold import threshold

__version__ = "0.1.0"
__all__ = [
    "Masks",
    "Plan",
    "VitslimError",
    "cost",
    "load",
    "mask",
    "save",
    "slim",
    "sparsity_loss",
    "threshold",
    "use_backend",
    "why_not",
]

del _checkpoint
