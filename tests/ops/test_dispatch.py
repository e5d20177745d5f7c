"""Who runs an op: automatic by device and dtype, forced by the user, refused with a reason."""

import os
import subprocess
import sys

import pytest
import torch

from vitslim.errors import VitslimError
from vitslim.ops import ragged_attention, use_backend, why_not
from vitslim.ops._dispatch import OPS, PACKED_OPS, find

NO_GPU = "native needs an NVIDIA GPU, and torch sees none"


def test_the_reference_runs_everything():
    for op in OPS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert why_not("reference", op, "cpu", dtype) is None


def test_float64_goes_to_the_reference():
    assert find("ragged_attention", "cpu", torch.float64).__name__ == "vitslim.reference"


def test_native_is_chosen_where_it_can_run():
    reason = why_not("native", "ragged_attention", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    assert find("ragged_attention", "cpu", torch.float32).__name__ == "vitslim.native"


def test_why_not_gives_the_reason():
    reason = why_not("native", "ragged_attention", "cpu", torch.float64)
    assert "native" in reason
    if torch.cuda.is_available():
        reason = why_not("triton", "masked_mlp", "cpu", torch.float32)
        assert reason == "triton runs on cuda, not on cpu"
    with pytest.raises(ValueError, match="no backend is called 'cuda'"):
        why_not("cuda", "masked_mlp", "cpu", torch.float32)


def test_forced_backend_raises_instead_of_giving_way():
    qkv = torch.randn(1, 4, 12, dtype=torch.float64)
    with use_backend("native", "ragged_attention"), pytest.raises(RuntimeError, match="cannot run"):
        ragged_attention(qkv, (4,), 0.5)
    assert ragged_attention(qkv, (4,), 0.5).shape == (1, 4, 4)


def test_what_is_raised_is_for_users_and_a_runtime_error():
    with use_backend("native", "masked_mlp"), pytest.raises(VitslimError) as raised:
        find("masked_mlp", "cpu", torch.float64)
    assert isinstance(raised.value, RuntimeError)


@pytest.mark.parametrize("op", PACKED_OPS)
def test_packed_ops_run_natively_on_the_cpu_in_float32_alone(op):
    reason = why_not("native", op, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    assert why_not("native", op, "cpu", torch.bfloat16) == "native takes float32, not bfloat16"
    assert why_not("native", op, "cuda", torch.float32) == f"native runs {op} on cpu, not on cuda"
    assert find(op, "cpu", torch.float32).__name__ == "vitslim.native"
    assert find(op, "cpu", torch.float64).__name__ == "vitslim.reference"


@pytest.mark.parametrize("op", ["masked_mlp", "gated_layer_norm"])
def test_these_run_natively_on_gpus_alone(op):
    if why_not("native", "ragged_attention", "cpu", torch.float32) is not None:
        pytest.skip("native is not built")
    assert why_not("native", op, "cpu", torch.float32) == f"native runs {op} on cuda, not on cpu"
    assert find(op, "cpu", torch.float32).__name__ == "vitslim.reference"
    if not torch.cuda.is_available():
        reason = why_not("native", op, "cuda", torch.float32)
        assert reason in ("native is built without CUDA", NO_GPU)


def test_use_backend_restores_what_was_there_before():
    use_backend("reference")
    try:
        with (
            use_backend(None, "ragged_attention"),
            use_backend("native", "masked_mlp"),
            pytest.raises(RuntimeError, match="masked_mlp: backend 'native'"),
        ):
            find("masked_mlp", "cpu", torch.float64)
        assert find("masked_mlp", "cpu", torch.float32).__name__ == "vitslim.reference"
        assert find("ragged_attention", "cpu", torch.float32).__name__ == "vitslim.reference"
    finally:
        use_backend(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_says_so_unless_it_is_interpreted():
    pytest.importorskip("triton")
    code = (
        "import torch; from vitslim.ops import why_not;"
        "print(why_not('triton', 'masked_mlp', 'cpu', torch.float32))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "triton needs a GPU and torch sees none"
    # conftest.py has asked for it in this process.
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert why_not("triton", "masked_mlp", "cpu", torch.float32) is None


@pytest.mark.parametrize(
    ("value", "said"), [("reference", "vitslim.reference"), ("fastest", "no backend is called")]
)
def test_environment_forces_a_backend(value, said):
    code = (
        "import torch; from vitslim.ops._dispatch import find;"
        "print(find('ragged_attention', 'cpu', torch.float32).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VITSLIM_BACKEND": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in done.stdout + done.stderr
