"""Which way a layer goes on a device: the fused kernel, or folded into weights for plain torch.

Folding a mask into the weights costs nothing per token and is exact, so a fused kernel is the
way only where a committed benchmark shows that it wins. This is the one place that decides.
"""

import torch
from timm.layers import is_exportable
from torch import Tensor
from torch.fx import Proxy

from ..ops import backend_of, is_forced

# The op that each layer could run.
_OPS = {
    "SlimAttention": "ragged_attention",
    "MaskedAttention": "ragged_attention",
    "dense attention": "ragged_attention",
    "MaskedMlp": "masked_mlp",
    "SlimMlp": "masked_mlp",
    "GatedLayerNorm": "gated_layer_norm",
}
# (layer, device): the backend with which the op wins there. Elsewhere plain torch runs.
# Time of a DeiT-T search step at batch 8 over timm's step without masks, medians of one interleaved
# run (benchmarks/bench_search_step.py shows the first):
#   0.93  masks folded, then ragged_attention on the dense heads
#   0.95  ragged_attention with the mask inside
#   0.98  the first, and gated_layer_norm
#   1.02  masks folded, then scaled_dot_product_attention
#   1.08  the first, and masked_mlp
# Attention alone on the CPU is 2.6 and more times faster than SDPA on heads that the projection has
# padded, which is the other way of SlimAttention (benchmarks/bench_ragged_attention.py).
# CUDA has no entry: the Triton kernels are checked (tests/ops/test_aot.py) and were never timed.
# Until benchmarks/results/ holds `make gpu` of a GPU, masks are folded and heads padded for SDPA
# there; vitslim.use_backend("triton") or VITSLIM_BACKEND=triton takes the kernels all the same.
_WINS = {
    ("SlimAttention", "cpu"): "native",
    ("dense attention", "cpu"): "native",
}


def fused(layer: str, x: Tensor) -> bool:
    """Returns whether `layer` runs its op on `x` rather than plain torch.

    It does where the backend that wins can run, or where the user forces a backend for the op.
    """
    # While torch.fx traces there is no device to ask, and a graph of plain torch runs anywhere.
    if isinstance(x, Proxy):
        return False
    return _runs(layer, x.device.type, x.dtype) and not (_exporting() or _transforming())


@torch.compiler.assume_constant_result
def _runs(layer: str, device_type: str, dtype: torch.dtype) -> bool:
    op = _OPS[layer]
    return is_forced(op) or backend_of(op, device_type, dtype) == _WINS.get((layer, device_type))


def _exporting() -> bool:
    """Returns whether the model is being exported, when only ATen operators may appear."""
    if is_exportable() or torch.compiler.is_exporting():
        return True
    # The older ONNX exporter traces. Asking it costs 2 us, more than all the rest of a decision.
    return bool(torch.jit.is_tracing() and torch.onnx.is_in_onnx_export())


def _transforming() -> bool:
    """Returns whether torch.func is at work (grad, vmap, jvp), which knows ATen operators only."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None
