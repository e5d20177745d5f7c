"""From scores and a budget to a plan."""

from .threshold import threshold

__all__ = ["threshold"]
