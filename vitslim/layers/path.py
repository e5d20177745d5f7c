"""Which way a layer goes on a device: the fused kernel, or folded into weights for plain torch.

Folding a mask into the weights costs nothing per token and is exact, so a fused kernel is the
way only where a committed benchmark shows that it wins. This is the one place that decides.
"""

import torch
from timm.layers import is_exportable

# (layer, device): does the fused op run? Time of a DeiT-T search step at batch 8 over timm's step
# without masks, medians of one interleaved run (benchmarks/bench_search_step.py shows the first):
#   0.93  masks folded, then ragged_attention on the dense heads
#   0.95  ragged_attention with the mask inside
#   0.98  the first, and gated_layer_norm
#   1.02  masks folded, then scaled_dot_product_attention
#   1.08  the first, and masked_mlp
_FUSED = {
    ("dense attention", "cpu"): True,
    ("MaskedAttention", "cpu"): False,
    ("GatedLayerNorm", "cpu"): False,
    ("MaskedMlp", "cpu"): False,
    ("SlimMlp", "cpu"): False,
}


def fused(layer: str, device: torch.device) -> bool:
    """Returns whether `layer` runs its fused op on `device` rather than plain torch."""
    return _FUSED.get((layer, device.type), False) and not exporting()


def exporting() -> bool:
    """Returns whether the model is being exported, when only ATen operators may appear."""
    return is_exportable() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
