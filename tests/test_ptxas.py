"""The CUDA kernels' machine code for GPUs that need not be here: no spills, the instructions meant.

For compute capability 8.0 and 9.0, which takes minutes and is slow; some files for 9.0 are always
compiled. `make ptxas` shows all.
"""

import re
import subprocess
import sys
from collections.abc import Iterator

import ptxas
import pytest

REASON = ptxas.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_disassembler = pytest.mark.skipif(
    ptxas.tool("nvdisasm") is None, reason="neither CUDA's nor Triton's nvdisasm is here"
)

# All of 512 numbers a thread are needed at the end, and there are 255 registers.
SPILLING = """
#include <cstdint>
extern "C" __global__ void __launch_bounds__(32, 1) planted(float* x) {
  float held[512];
#pragma unroll
  for (int i = 0; i < 512; ++i) held[i] = x[32 * i + threadIdx.x];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 512; ++i) sum += held[i] * x[i];
#pragma unroll
  for (int i = 0; i < 512; ++i) x[32 * i + threadIdx.x] = held[i] / sum;
}
"""


ALL = pytest.param(("*.cu", ("80", "90")), marks=pytest.mark.slow, id="all")
SOME = pytest.param(("[cm]*.cu", ("90",)), id="some")  # column_sums and masked_mlp: seconds
of_all = pytest.mark.parametrize("compiled", [ALL], indirect=True)


@pytest.fixture(scope="module", params=[SOME, ALL])
def compiled(request: pytest.FixtureRequest) -> list[ptxas.Compiled]:
    names, gpus = request.param
    return ptxas.compile_all(ptxas.KERNELS.glob(names), gpus)


def kernels(compiled: list[ptxas.Compiled], file: str = "") -> Iterator[ptxas.Kernel]:
    return (each for one in compiled if file in one.source.name for each in one.kernels)


@of_all
def test_every_kernel_is_compiled(compiled):
    text = "".join(path.read_text() for path in ptxas.KERNELS.iterdir())
    defined = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text))
    for gpu in ("80", "90"):
        names = {k.name.partition("<")[0] for k in kernels(compiled) if k.gpu == gpu}
        assert names == defined


def test_no_kernel_spills(compiled):
    faulty = {(k.name, k.gpu): found for k in kernels(compiled) if (found := ptxas.faults(k))}
    assert faulty == {} and any(kernels(compiled))


@of_all
@needs_disassembler
def test_attention_multiplies_on_tensor_cores(compiled):
    # All but the sums that backward begins with. float32 is split as it is copied, and so
    # passes through registers; 16-bit numbers are copied past them.
    found = [k for k in kernels(compiled, "ragged_attention") if "delta" not in k.name]
    without = [(k.name, k.gpu) for k in found if not (k.count("HMMA") and k.count("LDSM"))]
    assert found and without == []
    copied = [k for k in found if "<float" not in k.name]
    assert copied and [(k.name, k.gpu) for k in copied if not k.count("LDGSTS")] == []


@needs_disassembler
@pytest.mark.parametrize(
    ("compiled", "file"),
    [
        pytest.param(*SOME.values, "masked_mlp", id="some-masked_mlp"),
        pytest.param(*ALL.values, "masked_mlp", id="all-masked_mlp", marks=pytest.mark.slow),
        pytest.param(*ALL.values, "gated_layer_norm", id="all-norm", marks=pytest.mark.slow),
    ],
    indirect=["compiled"],
)
def test_aligned_rows_are_read_16_bytes_at_a_time(compiled, file):
    # The last argument of these kernels' templates says whether rows are aligned.
    aligned = [k for k in kernels(compiled, file) if k.name.endswith("true>")]
    assert aligned and [(k.name, k.gpu) for k in aligned if not k.count("LDG.E.128")] == []


def test_a_planted_spill_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "planted.cu"
    source.write_text(SPILLING)
    monkeypatch.setattr(ptxas, "KERNELS", tmp_path)
    monkeypatch.setattr(ptxas, "BUILD", tmp_path / "build")
    (one,) = ptxas.compile_all([source], ["80"])
    (kernel,) = one.kernels
    assert kernel.name == "planted" and kernel.registers == 255
    assert any(fault.startswith("spills") for fault in ptxas.faults(kernel))
    monkeypatch.setattr(sys, "argv", ["ptxas.py", "--gpus", "80"])
    assert ptxas.main() == 1


def test_the_script_runs_alone():
    command = [sys.executable, "-S", ptxas.__file__, "--only", "no such file"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "0 kernels" in done.stdout
