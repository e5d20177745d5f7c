"""What is said of data that cannot be read."""

from contextlib import closing

import pytest

from vitslim.errors import VitslimError
from vitslim.workflow.data.batches import Data


def trouble_of(data: Data) -> str:
    """Takes an epoch, which must fail, and returns the sentence; no worker is left behind."""
    with closing(data), pytest.raises(VitslimError) as raised:
        list(data.epoch(0))
    return str(raised.value)
