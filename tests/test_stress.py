"""The CPU kernels without Python: random cases under sanitizers, many threads, many calls.

tests/native is a program of its own, which calls the kernels as any caller could, with a pool of
its own threads. It compares with a reference in double that is written from the headers' words.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"
BUILD = NATIVE.parent.parent / "build" / "stress"
SANITIZERS = {"quick": "address,undefined", "thread": "thread", "plain": None}


@functools.cache
def why_not(kind: str) -> str | None:
    """Returns why a kind of the driver can be neither built nor run here, or None."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None or shutil.which("make") is None:
        return f"{compiler} or make is not installed"
    probe = BUILD / f"probe_{kind}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"-fsanitize={SANITIZERS[kind]}"] if SANITIZERS[kind] else []
    command = [*compiler.split(), *flags, "-std=c++20", "-pthread", "-x", "c++", "-", "-o", probe]
    source = "#include <bit>\nint main() { return std::popcount(0u); }\n"
    compiled = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if compiled.returncode:
        return f"{compiler} {' '.join(flags)} fails: {compiled.stderr.strip().splitlines()[-1]}"
    ran = subprocess.run([probe], capture_output=True, text=True, check=False)
    return f"a program with {flags} does not run: {ran.stderr[:200]}" if ran.returncode else None


@pytest.fixture(scope="module")
def built() -> None:
    """Builds all that can run here, at once: the longest files then wait for nobody."""
    kinds = [kind for kind in SANITIZERS if why_not(kind) is None]
    make = ["make", "-C", NATIVE, f"-j{os.cpu_count()}", f"CXX={os.environ.get('CXX', 'g++')}"]
    done = subprocess.run([*make, *kinds], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("quick", "fuzz 100 1"),
        ("quick", "broken 1000 1"),
        ("thread", "threads 4 1"),
        ("plain", "fuzz 300 1000"),
        ("plain", "soak 20000 1"),
    ],
)
def test_stress(kind: str, case: str, request: pytest.FixtureRequest) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    request.getfixturevalue("built")
    # The first report of ThreadSanitizer is the useful one.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    command = [BUILD / kind / "stress", *case.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-8000:]}"
    assert done.stdout.startswith(case.split()[0])
