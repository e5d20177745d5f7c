"""Compiles the Triton backend's kernels ahead of time, for GPUs that need not be there.

    python tests/aot.py [--all | --some] [--only WORD ...] [--json]

The backend's functions run on meta tensors for the models that matter, and every launch is recorded
as Triton's own launch path would compile it. Each is then compiled for its target and its machine
code is read: registers, spills, shared memory, tensor-core instructions, width of the loads.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import triton
from aot_cases import Case, cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# The backend refuses to be imported where there is no GPU.
with (
    mock.patch("torch.cuda.is_available", return_value=True),
    mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
):
    from vitslim import triton_kernels

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Gpu:
    """What a generation of GPU has: its target, and per multiprocessor what limits programs."""

    target: GPUTarget
    threads: int
    shared: int
    programs: int


GPUS = {
    "sm80": Gpu(GPUTarget("cuda", 80, 32), 2048, 164 * 1024, 32),
    "sm86": Gpu(GPUTarget("cuda", 86, 32), 1536, 100 * 1024, 16),
    "sm90": Gpu(GPUTarget("cuda", 90, 32), 2048, 228 * 1024, 32),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 2048, 64 * 1024, 32),
}


@dataclass
class Launch:
    """A kernel as a launcher wants it compiled, and the cases that want it so."""

    kernel: JITFunction
    generation: str
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]
    cases: list[Case] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def key(self) -> str:
        parts = (self.signature, self.constexprs, sorted(self.attrs.items()), self.options)
        return f"{self.name} {self.generation} {parts}"

    @property
    def constants(self) -> dict[str, Any]:
        """The constexprs by name, without the arguments that are None."""
        names = list(self.signature)
        named = {names[path[0]]: value for path, value in self.constexprs.items()}
        return {name: value for name, value in named.items() if value is not None}


def record(generations: Iterable[str], wanted: Iterable[Case]) -> list[Launch]:
    """Returns every different launch of some cases on some GPUs, without compiling any."""
    found: dict[str, Launch] = {}
    wanted = list(wanted)
    for generation in generations:
        for case in wanted:
            with _pretend(generation, found, case):
                case.run(triton_kernels)
    return list(found.values())


@contextmanager
def _pretend(generation: str, found: dict[str, Launch], case: Case) -> Iterator[None]:
    """Makes launches end where they would be compiled, on a GPU of the generation."""
    target = GPUS[generation].target

    def note(self, _key, signature, _device, constexprs, options, attrs, _warmup):
        launch = Launch(self, generation, signature, constexprs, attrs, options.__dict__)
        found.setdefault(launch.key, launch).cases.append(case)

    device = list(GPUS).index(generation)  # of which a kernel remembers its target
    stub = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda _device: 0,
        get_current_target=lambda: target,
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", stub))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", note))
        stack.enter_context(
            mock.patch("torch.version.hip", "6" if target.backend == "hip" else None)
        )
        for name, module in list(sys.modules.items()):
            # A launcher may hold the function under a name of its own.
            if name.startswith(triton_kernels.__name__) and hasattr(module, "generation"):
                stack.enter_context(mock.patch.object(module, "generation", lambda _: generation))
        yield


def measure(launch: Launch) -> dict[str, Any]:
    """Compiles a launch and returns what its machine code is like."""
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    row: dict[str, Any] = {
        "kernel": launch.name,
        "gpu": launch.generation,
        "constants": launch.constants,
        "dtypes": [each[1:] for each in launch.signature.values() if each.startswith("*")],
        "warps": launch.options["num_warps"],
        "stages": launch.options["num_stages"],
        "cases": [case.name for case in launch.cases],
        "aligned": all(case.aligned for case in launch.cases),
    }
    gpu = GPUS[launch.generation]
    try:
        compiled = triton.compile(source, target=gpu.target, options=launch.options)
    except Exception as error:
        text = str(error).strip().splitlines()
        return row | {"error": f"{type(error).__name__}: {text[-1] if text else ''}"}
    row["shared"] = compiled.metadata.shared
    row["products"] = compiled.asm["ttir"].count("tt.dot")
    read = _read_cubin if gpu.target.backend == "cuda" else _read_amdgcn
    row |= read(compiled.asm)
    row["wide"] = _wide(row["loads"], row["dtypes"])
    row["programs"] = _resident_programs(gpu, row)
    row["occupancy"] = row["programs"] * row["warps"] * gpu.target.warp_size / gpu.threads
    return row


def _read_cubin(asm: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [BINARIES / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    counts = Counter(re.findall(r"^\s*/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE))

    def count(*prefixes: str) -> int:
        return sum(n for name, n in counts.items() if name.split(".")[0] in prefixes)

    loads = Counter()
    for name, n in counts.items():
        if name.split(".")[0] in ("LDG", "LDGSTS"):
            loads[_bytes(name)] += n
    bulk = count("UTMALDG", "UBLKCP")
    return {
        "registers": registers,
        "stack": stack,
        "spills": count("STL", "LDL"),
        "hmma": count("HMMA"),
        "hgmma": count("HGMMA"),
        "ffma": count("FFMA"),
        "async": count("LDGSTS") + bulk,
        "loads": {str(size): n for size, n in sorted(loads.items())},
    }


def _bytes(instruction: str) -> int:
    """Returns how much one lane's load moves; without a suffix, a register."""
    parts = instruction.split(".")
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((narrow[part] for part in parts[1:] if part in narrow), 4)


