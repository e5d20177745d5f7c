"""What images tell of a model that is not trained: they are checked, streamed, and refitted to."""

from .fisher import felt_tokens
from .images import Images
from .refit import refit

__all__ = ["Images", "felt_tokens", "refit"]
