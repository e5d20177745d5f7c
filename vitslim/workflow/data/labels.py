"""What the label of an image may be: a whole number below the number of classes."""

import numbers
from collections.abc import Sequence
from typing import Any

from ...errors import VitslimError

ADVICE_UNLABELLED = "take a split that has labels, or leave out the rows that have none"


def check_labels(values: Sequence[Any], classes: int, where: str) -> None:
    """Raises VitslimError at the first label of a whole split that is wrong."""
    wrong = [value for value in values if wrong_label(value, classes)]
    if not wrong:
        return
    row = next(row for row, value in enumerate(values) if wrong_label(value, classes))
    others = f", the first of {len(wrong)} such rows," if len(wrong) > 1 else ""
    largest = max((value for value in wrong if isinstance(value, int)), default=0)
    what = wrong_label(values[row], classes, largest)
    raise VitslimError(f"The label of row {row} of {where}{others} is {what}.")


def wrong_label(value: Any, classes: int, largest: int = 0) -> str:
    """Says what is wrong about a label and what to do about it; nothing where it is right.

    timm would cut 0.7 to 0, and a loss would raise IndexError at the end of a batch.

    Args:
        value: What the data has.
        classes: Labels are below it; 0 where it is not known.
        largest: Of all labels, where they are known.
    """
    # Most of millions of labels are these.
    if type(value) is int and 0 <= value < classes:
        return ""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None:
        return f"missing: {ADVICE_UNLABELLED}"
    if isinstance(value, str | bytes):
        return (
            f"the text {_short(value)}: labels are whole numbers, so number the classes first, "
            "as class_encode_column of Hugging Face's datasets does, or name another column with "
            "--target-key"
        )
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return (
            f"{_short(value)}, which is no whole number: cast the column to integers if it has "
            "classes, or name another column with --target-key"
        )
    if not isinstance(value, numbers.Integral):
        return (
            f"{_short(value)}, which is no whole number: one label per image is needed, "
            "so name another column with --target-key"
        )
    number = int(value)
    if number < 0:
        return f"{number}, which marks images without a label: {ADVICE_UNLABELLED}"
    if classes and number >= classes:
        return (
            f"{number} and the model has {classes} classes, of labels 0 to {classes - 1}: make the "
            f"model with --model-kwargs num_classes={max(number, largest) + 1} or more, or number "
            "the classes from 0"
        )
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
