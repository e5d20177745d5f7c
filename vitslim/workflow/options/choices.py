"""What a run can be told beside how its stages train: the model, the budgets, masks and plans."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .option import check_value, option

_KINDS = ("attention", "mlp", "token")


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices of a run; those on masks and plans are arguments of `mask` and `threshold`."""

    model: str | None = option(None, "a timm name or a saved folder")
    pretrained: bool = option(False, "let timm load its weights")
    model_kwargs: Mapping[str, Any] = option(
        {}, "timm's arguments for the model, e.g. img_size=32 patch_size=4 num_classes=10"
    )
    output: str | None = option(None, "where everything goes")
    budget: tuple[str, ...] = option(
        (),
        "macs=60%, params=12M, latency=60%, or attention=0.7,mlp=0.7,token=0.8; may be repeated",
    )
    fold: bool = option(True, "multiply what the masks learned into the weights")
    granularity: str = option(
        "head_dim",
        "one value per head and dimension, per dimension, or per head",
        choices=("head_dim", "uniform", "head"),
    )
    kinds: tuple[str, ...] = option(_KINDS, "what may be cut", choices=_KINDS)
    token_start: str = option(
        "paper",
        "token gates start at tanh(3), as in the paper, or at 1",
        choices=("paper", "one"),
    )
    token_gate: str = option(
        "input",
        "token gates scale a layer's input, as in the paper, or weigh its keys",
        choices=("input", "keys"),
    )
    skip: tuple[str, ...] = option((), "parts to leave alone, e.g. blocks.0 blocks.*.mlp")
    round_to: int = option(8, "widths are multiples of this; 1 is exact", least=1)
    token_rule: str = option(
        "running-min",
        "a token dropped in a layer is dropped in later ones, as in the paper, or stays while a "
        "deeper layer keeps it",
        choices=("running-min", "any-deeper"),
    )
    floor: int = option(1, "units that every layer keeps at least", least=0)
    ranking: str = option(
        "fractions",
        "kinds that the budget does not name keep one common fraction, or whatever scores most "
        "per MAC",
        choices=("fractions", "macs"),
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))

    def some(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Returns the choices of these names."""
        return {name: getattr(self, name) for name in names}


FIELDS = {field.name: field for field in dataclasses.fields(Choices)}
MODEL = ("model", "pretrained", "model_kwargs")
MASK = ("granularity", "kinds", "token_start", "token_gate", "skip")
PLANNING = ("round_to", "token_rule", "floor", "ranking")
