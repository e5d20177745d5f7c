"""Builds the native backend, ``vitslim._C``, and says in one line what it built and what not.

A machine without CUDA, without Triton or even without a C++ compiler gets a working package all the
same. Everything else about the package stands in pyproject.toml.

Environment:
    VITSLIM_CUDA: ``0`` leaves CUDA out, ``1`` fails where it cannot be built, ``auto`` (default)
        builds it where nvcc is found.
    VITSLIM_SANITIZE: for developers, e.g. ``address,undefined``: builds with these sanitizers.
    TORCH_CUDA_ARCH_LIST: the GPUs to build for, ``8.0 9.0+PTX`` or ``8.0;9.0+PTX``; what lies
        below 8.0 is passed over. Default: 8.0, 8.6, 8.9, 9.0 and, by PTX, all later ones.
    MAX_JOBS, CUDA_HOME: torch's own.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Every torch from 2.11 on can load what is built against this version of its stable interface.
STABLE_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"
ARCHITECTURES = "8.0 8.6 8.9 9.0+PTX"
# Torch's names for architectures, as far as the kernels run there.
NAMED_ARCHITECTURES = {
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
}


def found(pattern: str) -> list[str]:
    """The files of the tree that match, relative to it as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def megabytes(path: Path) -> float:
    """The size of a file."""
    return path.stat().st_size / 1e6


def report(line: str) -> None:
    """Says the one line on standard error; pip shows it with -v."""
    print(f"vitslim: {line}", file=sys.stderr, flush=True)


def compiler_problem() -> str | None:
    """Compiles a file of C++20, and returns why that failed."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "no C++ compiler found"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "check.cpp")
        source.write_text("#include <bit>\nint main() { return std::popcount(0u); }\n")
        command = [*compiler.split(), "-std=c++20", str(source), "-o", str(Path(folder, "check"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{compiler} does not run: {error}"
    return None if result.returncode == 0 else f"{compiler} cannot compile C++20"


def missing_module() -> str | None:
    """Names what the build needs and a build without isolation does not see."""
    missing = [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed here" if missing else None


def cuda_home() -> str | None:
    """Finds a complete CUDA toolkit; torch's own guess is wrong where nvcc is a wrapper."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    for home in filter(None, homes):
        if Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            return home
    return None


