"""The native backend: the ops of ``vitslim._C`` as Python functions."""

import math

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


def packed_linear_forward(
    x: torch.Tensor,
    panels: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float,
    bfloat16_products: bool,
) -> torch.Tensor:
    """Returns f(norm(x) W^T + bias), or residual + scale * that, ``[..., out_features]``.

    Args:
        x: float32 ``[..., in]``.
        panels: the weight as csrc/packed_linear.h packs it, float32 or bfloat16.
        bias: ``[out_features]`` or None.
        out_features: columns of the result.
        activation: "none", "gelu", "gelu_tanh", "quick_gelu", "silu" or "relu".
        residual: ``[..., out_features]`` or None.
        scale: ``[out_features]`` or None; with a residual only.
        norm_weight: ``[in]``, of a layer norm of x, or None for none.
        norm_bias: ``[in]`` or None.
        norm_eps: of the layer norm.
        bfloat16_products: round norm(x) to bfloat16; needs bfloat16 panels.
    """
    shape = (*x.shape[:-1], out_features)
    # Not -1: an empty x would leave it undetermined.
    rows = math.prod(x.shape[:-1])
    if residual is not None:
        residual = residual.reshape(rows, out_features)
    norm = (norm_weight, norm_bias, norm_eps)
    out: torch.Tensor = _OPS.packed_linear_forward(
        x.reshape(rows, x.shape[-1]),
        panels,
        bias,
        out_features,
        activation,
        residual,
        scale,
        *norm,
        bfloat16_products,
    )
    return out.view(shape)


def vit_encoder_forward(
    images: torch.Tensor,
    start: torch.Tensor,
    vectors: torch.Tensor,
    panels: torch.Tensor,
    layout: torch.Tensor,
    rows: int,
    bfloat16_products: bool,
) -> torch.Tensor:
    """Returns the first `rows` tokens after all blocks, ``[B, rows, C]``.

    Args:
        images: float32 ``[B, in_chans, H, W]``.
        start: float32 ``[N, C]``, what every image begins with: class tokens, positions, biases.
        vectors: float32, all that is no matrix.
        panels: all matrices, float32 or bfloat16.
        layout: int64, what stands where; see csrc/vit_encoder.h.
        rows: how many leading tokens are asked for.
        bfloat16_products: round the left operands to bfloat16; needs bfloat16 panels.
    """
    out: torch.Tensor = _OPS.vit_encoder_forward(
        images, start, vectors, panels, layout, rows, bfloat16_products
    )
    return out


def multiply_add_rate(seconds: float = 0.1) -> float:
    """Returns the float32 multiply-adds a second of one thread, the bound of every product."""
    return _C.multiply_add_rate(seconds)


def build_info() -> dict[str, object]:
    """Returns the compiler, whether CUDA and sanitizers are in, and the instruction set in use."""
    return {
        **_C.build_info(),
        "instruction_set": _C.instruction_set(),
        "instruction_sets": _C.instruction_sets(),
    }
