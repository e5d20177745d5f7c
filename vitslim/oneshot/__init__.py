"""Cutting a pretrained model without training: scores, rotation, plan, refit."""

from .compress import Prepared, compress, prepare
from .importance import importance
from .rotation import rotate

__all__ = ["Prepared", "compress", "importance", "prepare", "rotate"]
