"""timm's attention -> reference -> every backend: ragged_attention is what it says it is."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_within_budget
from torch.utils.flop_counter import FlopCounterMode

from vitslim.ops import ragged_attention, use_backend, why_not

OP = "ragged_attention"
SCALE = 64**-0.5
SHAPES = [  # batch, tokens, head_dims
    (1, 197, (18, 34, 45, 49, 54, 29)),
    (1, 50, (64, 64, 64)),
    (3, 17, (1, 0, 7, 33)),
    (2, 1, (8, 5)),
    (1, 257, (100, 3)),
    (2, 65, (0, 0, 16)),
    (1, 33, (160,)),
    (5, 16, (16, 24)),
    (1, 400, (24,)),  # more than the 384 keys that the CPU kernels take at a time
]


def make(batch, tokens, head_dims, dtype=torch.float32, device="cpu", masked=True):
    """Returns qkv, mask and a non-constant upstream gradient."""
    width = sum(head_dims)
    qkv = torch.randn(batch, tokens, 3 * width, device=device).to(dtype)
    mask = torch.rand(width, device=device) + 0.3 if masked else None
    return qkv, mask, torch.randn(batch, tokens, width, device=device).to(dtype)


def for_interpreter(shape, dtype):
    """Returns a shape that takes Triton's interpreter the same ways in a tenth of the time.

    Every head is a program of its own: three have tiles of the same two widths as six. Blocks have
    at most 64 queries or keys in float32 and 128 in half precision, which has another kernel for
    more than 256 tokens: one whole block or more, that kernel and the same rest are left.
    """
    batch, tokens, head_dims = shape
    whole = 64 if dtype == torch.float32 else 256 if tokens > 256 else 128
    if tokens > whole:
        tokens = whole + (tokens % 64 or 64)
    return batch, tokens, head_dims[:3]


def eager(qkv, head_dims, scale, mask):
    """Heads one by one in plain PyTorch, in qkv's own dtype."""
    if mask is not None:
        qkv = qkv * mask.to(qkv.dtype).repeat(3)
    heads = zip(*(part.split(list(head_dims), -1) for part in qkv.chunk(3, -1)), strict=True)
    return torch.cat([((q @ k.mT) * scale).softmax(-1) @ v for q, k, v in heads], -1)


def gradients(function, qkv, head_dims, mask, grad):
    qkv = qkv.detach().clone().requires_grad_()
    mask = None if mask is None else mask.detach().clone().requires_grad_()
    out = function(qkv, head_dims, SCALE, mask)
    out.backward(grad)
    return {"out": out.detach(), "qkv": qkv.grad} | ({} if mask is None else {"mask": mask.grad})


@pytest.mark.parametrize("head_dim", [16, 64])
def test_reference_equals_sdpa_on_equal_heads(head_dim):
    qkv = torch.randn(2, 50, 3 * 3 * head_dim, dtype=torch.float64)
    q, k, v = qkv.reshape(2, 50, 3, 3, head_dim).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 50, -1)
    with use_backend("reference", OP):
        actual = ragged_attention(qkv, [head_dim] * 3, head_dim**-0.5)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_gradcheck(masked):
    qkv, mask, _ = make(2, 5, (3, 0, 4), torch.float64, masked=masked)
    qkv.requires_grad_()
    mask = mask.double().requires_grad_() if masked else None
    torch.autograd.gradcheck(lambda x, z: ragged_attention(x, (3, 0, 4), 0.5, z), (qkv, mask))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_opcheck(masked, forced, device):
    forced(OP, torch.float32)
    qkv, mask, grad = make(2, 9, (3, 0, 4), device=device, masked=masked)
    mask = mask.requires_grad_() if masked else None
    args = (qkv.requires_grad_(), [3, 0, 4], 0.5, mask)
    torch.library.opcheck(torch.ops.vitslim.ragged_attention_forward, args)
    with torch.no_grad():
        out, lse = torch.ops.vitslim.ragged_attention_forward(*args)
    args = (grad, qkv.detach(), out, lse, [3, 0, 4], 0.5, None if mask is None else mask.detach())
    torch.library.opcheck(torch.ops.vitslim.ragged_attention_backward, args)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_keep_the_error_budget(shape, dtype, masked, forced, device):
    backend = forced(OP, dtype)
    if backend == "triton" and device == "cpu":
        shape = for_interpreter(shape, dtype)
    qkv, mask, grad = make(*shape, dtype, device, masked)
    refusals = {
        ("triton", torch.float32): "160 wide and Triton's kernels hold 128 at most",
        ("native", dtype): "160 wide, and the CUDA kernels hold 128",
    }
    said = refusals.get((backend, dtype)) if backend == "triton" or device == "cuda" else None
    if said is not None and max(shape[2]) > 128:
        with pytest.raises((ValueError, RuntimeError), match=said):
            ragged_attention(qkv, shape[2], SCALE, mask)
        return
    wide_mask = None if mask is None else mask.double()
    exact = gradients(eager, qkv.double(), shape[2], wide_mask, grad.double())
    plain = gradients(eager, qkv, shape[2], mask, grad)
    actual = gradients(ragged_attention, qkv, shape[2], mask, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [(1, 190, (8, 40)), (2, 50, (64,)), (1, 256, (16,))], ids=str)
