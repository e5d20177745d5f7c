"""The Triton backend of vitslim, installed as `vitslim.triton_kernels`.

For NVIDIA GPUs of compute capability 8.0 and later. With TRITON_INTERPRET=1, Triton's own switch,
the kernels run on the CPU instead, slowly and exactly, to be tested and stepped through.
"""

import torch

if __name__ == "triton_kernels":
    # Another public package owns this bare name; taking it by accident would shadow that one.
    raise ImportError("import vitslim.triton_kernels: the folder is not a top-level package")

from . import configs, tuned
from .common import INTERPRETED
from .gated_layer_norm import CANDIDATES as _NORM
from .gated_layer_norm import gated_layer_norm_backward, gated_layer_norm_forward
from .masked_mlp import CANDIDATES as _MLP
from .masked_mlp import masked_mlp_backward, masked_mlp_forward
from .ragged_attention_backward import CANDIDATES as _BACKWARD
from .ragged_attention_backward import ragged_attention_backward
from .ragged_attention_forward import CANDIDATES as _FORWARD
from .ragged_attention_forward import ragged_attention_forward

if not INTERPRETED:
    if not torch.cuda.is_available():
        raise ImportError("triton needs a GPU and torch sees none")
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        raise ImportError("triton kernels need a GPU of compute capability 8.0 or later")

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Kernel -> the configurations that tuning tries beside the tables' own.
CANDIDATES: dict[str, tuple[configs.Config, ...]] = {**_FORWARD, **_BACKWARD, **_MLP, **_NORM}

__all__ = [
    "CANDIDATES",
    "DEVICES",
    "DTYPES",
    "configs",
    "gated_layer_norm_backward",
    "gated_layer_norm_forward",
    "masked_mlp_backward",
    "masked_mlp_forward",
    "ragged_attention_backward",
    "ragged_attention_forward",
    "tuned",
]
