"""Being asked to stop: SIGTERM and SIGINT are remembered, so that an update is finished and saved.

The second signal stops at once, as a signal does without all this.
"""

import os
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818, for it is no error
    """A signal came while something was done that can be done again from the start."""


class Stopped(Exception):  # noqa: N818, for it is no error
    """A run that ended early, as asked, with everything saved; its message is for the user."""


class Interrupt:
    """Remembers the first SIGTERM or SIGINT inside a `with` block; a second one raises.

    Only the main thread may handle signals: elsewhere nothing is remembered and nothing changed.

    Attributes:
        name: Of the signal that came, such as `SIGTERM`; empty until one does.
        current: The one whose block is being executed.
    """

    current: ClassVar["Interrupt | None"] = None

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return bool(self.name)

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for each in SIGNALS:
                self._previous[each] = signal.signal(each, self._remember)
        Interrupt.current = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        Interrupt.current = None
        for each, previous in self._previous.items():
            # None was installed by C code, and Python cannot put it back.
            signal.signal(each, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


def interrupted() -> bool:
    """Returns whether a signal came in the `Interrupt` block that is being executed, if any."""
    return Interrupt.current is not None and Interrupt.current.asked


def resume_command() -> str:
    """Returns the command line that goes on with what this process was doing.

    Under torchrun it starts as many processes again; with several nodes, their rendezvous is in no
    environment variable and has to be added.
    """
    script, arguments = sys.argv[0], sys.argv[1:]
    command = Path(script).name
    target = ["-m", "vitslim"] if command in ("__main__.py", "vitslim") else [script]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        target = [*_torchrun(), *target]
    elif command == "vitslim":
        target = [_as_typed(script)]
    else:
        target = [_as_typed(sys.executable), *target]
    if not any(each.split("=")[0] == "--resume" for each in arguments):
        arguments = [*arguments, "--resume", "auto"]
    return shlex.join([*target, *arguments])


def _torchrun() -> list[str]:
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // processes
    command = ["torchrun", "--nproc-per-node", str(processes)]
    return command if nodes == 1 else [*command, "--nnodes", str(nodes)]


def _as_typed(path: str) -> str:
    """Returns the bare name of a program where the shell would find this very one by it."""
    name = Path(path).name
    return name if shutil.which(name) == path else path
