"""What images tell of a model that is not trained: they are checked, streamed, and refitted to."""

from .images import Images
from .refit import refit

__all__ = ["Images", "refit"]
