"""What the CUDA kernels compile to on every GPU they are for, without one: registers and spills.

    python3 tests/ptxas.py                 # all of csrc/cuda for 8.0, 8.6, 8.9 and 9.0
    python3 tests/ptxas.py --gpus 80 90    # some GPUs
    python3 tests/ptxas.py --only norm     # files with this in their name

Prints a table and exits with 1 where a kernel breaks a rule (`faults`). Compiled code is kept in
build/ptxas by what it was made of. Shared memory here is static; kernels ask for more at launch.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc/cuda"
BUILD = ROOT / "build/ptxas"
GPUS = ("80", "86", "89", "90")
FLAGS = ("-std=c++20", "-O3", "-Xptxas=-v", "-cubin")
# More instances of nvcc at once than this want more memory than a small machine has.
AT_ONCE = 2


@dataclass
class Kernel:
    """A kernel as ptxas and the disassembler describe it."""

    symbol: str
    name: str
    gpu: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, *prefixes: str) -> int:
        """Returns how many instructions begin with one of these."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))


@dataclass
class Compiled:
    """A source file for one GPU."""

    source: Path
    gpu: str
    seconds: float
    size: int
    kernels: list[Kernel]


def tool(name: str) -> str | None:
    """Returns a program of the CUDA toolkit, or the one that Triton brings, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, "bin") for home in homes if home]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    for found in [folder / name for folder in folders] + [shutil.which(name)]:
        if found and Path(found).exists():
            return str(found)
    return None


def why_not() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    nvcc = tool("nvcc")
    if nvcc is None:
        return "no nvcc found, set CUDA_HOME"
    said = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    missing = [gpu for gpu in GPUS if f"sm_{gpu}" not in said.stdout]
    return f"{nvcc} knows no sm_{missing[0]}" if missing else None


def compile_all(sources: Iterable[Path], gpus: Iterable[str]) -> list[Compiled]:
    """Compiles every source for every GPU, some at a time, those that take longest first."""
    work = [(source, gpu) for source in sources for gpu in gpus]
    work.sort(key=lambda each: -each[0].stat().st_size)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(lambda each: compile_one(*each), work))
    return sorted(done, key=lambda each: (each.source.name, each.gpu))


def compile_one(source: Path, gpu: str) -> Compiled:
    """Compiles a source for a GPU, if its text or its headers changed, and reads the result."""
    nvcc = tool("nvcc")
    assert nvcc is not None
    path = BUILD / f"{source.stem}.sm_{gpu}.{_fingerprint(source, nvcc)}.cubin"
    log = path.with_suffix(".json")
    if not log.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{source.stem}.sm_{gpu}.*"):
            old.unlink()
        start = time.monotonic()
        unfinished = path.with_suffix(".unfinished")
        command = [nvcc, *FLAGS, f"-arch=sm_{gpu}", str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{source.name} for sm_{gpu}: nvcc fails\n{done.stderr[-4000:]}")
        unfinished.rename(path)
        log.write_text(json.dumps({"seconds": time.monotonic() - start, "said": done.stderr}))
    facts = json.loads(log.read_text())
    kernels = _kernels(facts["said"], gpu)
    for symbol, instructions in _instructions(path).items():
        for kernel in kernels:
            if kernel.symbol == symbol:
                kernel.instructions = instructions
    return Compiled(source, gpu, facts["seconds"], path.stat().st_size, kernels)


def _fingerprint(source: Path, nvcc: str) -> str:
    """A name for all that the compiler reads, beside its own headers."""
    digest = hashlib.sha256(repr((FLAGS, _version(nvcc))).encode())
    for path in sorted(_included(source, set())):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _included(path: Path, known: set[Path]) -> set[Path]:
    """Returns a file and all of ours that it includes."""
    path = path.resolve()
    if path not in known and path.exists():
        known.add(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            _included(path.parent / name, known)
    return known


@functools.cache
def _version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _kernels(said: str, gpu: str) -> list[Kernel]:
    """Reads what ptxas -v says: a paragraph for each kernel, and for functions that they call."""
    found = []
    for paragraph in said.split("Compiling entry function ")[1:]:
        symbol = re.match(r"'(\w+)'", paragraph)[1]

        def number(pattern: str, text: str = paragraph) -> int:
            return sum(int(each) for each in re.findall(pattern, text))

        found.append(
            Kernel(
                symbol,
                _readable(symbol),
                gpu,
                registers=number(r"Used (\d+) registers"),
                stack=number(r"(\d+) bytes stack frame"),
                spill_stores=number(r"(\d+) bytes spill stores"),
                spill_loads=number(r"(\d+) bytes spill loads"),
                shared=number(r"(\d+) bytes smem"),
            )
        )
    return sorted(found, key=lambda kernel: kernel.name)


def _readable(symbol: str) -> str:
    """Returns a kernel's name with its template arguments, as its source spells them."""
    filter_name = shutil.which("c++filt") or tool("cu++filt")
    if filter_name is None:
        return symbol
    name = subprocess.run([filter_name, symbol], capture_output=True, text=True).stdout.strip()
    # Without the return type and the parameters.
    name = re.sub(r"\((?:anonymous namespace|int|bool)\)(?:::)?", "", name)
    name = re.sub(r"vitslim::|^void |unsigned ", "", name)
    return name[: _end_of_name(name)]


