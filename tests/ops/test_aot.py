"""The Triton kernels' machine code, compiled here for GPUs that need not be here.

A selection: DeiT-S in float32 and bfloat16, on GPUs of compute capability 8.0 and 9.0, which is
slow; one launch of each kernel on 9.0 is always compiled. `make aot` shows all.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent.parent
KERNELS = TESTS.parent / "triton_kernels"


def run(script, *args):
    # The suite may run Triton's interpreter, which compiles nothing and is chosen for a process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / script), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def rows(request):
    return run("aot.py", "--json", *(["--some"] if request.param == "some" else []))


@pytest.fixture(scope="module")
def planted():
    return run("aot_planted.py")


def named(rows):
    return {(row["kernel"], row["gpu"], row["cases"][0]): row for row in rows}


def test_every_kernel_is_compiled(rows):
    defined = set()
    for path in KERNELS.glob("*.py"):
        defined |= set(re.findall(r"^def _(\w+)_kernel\(", path.read_text(), re.MULTILINE))
    for gpu in ("sm80", "sm90") if "sm80" in {row["gpu"] for row in rows} else ("sm90",):
        assert {row["kernel"] for row in rows if row["gpu"] == gpu} == defined


def test_kernels_keep_the_rules(rows):
    # No spills; shared memory for one program; tensor cores where there are products; and loads of
    # 16 bytes where rows are aligned.
    faulty = {name: row["faults"] for name, row in named(rows).items() if row["faults"]}
    assert faulty == {}


def test_half_precision_products_are_warp_group_products_on_hopper(rows):
    products = [row for row in rows if row["gpu"] == "sm90" and row["products"]]
    without = [name for name, row in named(products).items() if "bf16" in row["dtypes"]]
    without = [name for name in without if not named(products)[name]["hgmma"]]
    assert without == []


def test_a_kernel_without_fault_has_none(planted):
    assert planted["nothing"]["faults"] == []
    assert planted["nothing"]["loads"] == {"16": 2}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("spills", "spills"),
        ("narrow", "0% of the bytes come in 16-byte loads"),
        ("scalar", "no tensor-core instructions"),
        ("shared", "bytes of shared memory"),
    ],
)
def test_a_planted_fault_is_seen(name, fault, planted):
    assert len(planted[name]["faults"]) == 1
    assert fault in planted[name]["faults"][0]
