"""The products by instructions for bfloat16 pairs, each kernel alone and without Python.

tests/native/bfloat16_products.cpp calls them, under sanitizers, and compares with double.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"
FOLDER = NATIVE.parent.parent / "build" / "stress" / "bfloat16_products"
CXX = os.environ.get("CXX", "g++")
NOT_HERE = 77


def why_not() -> str | None:
    """Returns why the program can be neither built nor run here, or None."""
    if shutil.which(CXX.split()[0]) is None or shutil.which("make") is None:
        return f"{CXX} or make is not installed"
    FOLDER.mkdir(parents=True, exist_ok=True)
    probe = FOLDER / "probe"
    command = [*CXX.split(), "-fsanitize=address,undefined", "-std=c++20", "-x", "c++", "-"]
    source = "#include <bit>\nint main() { return std::popcount(0u); }\n"
    compiled = subprocess.run(
        [*command, "-o", probe], input=source, capture_output=True, text=True, check=False
    )
    if compiled.returncode:
        return f"{' '.join(command)} fails: {compiled.stderr.strip().splitlines()[-1]}"
    ran = subprocess.run([probe], capture_output=True, text=True, check=False)
    return f"a sanitized program does not run: {ran.stderr[:200]}" if ran.returncode else None


@pytest.fixture(scope="module")
def program() -> Path:
    if reason := why_not():
        pytest.skip(reason)
    make = ["make", "-C", NATIVE, "-f", "bfloat16_products.mk", f"-j{os.cpu_count()}", f"CXX={CXX}"]
    done = subprocess.run([*make, f"FOLDER={FOLDER}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return FOLDER / "bfloat16_products"


@pytest.mark.parametrize("kernel", ["avx512-bf16", "amx-bf16", "amx-emulated", "amx-portable"])
def test_products_have_the_numerics_of_the_instruction(program: Path, kernel: str) -> None:
    command = [program, kernel, "300", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == NOT_HERE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-8000:]}"
    assert done.stdout.startswith(f"{kernel}: 300 cases")
