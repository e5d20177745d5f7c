"""A search of share_stages.py under torchrun in which the second process dies, the first time.

usage: die_once.py FOLDER NAME [options]
"""

import os
import signal
import sys

folder, name, options = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.argv = [sys.argv[0], folder, f"{folder}/images"]
from share_stages import SEARCH, WAYS  # noqa: E402, which reads the two

from vitslim.cli import main  # noqa: E402
from vitslim.workflow.training.loop import Loop  # noqa: E402

_update = Loop._update


def _dying(self: Loop, *args) -> None:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.world.rank == 1 and self.done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    _update(self, *args)


Loop._update = _dying
sys.exit(main([*SEARCH, *WAYS[name][1], *options]))
