"""Cutting a pretrained model without training: scores, rotation, plan, refit."""

from .importance import importance

__all__ = ["importance"]
