"""The CPU kernels without Python: random cases under sanitizers, many threads, many calls.

tests/native is a program of its own, which calls the kernels as any caller could, with a pool of
its own threads. It compares with a reference in double that is written from the headers' words.
"""

import compiler
import pytest

SANITIZERS = {"quick": "address,undefined", "thread": "thread", "plain": None}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param("quick", "fuzz 100 1", marks=pytest.mark.slow),
        pytest.param("quick", "broken 1000 1", marks=pytest.mark.slow),
        pytest.param("thread", "threads 4 1", marks=pytest.mark.slow),
        pytest.param("plain", "fuzz 300 1000", marks=pytest.mark.slow),
        ("plain", "fuzz 50 2000"),
        ("plain", "soak 2000 1"),
        pytest.param("plain", "soak 20000 1", marks=pytest.mark.slow),
    ],
)
def test_stress(kind: str, case: str) -> None:
    if reason := compiler.why_not(SANITIZERS[kind]):
        pytest.skip(reason)
    compiler.make(compiler.NATIVE, kind)
    done = compiler.run([compiler.BUILD / "stress" / kind / "stress", *case.split()])
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-8000:]}"
    assert done.stdout.startswith(case.split()[0])
