"""Models for inference on the CPU, their weights laid out for one kernel call."""

from .model import PackedVisionTransformer, pack

__all__ = ["PackedVisionTransformer", "pack"]
