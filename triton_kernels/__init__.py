"""The Triton backend of vitslim, installed as `vitslim.triton_kernels`.

A backend offers what it defines: dispatch asks for `<op>_forward` here and, finding none yet,
goes on to the next backend and says so in `vitslim info`.
"""

import torch

if __name__ == "triton_kernels":
    # Another public package owns this bare name; taking it by accident would shadow that one.
    raise ImportError("import vitslim.triton_kernels: the folder is not a top-level package")

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
