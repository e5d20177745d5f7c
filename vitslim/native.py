"""The native backend: the ops of ``vitslim._C`` as Python functions."""

import torch  # first: it loads the libraries that vitslim._C is linked against

try:
    import vitslim._C as _C
except ImportError as error:
    raise ImportError(
        f"vitslim's native kernels cannot be loaded ({error}); install vitslim again with a C++"
        " compiler, with `pip install -v --no-build-isolation .` to see why they are not built."
    ) from error

DEVICES = ("cuda", "cpu") if _C.build_info()["cuda"] else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_OPS = torch.ops.vitslim_native


def ragged_attention_forward(
    qkv: torch.Tensor, head_dims: list[int], scale: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out ``[B, N, D]`` and lse ``[B, H, N]``, the logarithm of each softmax's sum.

    Args:
        qkv: ``[B, N, 3 * D]``, all heads of q, then of k, then of v; read in place where its
            columns lie side by side.
        head_dims: the heads' widths, which add up to D.
        scale: factor of the logits.
        mask: float32 ``[D]``, which multiplies q, k and v, or None.
    """
    return _OPS.ragged_attention_forward(qkv, head_dims, scale, mask)


def ragged_attention_backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    head_dims: list[int],
    scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns grad_qkv ``[B, N, 3 * D]`` and grad_mask, float32 ``[D]`` (``[0]`` without mask).

    The same bits on every run and for every number of threads.
    """
    return _OPS.ragged_attention_backward(grad_out, qkv, out, lse, head_dims, scale, mask)


def build_info() -> dict[str, object]:
    """Returns the compiler, whether CUDA and sanitizers are in, and the instruction set in use."""
    return {
        **_C.build_info(),
        "instruction_set": _C.instruction_set(),
        "instruction_sets": _C.instruction_sets(),
    }
