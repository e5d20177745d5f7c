"""vitslim: vision transformers made smaller, and really faster."""

from importlib.metadata import PackageNotFoundError, version

from .checkpoint import load, save  # which also registers the slim model with timm
from .cost import cost
from .errors import VitslimError
from .masks import Masks, sparsity_loss
from .oneshot import compress, importance, rotate
from .ops import use_backend, why_not
from .packed import PackedVisionTransformer, pack
from .plan import Plan
from .planning import threshold
from .surgery import mask, slim

try:
    __version__ = version("vitslim")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Masks",
    "PackedVisionTransformer",
    "Plan",
    "VitslimError",
    "compress",
    "cost",
    "importance",
    "load",
    "mask",
    "pack",
    "rotate",
    "save",
    "slim",
    "sparsity_loss",
    "threshold",
    "use_backend",
    "why_not",
]
