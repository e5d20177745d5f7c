"""Real signals to a real process, and the command that goes on after them."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vitslim.workflow.runtime.interrupt import Interrupt, resume_command

# Without vitslim's package, which would import torch: this file needs the standard library alone.
SOURCE = Path(__file__).parents[3] / "vitslim/workflow/runtime/interrupt.py"
CHILD = f"""
import importlib.util, signal, sys, time
spec = importlib.util.spec_from_file_location("interrupt", {str(SOURCE)!r})
interrupt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interrupt)
signal.signal(signal.SIGINT, signal.default_int_handler)
with interrupt.Interrupt() as asked:
    print("ready", flush=True)
    try:
        while not asked.asked:
            time.sleep(0.01)
        print(asked.name, flush=True)
        time.sleep(float(sys.argv[1]))
    except KeyboardInterrupt:
        print("at once", flush=True)
print("saved", flush=True)
time.sleep(float(sys.argv[2]))
"""


class Child:
    """A process that says `ready`, then what happened to it."""

    def __init__(self, inside: float, after: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(inside), str(after)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.says() == "ready"

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def ends(self) -> int:
        self.process.stdout.close()
        return self.process.wait(timeout=30)


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_the_work_goes_on(asked: signal.Signals) -> None:
    child = Child(inside=0, after=0)
    child.process.send_signal(asked)
    assert child.says() == asked.name
    assert child.says() == "saved"
    assert child.ends() == 0


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_stops_at_once(again: signal.Signals) -> None:
    child = Child(inside=60, after=0)
    child.process.send_signal(signal.SIGTERM)
    assert child.says() == "SIGTERM"
    child.process.send_signal(again)
    assert child.says() == "at once"
    child.ends()


def test_after_the_block_a_signal_does_what_it_did_before() -> None:
    child = Child(inside=0, after=60)
    child.process.send_signal(signal.SIGINT)
    assert (child.says(), child.says()) == ("SIGINT", "saved")
    child.process.send_signal(signal.SIGTERM)
    assert child.ends() == -signal.SIGTERM


def test_handlers_are_restored_even_after_an_error() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError), Interrupt() as interrupt:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        assert not interrupt.asked and interrupt.name == ""
        raise RuntimeError
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_changes_no_handlers() -> None:
    seen = []

    def work() -> None:
        with Interrupt() as interrupt:
            seen.extend([signal.getsignal(signal.SIGTERM), interrupt.asked])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, False]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Pretends that a command was typed where `vitslim` and this Python are on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vitslim", "python"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def resume(script: str, *arguments: str) -> str:
        script = str(folder / script) if script == "vitslim" else script
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        return resume_command()

    return resume


def test_the_command_is_the_one_that_was_typed(typed) -> None:
    assert typed("vitslim", "run", "--output", "o") == "vitslim run --output o --resume auto"
    module = "/site-packages/vitslim/__main__.py"
    assert typed(module, "search") == "python -m vitslim search --resume auto"
    assert typed("my.py", "--lr", "1") == "python my.py --lr 1 --resume auto"


def test_a_program_that_the_path_hides_is_named_in_full(typed, monkeypatch, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "bin", other)
    monkeypatch.setenv("PATH", f"{other}:{tmp_path / 'bin'}")
    program = Path(sys.executable).with_name("vitslim")
    assert typed("vitslim", "run") == f"{program} run --resume auto"
    assert typed("/x/__main__.py", "run") == f"{sys.executable} -m vitslim run --resume auto"


@pytest.mark.parametrize("given", [["--resume", "auto"], ["--resume=auto"], ["--resume"]])
def test_resume_is_not_asked_for_twice(typed, given: list[str]) -> None:
    assert typed("vitslim", "run", *given, "--lr", "1") == f"vitslim run {' '.join(given)} --lr 1"


def test_arguments_with_spaces_survive_a_shell(typed) -> None:
    output = "it's a $HOME; folder"
    assert shlex.split(typed("vitslim", "run", "--output", output))[3] == output


@pytest.mark.parametrize("script", ["vitslim", "/x/vitslim/__main__.py"])
def test_torchrun_is_started_again_with_as_many_processes(typed, monkeypatch, script) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    end = "-m vitslim run --resume auto"
    assert typed(script, "run") == f"torchrun --nproc-per-node 2 {end}"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert typed(script, "run") == f"torchrun --nproc-per-node 2 --nnodes 4 {end}"


def test_world_size_alone_is_not_torchrun(typed, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert typed("vitslim", "run") == "vitslim run --resume auto"
    assert "TORCHELASTIC_RUN_ID" not in os.environ
