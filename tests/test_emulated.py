"""The CUDA kernels on the CPU: all cases plain and under AddressSanitizer, small ones for races.

tests/native/emulated runs the CUDA threads of a block in turns, or for ThreadSanitizer as threads
of the operating system, and every instruction of csrc/cuda/ptx.cuh by its documented meaning, more
strictly than a GPU would. It compares with references in double that are written from the headers'
words. Sanitizers take long to compile and are slow.
"""

import re

import compiler
import pytest

FOLDER = compiler.NATIVE / "emulated"
SANITIZERS = {"plain": None, "address": "address,undefined", "thread": "thread"}
slow = pytest.mark.slow


@pytest.fixture
def program(kind: str) -> str:
    if reason := compiler.why_not(SANITIZERS[kind]):
        pytest.skip(reason)
    compiler.make(FOLDER, kind)
    return str(compiler.BUILD / "emulated" / kind / "emulated")


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("plain", ""),
        pytest.param("address", "", marks=slow),
        pytest.param("thread", "small", marks=slow),
    ],
)
def test_kernels_keep_the_error_budget(program: str, cases: str) -> None:
    done = compiler.run([program, *cases.split()])
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-8000:]}"
    count = re.search(r"^emulated: (\d+) cases in .* s, 0 failed$", done.stdout, re.MULTILINE)
    assert count and int(count[1]) > 0


@pytest.mark.parametrize("kind", ["plain"])
def test_a_name_without_cases_is_no_success(program: str) -> None:
    assert compiler.run([program, "no such case"]).returncode != 0


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        ("plain", "none", "right numbers"),
        ("plain", "early", "wrong numbers"),
        ("plain", "race", "wrong numbers"),
        ("plain", "lost", "a thread left the kernel while others of it wait at a barrier"),
        pytest.param("address", "none", "right numbers", marks=slow),
        pytest.param("address", "overrun", "heap-buffer-overflow", marks=slow),
        pytest.param("address", "shared", "heap-buffer-overflow", marks=slow),
        pytest.param("thread", "none", "right numbers", marks=slow),
        pytest.param("thread", "race", "data race", marks=slow),
    ],
)
def test_a_planted_fault_is_seen(program: str, fault: str, said: str) -> None:
    done = compiler.run([f"{program.removesuffix('emulated')}planted", fault])
    assert (done.returncode == 0) == (fault == "none")
    assert said in done.stdout + done.stderr
