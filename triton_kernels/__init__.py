"""The Triton backend of vitslim, installed as `vitslim.triton_kernels`.

For NVIDIA GPUs of compute capability 8.0 and later. With TRITON_INTERPRET=1, Triton's own switch,
the kernels run on the CPU instead, slowly and exactly, to be tested and stepped through.
"""

import torch

if __name__ == "triton_kernels":
    # Another public package owns this bare name; taking it by accident would shadow that one.
    raise ImportError("import vitslim.triton_kernels: the folder is not a top-level package")

from .common import INTERPRETED

if not INTERPRETED:
    if not torch.cuda.is_available():
        raise ImportError("triton needs a GPU and torch sees none")
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        raise ImportError("triton kernels need a GPU of compute capability 8.0 or later")

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
