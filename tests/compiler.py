"""Programs of C++ that tests build with make and run: whether they can be, building, running."""

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
BUILD = NATIVE.parent.parent / "build"
CXX = os.environ.get("CXX", "g++")


@functools.cache
def why_not(sanitizers: str | None) -> str | None:
    """Returns why a program with these sanitizers can be neither built nor run here, or None."""
    if shutil.which(CXX.split()[0]) is None or shutil.which("make") is None:
        return f"{CXX} or make is not installed"
    probe = BUILD / f"probe_{sanitizers or 'plain'}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"-fsanitize={sanitizers}"] if sanitizers else []
    command = [*CXX.split(), *flags, "-std=c++20", "-pthread", "-x", "c++", "-", "-o", probe]
    source = "#include <bit>\nint main() { return std::popcount(0u); }\n"
    compiled = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if compiled.returncode:
        return f"{CXX} {' '.join(flags)} fails: {compiled.stderr.strip().splitlines()[-1]}"
    ran = run([probe])
    return f"a program with {flags} does not run: {ran.stderr[:200]}" if ran.returncode else None


def make(folder: Path, *arguments: str) -> None:
    """Builds with a folder's Makefile, on all cores: the longest files then wait for nobody."""
    command = ["make", "-C", folder, f"-j{os.cpu_count()}", f"CXX={CXX}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs a program; the first report of a sanitizer, which is the useful one, ends it."""
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