def test_triton_backward_of_a_large_batch(shape, masked, device, monkeypatch):
    """With few processors these batches are large, and keys and values stay on chip."""
    reason = why_not("triton", OP, device, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr("vitslim.triton_kernels.configs.processors", lambda device: 1)
    qkv, mask, grad = make(*shape, torch.bfloat16, device, masked)
    wide_mask = None if mask is None else mask.double()
    exact = gradients(eager, qkv.double(), shape[2], wide_mask, grad.double())
    plain = gradients(eager, qkv, shape[2], mask, grad)
    with use_backend("triton", OP):
        actual = gradients(ragged_attention, qkv, shape[2], mask, grad)
    for name in exact:
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "offset"])
def test_strided_input(layout, forced, device):
    forced(OP, torch.float32)
    dims, width = (5, 12, 3), 20
    make_strided = {
        "sliced": lambda: torch.randn(4, 60, 3 * width + 7, device=device)[::2, ::3, 2 : 2 + 60],
        "transposed": lambda: torch.randn(2, 3 * width, 20, device=device).transpose(1, 2),
        "expanded": lambda: torch.randn(1, 20, 3 * width, device=device).expand(2, -1, -1),
        "offset": lambda: torch.randn(2 * 20 * 60 + 1, device=device)[1:].view(2, 20, 60),
    }
    qkv = make_strided[layout]()
    mask, grad = torch.rand(width, device=device), torch.randn(2, 20, width, device=device)
    expected = gradients(ragged_attention, qkv.contiguous(), dims, mask, grad)
    strided = qkv.detach().requires_grad_()
    out = ragged_attention(strided, dims, SCALE, mask)
    out.backward(grad.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(strided.grad, expected["qkv"])


def test_stride_zero_gradient(forced, device):
    forced(OP, torch.float32)
    qkv, mask, _ = make(2, 19, (5, 8), device=device)
    expected = gradients(ragged_attention, qkv, (5, 8), mask, torch.ones(2, 19, 13, device=device))
    leaf = qkv.clone().requires_grad_()
    ragged_attention(leaf, (5, 8), SCALE, mask).sum().backward()
    torch.testing.assert_close(leaf.grad, expected["qkv"])


def test_a_mask_may_be_strided(forced, device):
    forced(OP, torch.float32)
    qkv, _, grad = make(2, 9, (5, 8), device=device)
    mask = torch.rand(13, 2, device=device)[:, 0]
    expected = gradients(ragged_attention, qkv, (5, 8), mask.contiguous(), grad)
    leaf = qkv.detach().requires_grad_()
    out = ragged_attention(leaf, (5, 8), SCALE, mask)
    out.backward(grad)
    torch.testing.assert_close(out.detach(), expected["out"])
    torch.testing.assert_close(leaf.grad, expected["qkv"])


@pytest.mark.parametrize("shape", [(0, 10), (2, 0)], ids=["no image", "no token"])
def test_empty(shape, forced, device):
    forced(OP, torch.float32)
    qkv, mask, grad = make(*shape, (5, 8), device=device)
    result = gradients(ragged_attention, qkv, (5, 8), mask, grad)
    assert result["out"].shape == (*shape, 13)
    assert result["qkv"].shape == (*shape, 39)
    assert (result["mask"] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_stays_in_its_head_and_image(value, forced, device):
    forced(OP, torch.float32)
    qkv, _, _ = make(2, 21, (6, 9), device=device)
    clean = ragged_attention(qkv, (6, 9), SCALE)
    qkv[0, 3, 2] = value  # a query of image 0, head 0
    qkv[0, 4, 30 + 7] = value  # a value of image 0, head 1
    out = ragged_attention(qkv, (6, 9), SCALE)
    expected = eager(qkv, (6, 9), SCALE, None)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out[1], clean[1])


def test_large_logits_stay_exact(forced, device):
    forced(OP, torch.float32)
    qkv, _, grad = make(1, 40, (16, 8), device=device)
    qkv[..., :48] *= 100.0
    exact = gradients(eager, qkv.double(), (16, 8), None, grad.double())
    plain = gradients(eager, qkv, (16, 8), None, grad)
    actual = gradients(ragged_attention, qkv, (16, 8), None, grad)
    assert_within_budget(actual["out"], plain["out"], exact["out"])
    # Backward rebuilds the softmax from its logarithm, which at 1e4 has lost four digits.
    torch.testing.assert_close(actual["qkv"].double(), exact["qkv"], atol=2e-1, rtol=1e-2)


def test_the_same_bits_every_time(forced, device):
    backend = forced(OP, torch.float32)
    # Triton's interpreter runs programs one by one, slowly: threads that race are elsewhere.
    interpreted = backend == "triton" and device == "cpu"
    shape = (1, 37) if interpreted else (3, 70)
    qkv, mask, grad = make(*shape, (18, 34, 45), device=device)
    first = gradients(ragged_attention, qkv, (18, 34, 45), mask, grad)
    for _ in range(1 if interpreted else 3):
        again = gradients(ragged_attention, qkv, (18, 34, 45), mask, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_compiles_without_a_graph_break():
    qkv, mask, _ = make(2, 9, (3, 4))
    compiled = torch.compile(ragged_attention, fullgraph=True, backend="aot_eager")
    expected = ragged_attention(qkv, (3, 4), SCALE, mask)
    torch.testing.assert_close(compiled(qkv, (3, 4), SCALE, mask), expected)


def test_flop_counter_counts_both_products():
    qkv, _, grad = make(2, 50, (18, 34))
    with FlopCounterMode(display=False) as counter:
        out = ragged_attention(qkv.requires_grad_(), (18, 34), SCALE)
    assert counter.get_total_flops() == 2 * 2 * 2 * 50 * 50 * 52
    with FlopCounterMode(display=False) as counter:
        out.backward(grad)
    assert counter.get_total_flops() == 5 * 2 * 2 * 50 * 50 * 52


@pytest.mark.parametrize(
    ("shape", "dims", "mask", "said"),
    [
        ((2, 9), (3,), None, r"must be \[batch, tokens, 3 D\], got \[2, 9\]"),
        ((2, 9, 12), (3, 2), None, "must have .* = 15 columns, got 12"),
        ((2, 9, 12), (5, -1), None, "must not be negative"),
        ((2, 9, 12), (), None, "head_dims is empty"),
        ((2, 9, 12), (4,), 3, r"mask must have shape \[4\], got \[3\]"),
    ],
)
def test_wrong_arguments_are_named(shape, dims, mask, said):
    mask = None if mask is None else torch.ones(mask)
    with pytest.raises(ValueError, match=said):
        ragged_attention(torch.randn(shape), dims, SCALE, mask)
