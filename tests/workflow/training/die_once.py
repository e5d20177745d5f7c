"""A search of share_stages.py under torchrun in which the second process dies, the first time.

usage: die_once.py FOLDER IMAGES NAME [options]
"""

import os
import signal
import sys

from share_stages import SEARCH, WAYS

from vitslim.cli import main
from vitslim.workflow.training.loop import Loop

name, options = sys.argv[3], sys.argv[4:]

_update = Loop._update


def _dying(self: Loop, *args) -> None:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.world.rank == 1 and self.done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    _update(self, *args)


Loop._update = _dying
sys.exit(main([*SEARCH, *WAYS[name][1], *options]))
