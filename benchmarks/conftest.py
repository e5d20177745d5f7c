"""The fixtures of all benchmarks, and what is printed and written at the end.

pytest-benchmark drives the rounds and owns the table of our own times; the ratios, the losses too,
are printed at the end and merged into `benchmarks/results/<machine>.json`.

    pytest benchmarks -c benchmarks/pytest.ini            # all of them
    pytest benchmarks -c benchmarks/pytest.ini --smoke    # whether they still run: tiny, not kept
    pytest benchmarks/bench_ragged_attention.py -c benchmarks/pytest.ini -k "forward and S"
"""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import records
import shapes
import torch
from harness import Compare, aim_lines_of, lines_of

_entries: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke",
        action="store_true",
        help="tiny shapes, one round, nothing written; without a GPU, kernels are interpreted",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--smoke"):
        shapes.shrink()
        # Tiny work on several threads is waiting, the more so where others want the processor.
        torch.set_num_threads(1)
        if not torch.cuda.is_available():
            # Triton wants to be asked before a kernel is defined.
            os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leaves neither compiled code nor GPU memory to the next benchmark."""
    yield
    torch.compiler.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def compare(benchmark: Any) -> Iterator[Compare]:
    """Times contenders in turn; see harness.Compare."""
    yield Compare(benchmark, _entries)
    # At once, so that a run that is stopped keeps what it has measured.
    if _entries and not shapes.SMOKE:
        records.write(_entries)


@pytest.fixture
def gpu() -> str:
    """Returns the device of a benchmark that wants a GPU; --smoke makes do with the processor."""
    if torch.cuda.is_available():
        return "cuda"
    if not shapes.SMOKE:
        pytest.skip("torch sees no GPU")
    return "cpu"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints, for each entry, how many times as long as ours every contender took, then aims."""
    if not _entries:
        return
    write = terminalreporter.write_line
    terminalreporter.section("time of each contender / time of ours (below 1: ours is slower)")
    for name, entry in _entries.items():
        for line in lines_of(name, entry):
            write(line)
    aims = [line for name, entry in _entries.items() for line in aim_lines_of(name, entry)]
    if aims:
        terminalreporter.section("aims")
    for line in aims:
        write(line)
    if shapes.SMOKE:
        write("smoke: nothing is measured and nothing written")
        return
    for path in records.write(_entries):
        write(f"written: {path.relative_to(records.FOLDER.parent.parent)}")
