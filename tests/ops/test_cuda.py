"""What only a GPU can show: graphs, streams, a second GPU, the same bits every time."""

import pytest
import test_gated_layer_norm
import test_masked_mlp
import test_ragged_attention
import torch

from vitslim.ops import gated_layer_norm, masked_mlp, ragged_attention

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.parametrize("forced", ["triton", "native"], indirect=True),
]

HEAD_DIMS = (24, 40, 7, 64)


def attention(dtype, device):
    qkv, mask, grad = test_ragged_attention.make(3, 70, HEAD_DIMS, dtype, device)
    return lambda qkv, mask: ragged_attention(qkv, HEAD_DIMS, 0.125, mask), [qkv, mask], grad


def mlp(dtype, device):
    inputs, grad = test_masked_mlp.make(3, 70, 72, 200, 72, dtype, device)
    return masked_mlp, inputs, grad


def norm(dtype, device):
    inputs, grad = test_gated_layer_norm.make(3, 70, 200, dtype, device)
    return lambda x, w, b, gate: gated_layer_norm(x, w, b, 1e-6, gate), inputs, grad


OPS = {"ragged_attention": attention, "masked_mlp": mlp, "gated_layer_norm": norm}


@pytest.fixture
def device():
    """The device that `forced` asks about."""
    return "cuda"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=OPS)
def work(request, forced, dtype):
    """Returns the op's inputs, and a function that gives its output and all gradients of them."""
    forced(request.param, dtype)
    return make_work(request.param, dtype, "cuda")


def make_work(op, dtype, device):
    function, inputs, grad = OPS[op](dtype, "cuda")
    leaves = [each.detach().to(device).requires_grad_() for each in inputs]
    grad = grad.to(device)

    def run():
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return leaves, run


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def refill(leaves, values=None):
    for index, leaf in enumerate(leaves):
        leaf.copy_(torch.randn_like(leaf) if values is None else values[index])


def test_a_cuda_graph_replays_on_new_inputs(work):
    leaves, run = work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    refill(leaves)
    graph.replay()
    assert_same(captured, run())


def test_a_stream_of_its_own_is_obeyed(work):
    leaves, run = work
    values, expected = [leaf.detach().clone() for leaf in leaves], run()
    refill(leaves, [torch.full_like(leaf, torch.nan) for leaf in leaves])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The inputs come late: a kernel on any other stream would see the NaN.
        torch.cuda._sleep(100_000_000)
        refill(leaves, values)
        actual = run()
    stream.synchronize()
    assert_same(actual, expected)


def test_another_gpu_may_be_the_current_one(work):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    _, run = work
    expected = run()
    with torch.cuda.device(1):
        actual = run()
    assert_same(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_a_second_gpu_gives_the_same(op, forced, dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    forced(op, dtype)
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(1)
        _, run = make_work(op, dtype, device)
        results.append([each.cpu() for each in run()])
    assert_same(*results)


def test_the_same_bits_every_time(work):
    _, run = work
    first = run()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))
