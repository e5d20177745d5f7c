"""Every benchmark runs, on tiny shapes; where there is no GPU, kernels are interpreted."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

import vitslim
from vitslim.plan import BlockPlan, Plan

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks").glob("bench_*.py"))


# Kernels for GPUs, interpreted, are slow.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.slow)]
on_the_cpu = pytest.mark.parametrize("smoke", ["cpu"], indirect=True)


@pytest.fixture(scope="module", params=DEVICES)
def smoke(request, tmp_path_factory):
    """What a smoke run printed, and its benchmarks as pytest-benchmark wrote them."""
    chosen = ["-k", "cuda" if request.param == "cuda" else "not cuda"]
    path = tmp_path_factory.mktemp("benchmarks") / "smoke.json"
    before = sorted((ROOT / "benchmarks/results").glob("*"))
    command = [sys.executable, "-m", "pytest", "benchmarks", "-c", "benchmarks/pytest.ini"]
    done = subprocess.run(
        [*command, *chosen, "--smoke", "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}"],
        cwd=ROOT,
        # pytest-benchmark measures nothing where it takes itself for one of pytest-xdist's workers.
        env={name: value for name, value in os.environ.items() if "XDIST" not in name},
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


@pytest.mark.parametrize(
    ("smoke", "path"),
    [
        pytest.param("cuda", path, id=path.stem, marks=pytest.mark.slow)
        if path.stem.endswith("_cuda")
        else pytest.param("cpu", path, id=path.stem)
        for path in FILES
    ],
    indirect=["smoke"],
)
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


@pytest.fixture(scope="module")
def results(smoke, tmp_path_factory):
    """The smoke run's entries in a file, as a run that measures leaves them."""
    path = tmp_path_factory.mktemp("results") / "machine.json"
    entries = {each["extra_info"]["name"]: each["extra_info"] for each in smoke[1]}
    path.write_text(json.dumps(entries))
    return path


def run(script, path):
    """Returns what a script prints about a file of results."""
    command = [sys.executable, f"benchmarks/{script}", path]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@on_the_cpu
def test_tables_hold_every_ratio_of_the_packed_encoder(smoke, results):
    printed = run("tables.py", results)
    assert printed == results.with_name("machine-vit_encoder.md").read_text()
    for each in smoke[1]:
        entry = each["extra_info"]
        kind = re.match("vit_encoder (slim|dense) ", entry["name"])
        if not kind:
            continue
        title = f"**{kind[1].capitalize()}**"
        row = re.search(rf"{re.escape(title)}.*?(\| DeiT-T, .*?)\n", printed, re.DOTALL)[1]
        for name in ("timm dense", "timm dense, torch.compile"):
            assert f" {entry['us'][name] / entry['us']['packed']:.2f} " in row
        missed = [aim for aim in entry["aims"] if aim["met"] is False]
        assert all(f"{entry['name'][12:]}: {aim['aim']}" in printed for aim in missed)


@on_the_cpu
def test_plots_are_drawn_and_small(results):
    run("plots.py", results)
    drawn = sorted(results.parent.glob("*.png"))
    assert [path.stem for path in drawn] == [
        "machine-vit_encoder-batch-size",
        "machine-vit_encoder-tokens",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert all(10_000 < path.stat().st_size < 150_000 for path in drawn)


@pytest.mark.parametrize("form", ["padded", "looped", "grouped"])
def test_forms_for_other_runtimes_compute_the_slim_model(form, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import runtimes

    model = timm.create_model("deit_tiny_patch16_224", depth=3, img_size=32).eval()
    heads = [[24, 40, 0], [17, 17, 33], [64, 1, 50]]
    blocks = [BlockPlan([list(range(n)) for n in widths], list(range(40))) for widths in heads]
    slim = vitslim.slim(model, Plan({}, {}, {}, 1, blocks))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        written = runtimes.in_form(slim, form)
        assert_close(written(images), slim(images), rtol=1e-4, atol=1e-5)
    widths = {group for block in written.blocks for group in block.attn.groups}
    assert (
        widths
        == {
            "padded": {(2, 40), (3, 33), (3, 64)},
            "looped": {(1, n) for block in heads for n in block if n},
            "grouped": {(1, 32), (1, 48), (2, 32), (2, 64), (1, 16)},
        }[form]
    )


def test_a_runtime_that_is_not_installed_is_absent_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import runtimes
    from harness import Absent

    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    found = runtimes.contenders(None, "none", ["padded"], tmp_path, None, 1)
    assert set(found) == {"ONNX Runtime", "OpenVINO"}
    for each in found.values():
        assert isinstance(each, Absent) and "not installed" in each.reason


@on_the_cpu
def test_ratios_and_aims_are_printed(smoke):
    printed = smoke[0]
    assert "<- baseline" in printed
    assert "= aims =" in printed
    assert "smoke: nothing is measured and nothing written" in printed
