"""What every kernel shares: products at the right precision, and the launch on the right GPU."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes a product of bfloat16 wrongly and says nothing; float32 it does exactly.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Returns acc + a b in float32; PRECISION matters to float32 operands alone."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Returns float32 x rounded to the nearest of another dtype, as GPUs do."""
    # The interpreter cuts bfloat16 off instead.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


def precision(x: Tensor) -> str:
    """Returns how float32 operands are multiplied on `x`'s device, as the user set it for torch.

    torch.set_float32_matmul_precision("highest"), its default, gives three products on tensor cores
    that together are as exact as float32; "high" and "medium" give one in TF32.
    """
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launches `kernel` on the GPU of its first argument; `meta` holds constexprs and options."""
    # Newer Tritons fuse a multiplication and an addition only where they are told to.
    run = kernel[grid]
    device = args[0].device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        run(*args, **meta, enable_fp_fusion=True)
        return
    with torch.cuda.device(device):
        run(*args, **meta, enable_fp_fusion=True)
