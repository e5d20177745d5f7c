"""The CUDA kernels on the CPU: every case as it is, and the small ones under sanitizers.

tests/native/emulated runs each CUDA thread as a thread of the operating system and every
instruction of csrc/cuda/ptx.cuh by its documented meaning, more strictly than a GPU would. It
compares with references in double that are written from the headers' words.
"""

import re

import compiler
import pytest

FOLDER = compiler.NATIVE / "emulated"
SANITIZERS = {"plain": None, "address": "address,undefined", "thread": "thread"}


@pytest.fixture(scope="module")
def built() -> None:
    """Builds all that can run here, at once."""
    kinds = [kind for kind, sanitizers in SANITIZERS.items() if not compiler.why_not(sanitizers)]
    compiler.make(FOLDER, *kinds)


@pytest.fixture
def program(request: pytest.FixtureRequest, kind: str) -> str:
    if reason := compiler.why_not(SANITIZERS[kind]):
        pytest.skip(reason)
    request.getfixturevalue("built")
    return str(compiler.BUILD / "emulated" / kind / "emulated")


@pytest.mark.parametrize(
    ("kind", "cases"), [("plain", ""), ("address", "small"), ("thread", "small")]
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
        *((kind, "none", "right numbers") for kind in SANITIZERS),
        ("plain", "early", "wrong numbers"),
        ("plain", "lost", "a thread left the kernel while others of it wait at a barrier"),
        ("address", "overrun", "heap-buffer-overflow"),
        ("address", "shared", "heap-buffer-overflow"),
        ("thread", "race", "data race"),
    ],
)
def test_a_planted_fault_is_seen(program: str, fault: str, said: str) -> None:
    done = compiler.run([f"{program.removesuffix('emulated')}planted", fault])
    assert (done.returncode == 0) == (fault == "none")
    assert said in done.stdout + done.stderr
