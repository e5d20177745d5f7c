"""TensorBoard files of a stage, for those who ask for them: OUTPUT/tensorboard/STAGE."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...allowed import KINDS
from ...errors import VitslimError
from ...masks import Masks
from .kept import scores

_SCALARS = ("loss", "penalty", "accuracy", "lr", "images_per_second")


def require_tensorboard() -> Any:
    """Returns the class that writes TensorBoard's files, imported only now.

    Raises:
        VitslimError: The package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise VitslimError(
            "--tensorboard needs a package that is not installed: "
            "pip install tensorboard, or leave the option out."
        ) from None
    return SummaryWriter


class Board:
    """Writes what TensorBoard shows of one stage, one step per epoch; for the primary process.

    Args:
        output: The run folder, or the folder of a lone stage.
        stage: Its name, such as `search` or `retrain/macs-60`.
        done: Epochs done when the stage starts or goes on; what an earlier process wrote of later
            ones is hidden.

    Raises:
        VitslimError: The package tensorboard is not installed.
    """

    def __init__(self, output: Path, stage: str, done: int = 0) -> None:
        folder = output / "tensorboard" / stage
        self._writer = require_tensorboard()(str(folder), purge_step=done + 1)

    def epoch(
        self,
        row: Mapping[str, Any],
        masks: Masks | None = None,
        forecast: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Writes what is known of an epoch, at once, so that a kill loses nothing.

        Args:
            row: Of summary.csv.
            masks: What a search has learned so far.
            forecast: Rows that `Forecast` gave for this epoch.
        """
        step = row["epoch"]
        for name in _SCALARS:
            # A stage without masks has a penalty of zero, which is no curve.
            if name != "penalty" or row[name]:
                self._writer.add_scalar(f"epoch/{name}", row[name], step)
        for kind, values in (scores(masks) if masks is not None else {}).items():
            self._writer.add_histogram(f"masks/{kind}", values, step)
        for each in forecast:
            for name in ("accuracy", *KINDS):
                if each[name] is not None:
                    tag = "accuracy if cut now" if name == "accuracy" else f"kept {name}"
                    self._writer.add_scalar(f"{tag}/{each['budget']}", each[name], step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file; the stage is over."""
        self._writer.close()
