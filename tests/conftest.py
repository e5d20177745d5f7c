"""Shared fixtures: seeds, and the backends that can run here, with the reason for the others."""

import os
import sys
from pathlib import Path

# Tiny work on several threads is waiting, twenty times as long where others want the processor.
# What threads do is tested where their number is set.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Where there is no GPU the Triton kernels are tested in Triton's interpreter, which wants to be
    # asked before a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

from vitslim.ops import use_backend, why_not

sys.path.insert(0, str(Path(__file__).parent))

# Those that take longest begin, so that processes that share the files end together.
LONGEST = (
    "test_ragged_attention.py",
    "test_emulated.py",
    "test_ptxas.py",
    "test_stress.py",
    "test_aot.py",
    "test_benchmarks.py",
    "test_distributed.py",
)
BACKENDS = ("native", "reference", "triton")
DEVICES = ("cpu", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return request.param


@pytest.fixture(params=BACKENDS)
def forced(request: pytest.FixtureRequest, device: str):
    """Returns a function that forces a backend for an op and dtype, or skips with the reason."""
    undo = []

    def force(op: str, dtype: torch.dtype) -> str:
        reason = why_not(request.param, op, device, dtype)
        if reason is not None:
            pytest.skip(reason)
        undo.append(use_backend(request.param, op))
        return request.param

    yield force
    for each in reversed(undo):
        each.__exit__()
