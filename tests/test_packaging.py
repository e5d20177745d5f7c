"""The wheel: its top level is exactly `vitslim`, and it holds what an installed user needs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import vitslim

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the sources alone, built without a compiler, as on a machine that has none."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "-v", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-deps", "-w", str(folder)],
        cwd=ROOT,
        env=os.environ | {"CXX": "/nonexistent/g++", "VITSLIM_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path, done.stdout + done.stderr


def names(wheel):
    with zipfile.ZipFile(wheel[0]) as archive:
        return archive.namelist()


def test_top_level_is_exactly_vitslim(wheel):
    top = {name.split("/")[0] for name in names(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vitslim"}


def test_the_rooms_are_in_it(wheel):
    there = set(names(wheel))
    for suffix in ("py", "html", "yaml"):
        for path in (ROOT / "vitslim").rglob(f"*.{suffix}"):
            assert path.relative_to(ROOT).as_posix() in there
    assert "vitslim/recipes/deit_small.yaml" in there
    assert "vitslim/triton_kernels/__init__.py" in there
    assert not any(name.startswith(("tests", "benchmarks")) for name in there)


def test_without_a_compiler_it_installs_and_says_so(wheel):
    said = [line for line in wheel[1].splitlines() if "vitslim: " in line]
    assert any("no native kernels: /nonexistent/g++ does not run" in line for line in said)


def test_the_bare_name_of_the_triton_folder_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "import vitslim.triton_kernels" in done.stderr
    import vitslim.triton_kernels as backend

    assert torch.float32 in backend.DTYPES


def test_one_version_number():
    assert f'version = "{vitslim.__version__}"' in (ROOT / "pyproject.toml").read_text()
