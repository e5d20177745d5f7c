"""The CPU kernels without Python: random cases under sanitizers, many threads, many calls.

tests/native is a program of its own, which calls the kernels as any caller could, with a pool of
its own threads. It compares with a reference in double that is written from the headers' words.
"""

import compiler
import pytest

SANITIZERS = {"quick": "address,undefined", "thread": "thread", "plain": None}


@pytest.fixture(scope="module")
def built() -> None:
    """Builds all that can run here, at once."""
    kinds = [kind for kind, sanitizers in SANITIZERS.items() if not compiler.why_not(sanitizers)]
    compiler.make(compiler.NATIVE, *kinds)


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
    if reason := compiler.why_not(SANITIZERS[kind]):
        pytest.skip(reason)
    request.getfixturevalue("built")
    done = compiler.run([compiler.BUILD / "stress" / kind / "stress", *case.split()])
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-8000:]}"
    assert done.stdout.startswith(case.split()[0])
