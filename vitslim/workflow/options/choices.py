"""What a run can be told beside how its stages train: the model, the budgets, masks and plans."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...allowed import (
    CRITERIA,
    GRANULARITIES,
    KINDS,
    RANKINGS,
    TOKEN_GATES,
    TOKEN_RULES,
    TOKEN_STARTS,
)
from .option import check_value, option


@dataclasses.dataclass(frozen=True)
class MaskOptions:
    """Which masks a search learns: the arguments of `vitslim.mask`."""

    granularity: str = option(
        "head_dim",
        "one value per head and dimension, per dimension, or per head",
        choices=GRANULARITIES,
    )
    kinds: tuple[str, ...] = option(KINDS, "what may be cut", choices=KINDS)
    token_start: str = option(
        "paper",
        "token gates start at tanh(3), as in the paper, or at 1",
        choices=TOKEN_STARTS,
    )
    token_gate: str = option(
        "input",
        "token gates scale a layer's input, as in the paper, or weigh its keys",
        choices=TOKEN_GATES,
    )
    skip: tuple[str, ...] = option((), "parts to leave alone, e.g. blocks.0 blocks.*.mlp")

    @property
    def mask_arguments(self) -> dict[str, Any]:
        """The arguments of `vitslim.mask`, by name."""
        return _values(self, MASK)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The arguments of `vitslim.threshold`, and how `vitslim.slim` cuts to the plan."""

    round_to: int = option(8, "widths are multiples of this; 1 is exact", least=1)
    token_rule: str = option(
        "running-min",
        "a token dropped in a layer is dropped in later ones, as in the paper, or stays while a "
        "deeper layer keeps it",
        choices=TOKEN_RULES,
    )
    floor: int = option(1, "units that every layer keeps at least", least=0)
    ranking: str = option(
        "fractions",
        "kinds that the budget does not name keep one common fraction, or whatever scores most "
        "per MAC",
        choices=RANKINGS,
    )
    fold: bool = option(True, "multiply what the masks learned into the weights")

    @property
    def threshold_arguments(self) -> dict[str, Any]:
        """The arguments of `vitslim.threshold`, by name."""
        return _values(self, PLANNING)


@dataclasses.dataclass(frozen=True)
class CompressOptions:
    """How a model is looked at, and cut without training."""

    calibration_images: int = option(
        1024, "training images to look at without augmentation, or all there are", least=1
    )
    rotate: bool = option(
        False, "rotate the heads first, so that their first dimensions matter most"
    )
    criterion: str = option(CRITERIA[0], "what units are scored by", choices=CRITERIA)
    refit: bool = option(True, "refit what is left to what the model computed before the cut")
    compress: bool = option(
        False,
        "cut the dense model to the same budgets without a search too, and retrain that a quarter "
        "of the epochs at a tenth of the rates",
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """What to work on."""

    model: str | None = option(None, "a timm name or a saved folder")
    pretrained: bool = option(False, "let timm load its weights")
    model_kwargs: Mapping[str, Any] = option(
        {}, "timm's arguments for the model, e.g. img_size=32 patch_size=4 num_classes=10"
    )
    train_dense: bool = option(
        False, "train the dense model although its weights fit; --dense-epochs implies it"
    )
    output: str | None = option(None, "where everything goes")
    budget: tuple[str, ...] = option(
        (),
        "macs=60%, params=12M, latency=60%, or attention=0.7,mlp=0.7,token=0.8; may be repeated",
    )


@dataclasses.dataclass(frozen=True)
class Choices(CompressOptions, PlanOptions, MaskOptions, _Job):
    """Everything that a run can be told beside the settings of its stages."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))

    def some(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Returns the choices of these names."""
        return _values(self, names)

    @property
    def masks(self) -> MaskOptions:
        """The choices on masks."""
        return MaskOptions(**_values(self, MASK))

    @property
    def plans(self) -> PlanOptions:
        """The choices on plans."""
        return PlanOptions(**_values(self, (*PLANNING, "fold")))

    @property
    def compression(self) -> CompressOptions:
        """The choices on what is done without training."""
        return CompressOptions(**_values(self, COMPRESS))


def _values(options: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


FIELDS = {field.name: field for field in dataclasses.fields(Choices)}
MASK = tuple(field.name for field in dataclasses.fields(MaskOptions))
COMPRESS = tuple(field.name for field in dataclasses.fields(CompressOptions))
PLANNING = tuple(each.name for each in dataclasses.fields(PlanOptions) if each.name != "fold")
