"""The native backend: the ops of ``vitslim._C`` as Python functions."""

import math

import torch  # first: it loads the libraries that vitslim._C is linked against
import torch.nn.functional as F
from torch import Tensor

try:
    import vitslim._C as _C
except ImportError as error:
    raise ImportError(
        f"vitslim's native kernels cannot be loaded ({error}); install vitslim again with a C++"
        " compiler, with `pip install -v --no-build-isolation .` to see why they are not built."
    ) from error

_OPS = torch.ops.vitslim_native
# For which GPUs the extension has kernels, each as "9.0", or "9.0+PTX" for all later ones too.
_ARCHITECTURES: list[str] = list(filter(None, _C.build_info()["cuda_architectures"].split(",")))


def _no_cuda(architectures: list[str]) -> str | None:
    """Returns why GPU kernels for these architectures cannot run here, or None."""
    if not architectures:
        return "native is built without CUDA"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "native needs an NVIDIA GPU, and torch sees none"
    here = torch.cuda.get_device_capability()
    for each in architectures:
        built = tuple(int(part) for part in each.removesuffix("+PTX").split("."))
        # Machine code runs on later GPUs of its generation, PTX is compiled for any later one.
        if built <= here and (built[0] == here[0] or each.endswith("+PTX")):
            return None
    names = " ".join(architectures)
    return f"native is built for GPUs of {names}, and this one has {here[0]}.{here[1]}"


# Why there is no "cuda" among the devices, or None.
NO_CUDA = _no_cuda(_ARCHITECTURES)
DEVICES = ("cpu",) if NO_CUDA else ("cuda", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The devices and dtypes of the ops that do not run on all of these.
LIMITS = {
    "masked_mlp": (("cuda",), DTYPES),
    "gated_layer_norm": (("cuda",), DTYPES),
    "packed_linear": (("cpu",), (torch.float32,)),
    "vit_encoder": (("cpu",), (torch.float32,)),
}


def ragged_attention_forward(
    qkv: Tensor, head_dims: list[int], scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns out ``[B, N, D]`` and lse ``[B, H, N]``, the logarithm of each softmax's sum.

    Args:
        qkv: ``[B, N, 3 * D]``, all heads of q, then of k, then of v; read in place where its
            columns lie side by side.
        head_dims: the heads' widths, which add up to D.
        scale: factor of the logits.
        mask: float32 ``[D]``, which multiplies q, k and v, or None.
    """
    return _OPS.ragged_attention_forward(qkv, head_dims, scale, mask, _float32_parts())


def ragged_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    head_dims: list[int],
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns grad_qkv ``[B, N, 3 * D]`` and grad_mask, float32 ``[D]`` (``[0]`` without mask).

    The same bits on every run and for every number of threads.
    """
    return _OPS.ragged_attention_backward(
        grad_out, qkv, out, lse, head_dims, scale, mask, _float32_parts()
    )


def _float32_parts() -> int:
    """Returns of how many bfloat16 numbers tensor cores make a float32 one.

    Three keep all its bits. Two keep 16 of them, which is what torch's own setting "high" allows
    products to: `torch.set_float32_matmul_precision("high")`. The CPU multiplies float32 as it is.
    """
    return 3 if torch.get_float32_matmul_precision() == "highest" else 2


def gated_layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out ``[B, N, C]`` in x's dtype, and mean and rstd ``[B, N, 1]`` in float32."""
    weight, bias = _affine(x, weight, bias)
    return _OPS.gated_layer_norm_forward(x, weight, bias, eps, gate)


def gated_layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight, bias and of the gate [N] float32, empty without one."""
    grad_x, grad_weight, grad_bias, grad_gate = _OPS.gated_layer_norm_backward(
        grad_out, x, *_affine(x, weight, bias), gate, mean, rstd
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_gate


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns weight and bias as the kernels take them: both in x's dtype, or both in float32."""
    if weight.dtype == bias.dtype and weight.dtype in (x.dtype, torch.float32):
        return weight, bias
    return weight.float(), bias.float()


def masked_mlp_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    mask: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    """Returns out ``[..., C]`` and the saved pre-activation u ``[..., M]``, both in x's dtype.

    The products are cuBLAS's. Its epilogue adds the biases for nothing; added by the kernel in
    between, fc1's would have u written once more.
    """
    shape = x.shape[:-1]
    # As matrices: of more dimensions torch adds a bias in the epilogue only to contiguous rows.
    pre_act = F.linear(x.flatten(0, -2), fc1_weight, fc1_bias)
    hidden = _OPS.masked_activation_forward(pre_act, mask, act)
    out = F.linear(hidden, fc2_weight, fc2_bias)
    return out.view(*shape, fc2_weight.shape[0]), pre_act.view(*shape, fc1_weight.shape[0])


def masked_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    pre_act: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    mask: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, W1, b1, W2, b2 and of the mask, empty without a mask."""
    grad, rows = grad_out.flatten(0, -2), x.flatten(0, -2)  # [T, C]
    # [T, M]: the gradient of the hidden units, which becomes that of the pre-activation in place.
    grad_pre = grad @ fc2_weight
    hidden, grad_bias1, grad_mask = _OPS.masked_activation_backward(
        grad_pre, pre_act.flatten(0, -2), mask, act
    )
    grad_x = (grad_pre @ fc1_weight).view(x.shape)
    return grad_x, grad_pre.mT @ rows, grad_bias1, grad.mT @ hidden, grad.sum(0), grad_mask


def packed_linear_forward(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    bfloat16_products: bool,
) -> Tensor:
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
    out: Tensor = _OPS.packed_linear_forward(
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
    images: Tensor,
    start: Tensor,
    vectors: Tensor,
    panels: Tensor,
    layout: Tensor,
    rows: int,
    bfloat16_products: bool,
) -> Tensor:
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
    out: Tensor = _OPS.vit_encoder_forward(
        images, start, vectors, panels, layout, rows, bfloat16_products
    )
    return out


def multiply_add_rate(seconds: float = 0.1) -> float:
    """Returns the float32 multiply-adds a second of one thread, the bound of every product."""
    return _C.multiply_add_rate(seconds)


def build_info() -> dict[str, object]:
    """Returns the compiler, the GPUs that are built for, sanitizers, and the instruction sets."""
    return {
        **_C.build_info(),
        "cuda_architectures": _ARCHITECTURES,
        "instruction_set": _C.instruction_set(),
        "instruction_sets": _C.instruction_sets(),
    }