def _end_of_name(name: str) -> int:
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return i
    return len(name)


def _instructions(cubin: Path) -> dict[str, Counter[str]]:
    """Counts each kernel's instructions; nothing where there is no disassembler."""
    disassembler = tool("nvdisasm")
    if disassembler is None:
        return {}
    command = [disassembler, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", re.MULTILINE)
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+).*$", text, flags=re.MULTILINE)
    return {
        symbol: Counter(pattern.findall(body))
        for symbol, body in zip(sections[1::2], sections[2::2], strict=True)
    }


def faults(kernel: Kernel) -> list[str]:
    """Returns which rules a kernel breaks."""
    found = []
    if kernel.spill_stores or kernel.spill_loads:
        found.append(f"spills {kernel.spill_stores} and {kernel.spill_loads} bytes")
    if kernel.stack or kernel.count("STL", "LDL"):
        found.append(f"has {kernel.stack} bytes of stack, {kernel.count('STL', 'LDL')} accesses")
    if kernel.shared:
        found.append(f"has {kernel.shared} bytes of static shared memory, unknown to its launcher")
    return found


def print_table(compiled: list[Compiled]) -> None:
    """Prints the kernels file by file, with their faults."""
    columns = ("sm", "registers", "stores", "loads", "stack", "shared", "hmma")
    for source in dict.fromkeys(each.source for each in compiled):
        files = [each for each in compiled if each.source == source]
        cost = ", ".join(f"sm_{f.gpu} {f.seconds:.0f} s {f.size / 1000:.0f} kB" for f in files)
        print(f"\n{source.name}: {cost}")
        rows = [kernel for file in files for kernel in file.kernels]
        if rows:
            print(" ".join(f"{title:>9}" for title in columns))
        for each in sorted(rows, key=lambda kernel: (kernel.name, kernel.gpu)):
            cells = (each.gpu, each.registers, each.spill_stores, each.spill_loads)
            cells += (each.stack, each.shared)
            cells += (each.count("HMMA") if each.instructions else "-",)
            print(" ".join(f"{cell:>9}" for cell in cells), f" {each.name}")
            for fault in faults(each):
                print(f"{'':>9} ! {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", nargs="*", default=GPUS, help=f"of {', '.join(GPUS)}")
    parser.add_argument("--only", default="", help="what a file's name has in it")
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"ptxas: {reason}", file=sys.stderr)
        return 1
    sources = [path for path in KERNELS.glob("*.cu") if arguments.only in path.name]
    compiled = compile_all(sources, arguments.gpus)
    print_table(compiled)
    kernels = [kernel for file in compiled for kernel in file.kernels]
    faulty = [kernel for kernel in kernels if faults(kernel)]
    spent = sum(file.seconds for file in compiled)
    print(f"\n{len(kernels)} kernels, compiled in {spent:.0f} s of nvcc, {len(faulty)} faulty")
    return int(bool(faulty) or not kernels)


if __name__ == "__main__":
    sys.exit(main())
