"""What a run tells as it goes: a progress bar, one line per epoch, and `summary.csv`.

`summary.csv` has one row per epoch of every stage: stage, epoch (from 1), loss (criterion, mean
over the epoch), penalty (the search's, last step), accuracy (held out, top-1 in percent), lr,
images_per_second (training, all processes) and seconds (the epoch, evaluation included).
"""

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...files import atomic_write

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


class Bar(tqdm):
    """A bar over the updates of a stage that tells its speed in images, loss and penalty.

    The time left is judged from the mean over the whole stage, so it counts evaluations; the speed
    is that of the last seconds of training.
    """

    images = 0
    values: Mapping[str, Any] = {}

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm draws; it asks only when it draws, a few times a second at most."""
        told: dict[str, Any] = super().format_dict
        speed, told["rate"] = told["rate"], None
        parts = [f"{speed * self.images:.0f} images/s"] if speed and self.images else []
        parts += [f"{name} {float(value):.4f}" for name, value in self.values.items()]
        told["postfix"] = ", ".join(parts)
        return told

    def rest(self) -> None:
        """Leaves the time since the last drawing out of the speed: it was not spent on training."""
        if not self.disable:
            self.last_print_n, self.last_print_t = self.n, self._time()


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
        self._bar: Bar | None = None

    def bar(self, done: int, total: int) -> Bar:
        """Makes a progress bar over all updates of the stage; its time left is the stage's."""
        self._bar = Bar(
            total=total,
            initial=done,
            desc=self.stage,
            unit="update",
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            # None shows the bar on a terminal only.
            disable=True if self.quiet else None,
        )
        return self._bar

    def show(self, bar: Bar, *, loss: Any, penalty: Any = None, images: int) -> None:
        """Notes what the bar is to say when it is drawn next; until then nothing is computed.

        Args:
            bar: Made by `bar`.
            loss: A number or a tensor without gradient, read when the bar is drawn: a loss on a
                GPU is not waited for at every update.
            penalty: The same; None or 0.0 is left out.
            images: How many images an update has, over all processes.
        """
        bar.images = images
        # `is`, because comparing a tensor on a GPU with zero would wait for it.
        absent = penalty is None or (isinstance(penalty, float) and penalty == 0.0)
        bar.values = {"loss": loss} if absent else {"loss": loss, "penalty": penalty}

    def say(self, text: str) -> None:
        """Prints one line without tearing the progress bar."""
        if not self.quiet:
            tqdm.write(f"{self.stage}: {text}", file=sys.stdout)
            sys.stdout.flush()
        # Lines come between updates, after an evaluation or a forecast.
        if self._bar is not None:
            self._bar.rest()

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
        write_table(self.summary, COLUMNS, [*others, *rows])


def read_summary(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a summary.csv, none if there is none."""
    return [row for row in read_table(path) if row.get("stage")]


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a CSV file with a header, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, whole or not at all; entries that are no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def budget_text(budget: Mapping[str, Any] | str) -> str:
    """Writes a budget the way it is typed: `macs=60%`."""
    if isinstance(budget, str):
        return budget
    return ",".join(f"{name}={value}" for name, value in budget.items())
