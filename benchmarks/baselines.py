"""What a user could write instead of vitslim's ops: the honest alternatives, and how they are run.

Attention: all read the same packed projection and give the same packed output, except "pre-padded",
whose projection was widened beforehand so that nothing has to be gathered, and the dense ones.
Masks: "the published way" multiplies q, k, v, the hidden units and the normed input by their masks,
as the method's own code does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any
from unittest import mock

import shapes
import torch
import torch.nn.functional as F
from harness import Absent, Aim, Contender
from shapes import SCALE
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitslim
from vitslim.layers import GatedLayerNorm, MaskedAttention, MaskedMlp, path
from vitslim.ops import use_backend, why_not

Call = Callable[[Tensor], Tensor]
IN_A_GRAPH = 20
OUR_BACKENDS = ("triton", "native")
SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA of heads [B, H, N, width] at the dense model's scale."""
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


def sdpa_of_equal_heads(qkv: Tensor, heads: int, attend: Callable[..., Tensor] = sdpa) -> Tensor:
    """The way of timm: qkv [B, N, 3 * heads * width] -> [B, N, heads * width]."""
    batch, tokens, columns = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, columns // (3 * heads)).permute(2, 0, 3, 1, 4)
    return attend(q, k, v).transpose(1, 2).reshape(batch, tokens, columns // 3)


def padded_sdpa(
    head_dims: Sequence[int],
    width: int | None = None,
    device: str = "cpu",
    attend: Callable[..., Tensor] = sdpa,
) -> Call:
    """Pads every head to `width`, the widest if None: one scatter, `attend`, one gather."""
    heads, padded_to = len(head_dims), width or max(head_dims)
    place = torch.cat([torch.arange(w) + h * padded_to for h, w in enumerate(head_dims)])
    places = torch.cat([place + i * heads * padded_to for i in range(3)]).to(device)
    place = place.to(device)

    def call(qkv: Tensor) -> Tensor:
        padded = qkv.new_zeros(*qkv.shape[:2], 3 * heads * padded_to).index_copy(2, places, qkv)
        return sdpa_of_equal_heads(padded, heads, attend).index_select(2, place)

    return call


def grouped_sdpa(head_dims: Sequence[int], unit: int) -> Call:
    """One SDPA for all heads that have the same width once rounded up to `unit`."""
    embed_dim, begins, begin = sum(head_dims), [], 0
    for width in head_dims:
        begins.append(begin)
        begin += width
    groups: dict[int, list[int]] = {}
    for head, width in enumerate(head_dims):
        groups.setdefault(-(-width // unit) * unit, []).append(head)

    def call(qkv: Tensor) -> Tensor:
        outs: list[Tensor] = [qkv] * len(head_dims)
        for width, heads in groups.items():
            q, k, v = (
                torch.stack(
                    [
                        F.pad(
                            qkv.narrow(2, i * embed_dim + begins[h], head_dims[h]),
                            (0, width - head_dims[h]),
                        )
                        for h in heads
                    ],
                    1,
                )
                for i in range(3)
            )
            out = sdpa(q, k, v)
            for i, h in enumerate(heads):
                outs[h] = out[:, i, :, : head_dims[h]]
        return torch.cat(outs, 2)

    return call


def looped_sdpa(head_dims: Sequence[int]) -> Call:
    """One SDPA per head, on views of the projection."""
    widths = list(head_dims)

    def call(qkv: Tensor) -> Tensor:
        q, k, v = (part.split(widths, 2) for part in qkv.chunk(3, 2))
        return torch.cat([sdpa(a, b, c) for a, b, c in zip(q, k, v, strict=True)], 2)

    return call


def each_sdpa_kernel(name: str, call: Callable[[], object]) -> dict[str, Contender]:
    """Returns the call once with each of SDPA's kernels; one that refuses will say so."""
    return {
        f"{name}, {kernel}": Contender(call, partial(sdpa_kernel, backend))
        for kernel, backend in SDPA_KERNELS.items()
    }


def timed(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None
) -> Callable[[], object]:
    """Returns a call of the function, and of its gradients for all inputs if `grad` is given."""
    if grad is None:
        return lambda: function(*inputs)
    leaves = [each.requires_grad_() for each in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def with_backend(
    backend: str,
    call: Callable[[], object],
    ops: Sequence[str],
    device: str,
    dtype: torch.dtype,
    resident_mib: Callable[[], float] = float,
) -> Contender | Absent:
    """Returns the call with a backend forced for some ops, or why that cannot be."""
    reasons = [reason for op in ops if (reason := why_not(backend, op, device, dtype))]
    if reasons:
        return Absent(reasons[0])

    @contextmanager
    def forced() -> Iterator[None]:
        with ExitStack() as stack:
            for op in ops:
                stack.enter_context(use_backend(backend, op))
            yield

    return Contender(call, forced, True, resident_mib=resident_mib)


with_triton = partial(with_backend, "triton")


def ours(
    call: Callable[[], object], op: str, device: str, dtype: torch.dtype, beside: str = ""
) -> dict[str, Contender | Absent]:
    """Returns the call of an op once with each of our GPU backends: "ours, triton" and so on."""
    return {
        f"ours, {backend}{beside}": with_backend(backend, call, [op], device, dtype)
        for backend in OUR_BACKENDS
    }


def aims_of_each(text: str, over: tuple[str, ...], at_least: float, beside: str = "") -> list[Aim]:
    """Returns the same aim for each of our GPU backends."""
    return [
        Aim(f"{text}, {backend}", over, at_least, (f"ours, {backend}{beside}",))
        for backend in OUR_BACKENDS
    ]


@contextmanager
def no_fused_op() -> Iterator[None]:
    """Makes layers take plain torch, whatever wins on this device: masks folded, heads padded."""
    with mock.patch.dict(path._WINS, clear=True):
        yield


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile with a cache of its own; --smoke only traces.

    Dynamo keeps what it compiled by code object and does not see which backend an op is forced to,
    so the same layers compiled twice would share their first graph. A new code object shares none.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    call.__code__ = call.__code__.replace()
    if shapes.SMOKE:
        options = {"backend": "eager"}
    return torch.compile(call, dynamic=False, **options)


def in_a_graph(each: Contender | Absent, device: str) -> Contender | Absent:
    """Returns a contender that replays its call from a CUDA graph, captured when first called.

    A graph holds a number of them, so that launching it does not count either.
    """
    if isinstance(each, Absent) or device != "cuda":
        return each
    replay: list[Callable[[], None]] = []

    def call() -> None:
        if not replay:
            replay.append(_captured(each.call))
        replay[0]()

    return Contender(call, each.around, each.ours, IN_A_GRAPH)


def _captured(call: Callable[[], object]) -> Callable[[], None]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_GRAPH):
            call()
    return graph.replay


def the_published_way(model: nn.Module) -> nn.Module:
    """Returns a masked copy of a timm model whose masks multiply activations."""
    forwards = {
        MaskedAttention: _attention_the_published_way,
        MaskedMlp: _mlp_the_published_way,
        GatedLayerNorm: _norm_the_published_way,
    }
    masked = vitslim.mask(model)
    for module in masked.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
    return masked


def _attention_the_published_way(self: MaskedAttention, x: Tensor, **_: object) -> Tensor:
    batch, tokens, _channels = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv * self.mask.unsqueeze(1)
    scores = ((q @ k.mT) * self.scale).softmax(-1)
    return self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, -1))


def _mlp_the_published_way(self: MaskedMlp, x: Tensor) -> Tensor:
    return self.fc2(self.act(self.fc1(x)) * self.mask)


def _norm_the_published_way(self: GatedLayerNorm, x: Tensor, gate: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps) * gate.unsqueeze(-1)
