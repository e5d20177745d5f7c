"""Runs vitslim commands in forks of one process that has torch already, so that each is quick.

A fork may be killed at any moment, or started as one of several processes, as torchrun would. It
must be imported in a process of its own: a fork of one that has computed with threads may hang.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

import vitslim.workflow.run  # noqa: F401, for its modules
from vitslim.cli import main

# This process never computes: a fork inherits no pool of threads, and starts none.
torch.set_num_threads(1)


def start(
    arguments: list[str],
    log: Path,
    program: Callable[[list[str]], int | None] = main,
    **environment: str,
) -> int:
    """Starts a command and returns its process; what it prints goes to the end of `log`."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.environ.update(environment)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = program(arguments) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        # Not sys.exit, which would run what the parent has planned for its own end.
        os.write(1, b"")
        os._exit(status)


def finish(process: int) -> int:
    """Waits for a process; returns its exit status, negative for the signal that ended it."""
    status = os.waitpid(process, 0)[1]
    return os.waitstatus_to_exitcode(status)


def finish_or_kill(process: int, seconds: float) -> bool:
    """Sends SIGKILL after so many seconds; returns whether the process ended before that."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0, "it failed by itself"
            return True
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    return os.waitstatus_to_exitcode(status) == 0


def start_world(arguments: list[str], log: Path, size: int) -> list[int]:
    """Starts a command in several processes that find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    return [
        start(arguments, log, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(size)
    ]
