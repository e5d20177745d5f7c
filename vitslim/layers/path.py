"""Which way a layer goes on a device: the fused kernel, or folded into weights for plain torch.

Folding a mask into the weights costs nothing per token and is exact, so a fused kernel is the
way only where a committed benchmark shows that it wins. This is the one place that decides.
"""

import torch
from timm.layers import is_exportable

# (layer, device): does the fused op run? The figures are ratios of medians from one run of the
# benchmark named, on the machine named in benchmarks/results; above 1 the fused op is faster.
_FUSED: dict[tuple[str, str], bool] = {}


def fused(layer: str, device: torch.device) -> bool:
    """Returns whether `layer` runs its fused op on `device` rather than plain torch."""
    return _FUSED.get((layer, device.type), False) and not exporting()


def exporting() -> bool:
    """Returns whether the model is being exported, when only ATen operators may appear."""
    return is_exportable() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
