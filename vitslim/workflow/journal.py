"""What a run tells as it goes: a progress bar, one line per epoch, and `summary.csv`.

`summary.csv` has one row per epoch of every stage: stage, epoch (from 1), loss (criterion, mean
over the epoch), penalty (the search's, last step), accuracy (held out, top-1 in percent), lr,
images_per_second (training, all processes) and seconds (the epoch, evaluation included).
"""

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import atomic_write

COLUMNS = (
    "stage",
    "epoch",
    "loss",
    "penalty",
    "accuracy",
    "lr",
    "images_per_second",
    "seconds",
)


class Journal:
    """Tells how one stage goes.

    Args:
        stage: Its name in rows and lines, such as `search` or `retrain/macs-60`.
        summary: The summary.csv of the run, or None to write none.
        quiet: For processes other than the primary one: says and writes nothing.
    """

    def __init__(self, stage: str, summary: Path | None, quiet: bool = False) -> None:
        self.stage = stage
        self.summary = summary
        self.quiet = quiet

    def bar(self, done: int, total: int) -> Any:
        """Makes a progress bar over all steps of the stage; its time left is the stage's."""
        return tqdm(
            total=total,
            initial=done,
            desc=self.stage,
            unit="step",
            leave=False,
            # None shows the bar on a terminal only.
            disable=True if self.quiet else None,
        )

    def say(self, text: str) -> None:
        """Prints one line without tearing the progress bar."""
        if not self.quiet:
            tqdm.write(f"{self.stage}: {text}", file=sys.stdout)
            sys.stdout.flush()

    def row(self, rows: Sequence[Mapping[str, Any]], epochs: int) -> None:
        """Tells of the epoch just done and brings summary.csv up to date.

        Args:
            rows: One row per epoch of this stage so far, the newest last.
            epochs: How many there will be.
        """
        last = rows[-1]
        penalty = f"penalty {last['penalty']:.4f}  " if last["penalty"] else ""
        self.say(
            f"epoch {last['epoch']}/{epochs}  loss {last['loss']:.4f}  {penalty}"
            f"accuracy {last['accuracy']:.2f} %  lr {last['lr']:.1e}  "
            f"{last['images_per_second']:.0f} images/s  {last['seconds']:.1f} s"
        )
        self.record(rows)

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Puts the rows of this stage into summary.csv in place of those it has of it."""
        if self.quiet or self.summary is None:
            return
        others = [row for row in read_summary(self.summary) if row["stage"] != self.stage]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*others, *rows])
        atomic_write(self.summary, text.getvalue())


def read_summary(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a summary.csv, none if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("stage")]
