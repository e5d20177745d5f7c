"""The calls whose kernels are compiled ahead of time: the ops as models that matter call them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Heads of 64 of DeiT-T, -S and -B; what searches left of DeiT-S; widths that no vector fits.
HEADS = {
    "3x64": (64,) * 3,
    "6x64": (64,) * 6,
    "12x64": (64,) * 12,
    "ragged": (40, 64, 8, 56, 0, 24),
    "odd": (37, 63, 5, 1, 50, 24),
}
# Wide, narrow, and tiles that are not a power of two.
MORE_HEADS = {f"4x{width}": (width,) * 4 for width in (16, 32, 48, 80, 128, 160, 256)}
CHANNELS = {"T": 192, "S": 384, "B": 768}


@dataclass(frozen=True)
class Case:
    """One call of an op, forward and backward."""

    name: str
    run: Callable[[ModuleType], None]  # given the backend
    aligned: bool  # every row and every head starts at a multiple of 16 bytes

    def exists_in(self, kernels: ModuleType) -> bool:
        """Returns whether a backend has the op, which the name begins with."""
        op = self.name.split()[0]
        return all(
            callable(getattr(kernels, f"{op}_{way}", None)) for way in ("forward", "backward")
        )


def cases(everything: bool) -> Iterator[Case]:
    """Yields the cases; without `everything` those of DeiT-S at 256 images."""
    yield from _ragged_attention(everything)
    yield from _masked_mlp(everything)
    yield from _gated_layer_norm(everything)


def _precisions(dtype: str, everything: bool) -> Sequence[str]:
    return ("highest", "high") if everything and dtype == "f32" else ("highest",)


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _ragged_attention(everything: bool) -> Iterator[Case]:
    heads = HEADS | MORE_HEADS if everything else {k: HEADS[k] for k in ("6x64", "ragged")}
    for name, head_dims in heads.items():
        deit = everything and name in HEADS
        for batch, tokens, dtype, masked in itertools.product(
            (1, 256) if deit else (256,),
            (50, 197, 257, 577) if deit else (197, 577) if everything else (50, 197),
            DTYPES if deit else ("f32", "bf16"),
            (False, True),
        ):
            if dtype == "f32" and max(head_dims) > 128:
                continue  # refused
            for precision in _precisions(dtype, everything):
                words = (name, batch, tokens, dtype, precision, "masked" if masked else "plain")

                def run(
                    kernels: ModuleType,
                    head_dims: tuple[int, ...] = head_dims,
                    shape: tuple[int, int] = (batch, tokens),
                    dtype: torch.dtype = DTYPES[dtype],
                    masked: bool = masked,
                    precision: str = precision,
                ) -> None:
                    width = sum(head_dims)
                    qkv = _empty(*shape, 3 * width, dtype=dtype)
                    mask = _empty(width) if masked else None
                    with _matmul_precision(precision):
                        out, lse = kernels.ragged_attention_forward(qkv, head_dims, 0.125, mask)
                        kernels.ragged_attention_backward(
                            torch.empty_like(out), qkv, out, lse, head_dims, 0.125, mask
                        )

                aligned = all(width % 8 == 0 for width in head_dims)
                yield Case("ragged_attention " + " ".join(map(str, words)), run, aligned)


def _masked_mlp(everything: bool) -> Iterator[Case]:
    # Hidden units: all, a multiple of 8 that a budget left, and any number.
    sizes = [(c, h) for c in CHANNELS.values() for h in (4 * c, 2 * c + 40, 2 * c + 37)]
    for (channels, hidden), batch, tokens, dtype, act, masked in itertools.product(
        sizes if everything else [(384, 1536)],
        (1, 256) if everything else (256,),
        (50, 197, 257, 577) if everything else (197,),
        DTYPES if everything else ("f32", "bf16"),
        ("gelu", "gelu_tanh") if everything else ("gelu",),
        (False, True),
    ):
        for precision in _precisions(dtype, everything):
            mask_word = "masked" if masked else "plain"
            words = (channels, hidden, batch, tokens, dtype, precision, act, mask_word)

            def run(
                kernels: ModuleType,
                channels: int = channels,
                hidden: int = hidden,
                shape: tuple[int, int] = (batch, tokens),
                dtype: torch.dtype = DTYPES[dtype],
                act: str = act,
                masked: bool = masked,
                precision: str = precision,
            ) -> None:
                x = _empty(*shape, channels, dtype=dtype)
                fc1, fc2 = (
                    _empty(hidden, channels, dtype=dtype),
                    _empty(channels, hidden, dtype=dtype),
                )
                bias1, bias2 = _empty(hidden, dtype=dtype), _empty(channels, dtype=dtype)
                mask = _empty(hidden) if masked else None
                with _matmul_precision(precision):
                    out, pre_act = kernels.masked_mlp_forward(x, fc1, bias1, fc2, bias2, mask, act)
                    kernels.masked_mlp_backward(
                        torch.empty_like(out), x, pre_act, fc1, fc2, mask, act
                    )

            yield Case("masked_mlp " + " ".join(map(str, words)), run, hidden % 8 == 0)


def _gated_layer_norm(everything: bool) -> Iterator[Case]:
    # The parameters are float32 under autocast.
    kinds = [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")]
    if everything:
        kinds += [("f16", "f16"), ("f16", "f32")]
    for channels, batch, tokens, (dtype, parameters), gated in itertools.product(
        (*CHANNELS.values(), 33, 1000, 1024, 1280, 4096) if everything else (384,),
        (1, 256) if everything else (256,),
        (50, 197, 257, 577) if everything else (197,),
        kinds,
        (False, True),
    ):
        words = (channels, batch, tokens, dtype, parameters, "gated" if gated else "plain")

        def run(
            kernels: ModuleType,
            channels: int = channels,
            shape: tuple[int, int] = (batch, tokens),
            dtype: torch.dtype = DTYPES[dtype],
            parameters: torch.dtype = DTYPES[parameters],
            gated: bool = gated,
        ) -> None:
            x = _empty(*shape, channels, dtype=dtype)
            weight, bias = (_empty(channels, dtype=parameters) for _ in range(2))
            gate = _empty(shape[1]) if gated else None
            out, mean, rstd = kernels.gated_layer_norm_forward(x, weight, bias, 1e-6, gate)
            kernels.gated_layer_norm_backward(
                torch.empty_like(out), x, weight, bias, gate, mean, rstd
            )

        yield Case("gated_layer_norm " + " ".join(map(str, words)), run, channels % 8 == 0)
