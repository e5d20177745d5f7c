"""Runs `vitslim run` in OUTPUT and kills it while it searches, then, resumed, while it retrains.

usage: kill_run.py OUTPUT [options]
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import forked

OUTPUT = Path(sys.argv[1])
RUN = ["run", *sys.argv[2:], "--output", str(OUTPUT)]
LOG = OUTPUT.with_suffix(".log")


def typed(arguments: list[str]) -> int:
    """Does what `python -m vitslim` does."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module("vitslim", run_name="__main__")
    except SystemExit as end:
        return end.code
    raise AssertionError("python -m vitslim has no exit status")


def kill_at(sign: Path, unfinished: Path, arguments: list[str]) -> None:
    """Starts a run and kills it as soon as a file appears."""
    process = forked.start(arguments, LOG, typed)
    deadline, ended = time.monotonic() + 120, None
    while not (sign.exists() or ended) and time.monotonic() < deadline:
        time.sleep(0.005)
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    os.kill(process, signal.SIGKILL)
    forked.finish(process)
    assert sign.exists(), LOG.read_text()
    assert not unfinished.exists(), "the stage was done before it could be killed"


def main() -> None:
    search, retrain = OUTPUT / "search", OUTPUT / "retrain/macs-60"
    # After the second of four epochs, of 22 updates each.
    kill_at(search / "state/step-0000000044", search / "result.json", RUN)
    assert forked.finish(forked.start(RUN, LOG, typed)) == 2
    kill_at(retrain / "state/step-0000000044", retrain / "result.json", [*RUN, "--resume"])


if __name__ == "__main__":
    main()
