"""The house rules that a tool can hold: imports point down, files hold one idea."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "vitslim").rglob("*.py"))
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
KNOWN_TO_BINDINGS = ("torch", "Python", "pyb")
# Who may import whom, top to bottom; `ops` reaches the backends by name, in _dispatch alone.
LEVELS = {
    "cli": 13,
    "workflow": 12,
    "oneshot": 11,
    "planning": 10,
    "packed": 9,
    "checkpoint": 9,
    "model_card": 8,
    "description": 8,
    "parts": 7,
    "surgery": 7,
    "masks": 6,
    "calibration": 6,
    "info": 6,
    "cost": 5,
    "families": 4,
    "layers": 3,
    "ops": 2,
    "native": 1,
    "reference": 1,
    "triton_kernels": 1,
    "wrapped": 1,
    "plan": 0,
    "allowed": 0,
    "files": 0,
    "errors": 0,
}
# The same inside `workflow`; a file at its top is a room of its own.
WORKFLOW = {
    "run": 9,
    "compress": 9,
    "cut": 8,
    "run_folder": 5,
    "summary": 6,
    "retrain": 7,
    "finetune": 6,
    "search": 6,
    "latency_budget": 6,
    "stage": 5,
    "models": 5,
    "training": 4,
    "report": 4,
    "evaluate": 3,
    "classifier": 3,
    "data": 2,
    "runtime": 1,
    "latency": 1,
    "image_size": 2,
    "export": 2,
    "tune": 2,
    "options": 0,
    "aligned": 0,
}


def includes(path):
    return [line for line in path.read_text().splitlines() if "#include" in line]


def room(path):
    first = path.relative_to(ROOT / "vitslim").parts[0].removesuffix(".py")
    return "cli" if first.startswith(("cli", "__main__")) else first


def imported_rooms(path, package="vitslim"):
    """Yields the rooms of a package that a file imports."""
    depth = len(path.relative_to(ROOT / package).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == depth:
                yield from [parts[0]] if parts[0] else [alias.name for alias in node.names]
            elif node.level == 0 and parts[0] == "vitslim":
                yield from parts[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith("vitslim."))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    if path == ROOT / "vitslim/__init__.py":
        return
    own = room(path)
    for other in imported_rooms(path):
        other = "cli" if other.startswith("cli") else other
        if other in ("__version__", "_C", own):
            continue
        assert other in LEVELS, f"{path.name} imports {other}, which has no level yet"
        assert LEVELS[other] < LEVELS[own], f"{own} must not import {other}"


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "vitslim/workflow").rglob("*.py")),
    ids=lambda path: path.relative_to(ROOT / "vitslim/workflow").as_posix(),
)
def test_rooms_of_the_workflow_import_one_way(path):
    own = path.relative_to(ROOT / "vitslim/workflow").parts[0].removesuffix(".py")
    for other in imported_rooms(path, "vitslim/workflow"):
        if other != own:
            assert WORKFLOW[other] < WORKFLOW[own], f"{own} must not import {other}"


def test_one_file_chooses_backends():
    naming = [p for p in LIBRARY if '"vitslim.native"' in p.read_text()]
    assert naming == [ROOT / "vitslim/ops/_dispatch.py"]


def test_one_file_swaps_modules():
    users = {p.relative_to(ROOT).as_posix() for p in LIBRARY if "set_submodule(" in p.read_text()}
    assert users == {"vitslim/surgery/swap.py"}


def test_what_differs_between_families_stands_in_their_room():
    # Layers stand for parts of timm's; all else asks the family.
    rooms = {room(p) for p in LIBRARY if re.search(r"from timm\.models\.\w+ import", p.read_text())}
    assert rooms == {"families", "layers"}


def test_the_triton_backend_stands_alone():
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                first = node.module.split(".")[0]
                assert first in ("torch", "triton") or first in sys.stdlib_module_names


def test_no_library_file_holds_two_ideas():
    sources = [*LIBRARY, *(ROOT / "triton_kernels").glob("*.py")]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES]
    lengths = {path: len(path.read_text().splitlines()) for path in sources}
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 140


def test_kernels_know_neither_torch_nor_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in SUFFIXES and path.name != "module.cpp" and path.parent.name != "torch":
            assert not any(name in line for line in includes(path) for name in KNOWN_TO_BINDINGS)


def test_bindings_know_no_kernel():
    # They call what csrc/<op>.h declares, and leave to the kernels how it is done.
    for path in (ROOT / "csrc/torch").iterdir():
        assert not any("cpu/" in line or "cuda/" in line for line in includes(path))


def test_all_inline_assembly_of_the_gpu_has_a_name():
    # tests/native/emulated replaces these names to run the kernels on a CPU.
    for path in (ROOT / "csrc/cuda").iterdir():
        instructions = re.search(r'\basm\b[^"]*"[^"]+"', path.read_text())
        assert path.name == "ptx.cuh" or not instructions, path.name