def _read_amdgcn(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    loads = Counter()
    for kind, n in Counter(re.findall(r"(?:global|buffer)_load_(\w+)", text)).items():
        size = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}.get(kind.split("_")[0], 2)
        loads[size] += n
    return {
        "registers": number("vgpr_count"),  # with the accumulation registers
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "hmma": text.count("v_mfma"),
        "hgmma": 0,
        "ffma": len(re.findall(r"v_(?:pk_)?fma", text)),
        "async": len(re.findall(r"load_lds", text)),
        "loads": {str(size): n for size, n in sorted(loads.items())},
    }


def _wide(loads: dict[str, int], dtypes: list[str]) -> float:
    """Returns which part of the rows' bytes comes in 16-byte loads, each load counted once."""
    half = {"fp16", "bf16"} & set(dtypes)
    # Masks and statistics are float32 and narrow by nature; beside rows in half precision their
    # size tells them apart.
    moved = {size: int(size) * n for size, n in loads.items() if not (half and size == "4")}
    return moved.get("16", 0) / sum(moved.values()) if moved else 1.0


def _resident_programs(gpu: Gpu, row: dict[str, Any]) -> int:
    """Returns how many programs a multiprocessor holds at once."""
    warps = row["warps"]
    if gpu.target.backend == "hip":
        # Four SIMDs of 512 registers a lane and 8 waves each.
        waves = 4 * min(8, 512 // max(8, -(-row["registers"] // 8) * 8))
        limits = [waves // warps, gpu.shared // max(row["shared"], 1)]
    else:
        per_warp = -(-row["registers"] * 32 // 256) * 256  # as they are handed out
        reserved = 1024  # of shared memory, for every program
        limits = [65536 // per_warp // warps, gpu.shared // (row["shared"] + reserved)]
    return min(*limits, gpu.threads // (warps * gpu.target.warp_size), gpu.programs)


def faults(row: dict[str, Any]) -> list[str]:
    """Returns which of the rules a compiled kernel breaks."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"spills ({row['spills']} accesses, {row['stack']} bytes)")
    if row["shared"] > triton_kernels.configs.SHARED_MEMORY[row["gpu"]]:
        found.append(f"{row['shared']} bytes of shared memory")
    if row["products"] and not row["hmma"] + row["hgmma"]:
        found.append("no tensor-core instructions")
    if row["aligned"] and row["wide"] < 0.4:
        found.append(f"{row['wide']:.0%} of the bytes come in 16-byte loads")
    return found


def measure_all(launches: Sequence[Launch], workers: int = 2) -> list[dict[str, Any]]:
    """Measures launches in processes that inherit them."""
    global _inherited
    _inherited = launches
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return list(pool.imap(_measure_inherited, range(len(launches)), chunksize=1))


_inherited: Sequence[Launch] = ()


def _measure_inherited(index: int) -> dict[str, Any]:
    return measure(_inherited[index])


_COLUMNS = (
    ("gpu", "gpu"),
    ("warps", "warps"),
    ("stages", "stages"),
    ("registers", "regs"),
    ("spills", "spills"),
    ("shared", "shared"),
    ("programs", "resident"),
    ("occupancy", "warps/max"),
    ("hmma", "hmma"),
    ("hgmma", "hgmma"),
    ("ffma", "ffma"),
    ("async", "async"),
    ("wide", "16-byte"),
)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows kernel by kernel, each with the first case that asks for it."""
    kernels = sorted({row["kernel"] for row in rows})
    for kernel in kernels:
        print(f"\n{kernel}")
        print(" ".join(f"{title:>9}" for _, title in _COLUMNS) + "  constants; first case")
        for row in sorted(
            (row for row in rows if row["kernel"] == kernel),
            key=lambda row: (row["gpu"], row["cases"][0]),
        ):
            cells = [row.get(key, "-") for key, _ in _COLUMNS]
            shown = [f"{cell:.0%}" if isinstance(cell, float) else str(cell) for cell in cells]
            constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
            print(" ".join(f"{cell:>9}" for cell in shown), f" {constants}; {row['cases'][0]}")
            for fault in faults(row):
                print(f"{'':>9} ! {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every model and GPU, not a selection")
    parser.add_argument("--some", action="store_true", help="one launch of each kernel on sm90")
    parser.add_argument("--only", nargs="*", default=[], help="words that name kernel or GPU")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    args = parser.parse_args()
    wanted = [case for case in cases(args.all) if case.exists_in(triton_kernels)]
    launches = record(GPUS if args.all else ("sm80", "sm90"), wanted)
    launches = [
        launch
        for launch in launches
        if all(word in f"{launch.name} {launch.generation}" for word in args.only)
    ]
    if args.some:
        # Masks come last, and half precision.
        last = {launch.name: launch for launch in launches if launch.generation == "sm90"}
        launches = list(last.values())
    rows = measure_all(launches)
    broken = [row for row in rows if faults(row)]
    if args.json:
        json.dump([row | {"faults": faults(row)} for row in rows], sys.stdout, default=str)
    else:
        print_table(rows)
        print(
            f"\n{len(rows)} kernels compiled by Triton {triton.__version__}, {len(broken)} faulty"
        )
    return int(bool(broken) and not args.json)


if __name__ == "__main__":
    sys.exit(main())
