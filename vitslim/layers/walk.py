"""Where the masks of a model are."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from .attention import MaskedAttention
from .mlp import MaskedMlp
from .tokens import TokenGate


class MaskedPart(NamedTuple):
    """A module that carries a mask.

    Attributes:
        name: Of the module in its model.
        kind: "attention", "mlp" or "token".
        module: A MaskedAttention, MaskedMlp or TokenGate.
        parameter: What is learned; of token gates the raw values.
    """

    name: str
    kind: str
    module: nn.Module
    parameter: nn.Parameter

    def values(self) -> Tensor:
        """Returns the mask itself, in the parameter's shape; its |values| are the scores."""
        return self.module.gate() if self.kind == "token" else self.parameter


def masked_parts(model: nn.Module) -> Iterator[MaskedPart]:
    """Yields the masks of a model in the order of its modules."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedAttention):
            yield MaskedPart(name, "attention", module, module.mask)
        elif isinstance(module, MaskedMlp):
            yield MaskedPart(name, "mlp", module, module.mask)
        elif isinstance(module, TokenGate):
            yield MaskedPart(name, "token", module, module.raw)
