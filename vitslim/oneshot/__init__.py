"""Cutting a pretrained model without training: scores, rotation, plan, refit."""

from .importance import importance
from .rotation import rotate

__all__ = ["importance", "rotate"]
