"""The error budget of a kernel: at most twice what eager PyTorch errs in the same dtype."""

import torch
from torch import Tensor

# Twice the unit roundoff of a dtype, times the size of the answer: the "tiny" of the budget.
_TINY = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def assert_within_budget(actual: Tensor, eager: Tensor, exact: Tensor, name: str = "") -> None:
    """Asserts max|actual - exact| <= 2 max|eager - exact| + tiny * max|exact|.

    Where everything cancels (the gradient of a layer norm over one channel is zero) the answer
    is taken to be of size 0.01.

    Args:
        actual: What the kernel gave.
        eager: What eager PyTorch gives in the same dtype.
        exact: The float64 answer.
        name: Said in the failure.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, expected {eager.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    budget = 2 * eager_error + _TINY[actual.dtype] * max(exact.abs().max().item(), 1e-2)
    assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}"
