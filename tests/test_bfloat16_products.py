"""The products by instructions for bfloat16 pairs, each kernel alone and without Python.

tests/native/bfloat16_products.cpp calls them, under sanitizers, and compares with double.
"""

from pathlib import Path

import compiler
import pytest

FOLDER = compiler.BUILD / "stress/bfloat16_products"
NOT_HERE = 77


@pytest.fixture(scope="module")
def program() -> Path:
    if reason := compiler.why_not("address,undefined"):
        pytest.skip(reason)
    compiler.make(compiler.NATIVE, "-f", "bfloat16_products.mk", f"FOLDER={FOLDER}")
    return FOLDER / "bfloat16_products"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["avx512-bf16", "amx-bf16", "amx-emulated", "amx-portable"])
def test_products_have_the_numerics_of_the_instruction(program: Path, kernel: str) -> None:
    done = compiler.run([program, kernel, "300", "1"])
    if done.returncode == NOT_HERE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-8000:]}"
    assert done.stdout.startswith(f"{kernel}: 300 cases")
