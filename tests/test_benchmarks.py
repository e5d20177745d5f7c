"""Every benchmark runs, on tiny shapes; where there is no GPU, kernels are interpreted."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks").glob("bench_*.py"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What a smoke run printed, and its benchmarks as pytest-benchmark wrote them."""
    path = tmp_path_factory.mktemp("benchmarks") / "smoke.json"
    before = sorted((ROOT / "benchmarks/results").glob("*"))
    command = [sys.executable, "-m", "pytest", "benchmarks", "-c", "benchmarks/pytest.ini"]
    done = subprocess.run(
        [*command, "--smoke", "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert sorted((ROOT / "benchmarks/results").glob("*")) == before
    return done.stdout, json.loads(path.read_text())["benchmarks"]


def test_nothing_is_skipped(smoke):
    last = next(line for line in reversed(smoke[0].splitlines()) if " passed" in line)
    assert "skipped" not in last and "failed" not in last


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_function_compares(smoke, path):
    names = {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("bench_")
    }
    entries: dict[str, list] = {name: [] for name in names}
    for each in smoke[1]:
        file, _, function = each["fullname"].partition("::")
        if Path(file).name == path.name:
            entries[function.partition("[")[0]].append(each["extra_info"])
    for name, found in entries.items():
        assert found, f"{path.name}: {name} recorded nothing"
        for entry in found:
            assert all(math.isfinite(us) and us > 0 for us in entry["us"].values())
            assert len(entry["us"]) + len(entry["absent"]) > 1
            assert all(entry["absent"].values()), "a contender is absent without a reason"
    assert any(entry["speedup_of_ours_over"] for found in entries.values() for entry in found)


def test_ratios_and_aims_are_printed(smoke):
    printed = smoke[0]
    assert "<- baseline" in printed
    assert "= aims =" in printed
    assert "smoke: nothing is measured and nothing written" in printed
