"""The native kernels: every instruction set, any number of threads, two Python threads at once."""

import threading

import pytest
import torch
from accuracy import assert_within_budget
from test_ragged_attention import SCALE, SHAPES, eager, gradients, make

from vitslim.ops import ragged_attention, use_backend, why_not

REASON = why_not("native", "ragged_attention", "cpu", torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def native():
    with use_backend("native", "ragged_attention"):
        yield


@pytest.fixture(params=["avx512-bf16", "avx512", "avx2", "portable"])
def instruction_set(request):
    from vitslim import _C

    if request.param not in _C.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(before)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_keeps_the_error_budget(instruction_set, shape, dtype, masked):
    qkv, mask, grad = make(*shape, dtype, masked=masked)
    wide_mask = None if mask is None else mask.double()
    exact = gradients(eager, qkv.double(), shape[2], wide_mask, grad.double())
    plain = gradients(eager, qkv, shape[2], mask, grad)
    actual = gradients(ragged_attention, qkv, shape[2], mask, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], f"{instruction_set} {name}")


def test_an_unknown_instruction_set_is_refused():
    from vitslim import _C

    with pytest.raises(ValueError, match="'avx1024' is not available here; there are"):
        _C.set_instruction_set("avx1024")


def test_the_number_of_threads_changes_no_bit():
    qkv, mask, grad = make(2, 197, (18, 34, 45))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(ragged_attention, qkv, (18, 34, 45), mask, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_two_python_threads_do_not_disturb_each_other():
    inputs = [make(2, tokens, dims) for tokens, dims in ((197, (18, 34)), (50, (64, 7, 12)))]
    dims = [(18, 34), (64, 7, 12)]
    expected = [ragged_attention(i[0], d, SCALE, i[1]) for i, d in zip(inputs, dims, strict=True)]
    wrong = []

    def work(index):
        for _ in range(30):
            out = ragged_attention(inputs[index][0], dims[index], SCALE, inputs[index][1])
            if not torch.equal(out, expected[index]):
                wrong.append(index)

    # use_backend is a setting of the process, so both threads run the native kernel.
    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_bare_ops_check_their_arguments():
    ops = torch.ops.vitslim_native
    with pytest.raises(RuntimeError, match="qkv must have the shape"):
        ops.ragged_attention_forward(torch.randn(2, 3, 10), [4], 0.5, None)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        ops.ragged_attention_forward(torch.randn(2, 3, 12).double(), [4], 0.5, None)
    with pytest.raises(RuntimeError, match=r"mask must have the shape \[4\], but has \[3\]"):
        ops.ragged_attention_forward(torch.randn(2, 3, 12), [4], 0.5, torch.ones(3))
    with pytest.raises(RuntimeError, match="mask must be float32"):
        ops.ragged_attention_forward(torch.randn(2, 3, 12), [4], 0.5, torch.ones(4).half())
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 1, 3)
    with pytest.raises(RuntimeError, match=r"out must have the shape \[2, 3, 4\], but has"):
        ops.ragged_attention_backward(out, torch.randn(2, 3, 12), lse, lse, [4], 0.5, None)
    with pytest.raises(RuntimeError, match="grad_out must be float32"):
        ops.ragged_attention_backward(out.half(), torch.randn(2, 3, 12), out, lse, [4], 0.5, None)


needs_cuda_build = pytest.mark.skipif(
    not hasattr(torch.ops.vitslim_native, "masked_activation_forward"),
    reason="native is built without CUDA",
)


@needs_cuda_build
def test_ops_for_gpus_alone_are_not_registered_for_the_cpu():
    with pytest.raises(NotImplementedError, match="masked_activation_forward"):
        torch.ops.vitslim_native.masked_activation_forward(torch.randn(2, 3), None, "gelu")


@pytest.mark.skipif(
    why_not("native", "masked_mlp", "cuda", torch.float32) is not None,
    reason=str(why_not("native", "masked_mlp", "cuda", torch.float32)),
)
def test_the_bare_ops_check_their_arguments_on_cuda():
    ops, x = torch.ops.vitslim_native, torch.randn(2, 3, 12, device="cuda")
    with pytest.raises(RuntimeError, match="mask must be on the input's device"):
        ops.ragged_attention_forward(x, [4], 0.5, torch.ones(4))
    with pytest.raises(RuntimeError, match="float32_parts must be 2 or 3, but is 1"):
        ops.ragged_attention_forward(x, [4], 0.5, None, 1)
    with pytest.raises(RuntimeError, match="head 0 is 129 wide, and the CUDA kernels hold 128"):
        ops.ragged_attention_forward(torch.randn(1, 2, 387, device="cuda"), [129], 0.5, None)
    with pytest.raises(RuntimeError, match=r"weight must have the shape \[12\], but has \[3\]"):
        ops.gated_layer_norm_forward(x, x[0, :, 0], x[0, 0], 1e-6, None)
    with pytest.raises(RuntimeError, match="bias must be float16"):
        ops.gated_layer_norm_forward(x.half(), x[0, 0].half(), x[0, 0], 1e-6, None)
    with pytest.raises(RuntimeError, match="no activation is called 'mish'"):
        ops.masked_activation_forward(x[0], None, "mish")
    with pytest.raises(RuntimeError, match="grad_hidden must be contiguous"):
        ops.masked_activation_backward(x[0, :, :2], x[0, :, :2], None, "gelu")


@pytest.mark.parametrize(
    ("architectures", "here", "runs"),
    [
        (["8.0", "9.0+PTX"], (9, 0), True),
        (["8.0", "9.0+PTX"], (8, 9), True),
        (["8.0", "9.0+PTX"], (12, 0), True),
        (["8.0", "9.0"], (12, 0), False),
        (["9.0+PTX"], (8, 9), False),
        (["8.6", "8.9"], (8, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_build_is_for(architectures, here, runs, monkeypatch):
    from vitslim import native as backend

    monkeypatch.setattr("torch.version.cuda", "13.2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: here)
    reason = backend._no_cuda(architectures)
    assert (reason is None) == runs
    if architectures and not runs:
        assert reason.endswith(f"this one has {here[0]}.{here[1]}")
