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
    with pytest.raises(RuntimeError, match="mask must"):
        ops.ragged_attention_forward(torch.randn(2, 3, 12), [4], 0.5, torch.ones(3))