def cuda_architectures() -> list[str]:
    """The architectures to build for, as "9.0" or, with PTX for later ones too, "9.0+PTX"."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    names = [NAMED_ARCHITECTURES.get(name, name) for name in re.split(r"[\s;]+", wish)]
    wanted: list[str] = []
    for name in " ".join(names).split():
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if match is None:
            raise SystemExit(
                f"vitslim: TORCH_CUDA_ARCH_LIST has {name!r}, which is no architecture;"
                " write for example '8.0 9.0+PTX'."
            )
        # Before 8.0 tensor cores have no bfloat16, and shared memory no asynchronous copies.
        if float(match[1]) >= 8.0:
            # Without the letter: no kernel uses what one GPU alone has.
            wanted.append(match[1] + (match[2] or ""))
    return list(dict.fromkeys(wanted))


def gencode(architectures: list[str]) -> list[str]:
    """The flags of nvcc; given explicitly, they also stop torch from asking for a GPU."""
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if name.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def cuda_plan() -> tuple[str | None, str]:
    """Returns the toolkit to build with, or None and the reason."""
    wish = os.environ.get("VITSLIM_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"vitslim: VITSLIM_CUDA is {wish!r}, but must be 0, 1 or auto.")
    home = cuda_home()
    if wish == "0":
        reason = "VITSLIM_CUDA=0"
    elif not found("csrc/cuda/*.cu"):
        reason = "csrc/cuda has no sources"
    elif home is None:
        reason = "no nvcc found, set CUDA_HOME"
    elif not cuda_architectures():
        reason = "TORCH_CUDA_ARCH_LIST has nothing from 8.0 on"
    else:
        return home, ""
    if wish == "1":
        raise SystemExit(f"vitslim: VITSLIM_CUDA=1, but {reason}.")
    return None, reason


def sources(with_cuda: bool) -> list[str]:
    """The files to compile; those named _cuda.cpp bind kernels that are in csrc/cuda."""
    files = ["csrc/module.cpp", *found("csrc/torch/*.cpp"), *found("csrc/cpu/*.cpp")]
    if with_cuda:
        return files + found("csrc/cuda/*.cu")
    return [path for path in files if not path.endswith("_cuda.cpp")]


def native_extension():
    """The extension module and the line that describes it."""
    import pybind11
    from torch.utils import cpp_extension

    home, no_cuda = cuda_plan()
    cpp_extension.CUDA_HOME = home
    sanitize = os.environ.get("VITSLIM_SANITIZE", "")
    architectures = cuda_architectures() if home else []
    defines = [STABLE_TORCH]
    if home:
        defines += ["-DVITSLIM_CUDA", "-DUSE_CUDA"]
        defines.append(f'-DVITSLIM_CUDA_ARCHITECTURES="{",".join(architectures)}"')
    cxx = ["-O3", "-g0"]
    if sanitize:
        cxx = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"]
        defines.append(f'-DVITSLIM_SANITIZE="{sanitize}"')
    # No contraction: whether a product and a sum become one operation is the kernel's decision, or
    # one template's results would differ from another's by a bit.
    cxx += ["-ffp-contract=off"]
    # -Wno-psabi: vectors are passed between inlined functions only, so their ABI does not matter.
    cxx += ["-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", *defines]
    # Several files are compiled at once; cores that are left take a file's architectures.
    threads = max(1, (os.cpu_count() or 1) // max(1, len(found("csrc/cuda/*.cu"))))
    nvcc = ["-O3", *gencode(architectures), f"--threads={threads}"]
    # Compressed, machine code takes a third of the space.
    nvcc += ["-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all", STABLE_TORCH]
    extension = cpp_extension.CppExtension(
        "vitslim._C",
        sources(with_cuda=home is not None),
        # pip's pybind11 goes before torch's: the copy in torch 2.11 refuses the stable interface.
        include_dirs=[pybind11.get_include()] + ([f"{home}/include"] if home else []),
        library_dirs=[f"{home}/lib64", f"{home}/lib"] if home else [],
        libraries=["cudart_static", "rt", "dl", "pthread"] if home else [],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=[f"-fsanitize={sanitize}"] if sanitize else [],
        depends=[*found("csrc/**/*.h"), *found("csrc/cuda/*.cuh")],
    )
    # The stable interface does without torch's Python library, which changes with every release.
    extension.libraries = [name for name in extension.libraries if name != "torch_python"]
    line = "native CPU kernels (AVX-512 with bfloat16 and AMX, AVX2, portable)"
    line += f", sanitizers {sanitize}" if sanitize else ""
    cuda = f"CUDA kernels by {home} for {' '.join(architectures)}"
    line += f"; {cuda}" if home else f"; no CUDA: {no_cuda}"
    return extension, cpp_extension.BuildExtension, line


def build() -> None:
    """Runs setuptools with the extension, or without it and with the reason."""
    if problem := compiler_problem() or missing_module():

        class CopyAndReport(build_py):
            """Says what was not built, where the extension would have said that it was."""

            def run(self) -> None:
                super().run()
                report(f"no native kernels: {problem}; PyTorch and Triton backends only")

        setup(cmdclass={"build_py": CopyAndReport})
        return
    extension, build_extension, line = native_extension()

    class BuildAndReport(build_extension):
        """Says what was built when it is built."""

        def run(self) -> None:
            start = time.monotonic()
            super().run()
            kernels = sum(megabytes(path) for path in Path(self.build_temp).rglob("cuda/*.o"))
            size = megabytes(Path(self.get_ext_fullpath(extension.name)))
            report(
                line
                + (f" ({kernels:.1f} MB)" if kernels else "")
                + f"; built in {time.monotonic() - start:.0f} s, {size:.1f} MB"
            )

    setup(ext_modules=[extension], cmdclass={"build_ext": BuildAndReport})


build()
