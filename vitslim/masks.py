"""Masks: what a search learned, read from a model, penalised, saved, loaded."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.utils import unwrap_model
from torch import Tensor, nn

from .errors import VitslimError
from .files import atomic_safetensors
from .layers import MaskedAttention, MaskedBlock, MaskedMlp, TokenGate

KINDS = ("attention", "mlp", "token")


@dataclass(frozen=True)
class Masks:
    """The masks of every block; None where a part was left alone. The score of a unit is |mask|.

    Attributes:
        attention: [heads, head_dim] per block, one value per dimension of a head.
        mlp: [hidden] per block.
        token: [patches] per block, the gates tanh(raw).
        granularity: Of the attention masks: "head_dim", "uniform" or "head".
    """

    attention: list[Tensor | None]
    mlp: list[Tensor | None]
    token: list[Tensor | None]
    granularity: str = "head_dim"

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "Masks":
        """Reads the masks of a masked model, as float32 copies on the CPU."""
        model = unwrap_model(model)
        attention: list[Tensor | None] = []
        mlp: list[Tensor | None] = []
        token: list[Tensor | None] = []
        granularity = "head_dim"
        for block in model.blocks:
            masked = block if isinstance(block, MaskedBlock) else None
            attn: Any = getattr(masked, "attn", None)
            has_attention = isinstance(attn, MaskedAttention)
            if has_attention:
                granularity = attn.granularity
            attention.append(_copy(attn.expanded_mask()) if has_attention else None)
            hidden = getattr(masked, "mlp", None)
            mlp.append(_copy(hidden.mask) if isinstance(hidden, MaskedMlp) else None)
            gates = getattr(masked, "tokens", None)
            token.append(None if gates is None else _copy(gates.gate()))
        if not any(each is not None for each in attention + mlp + token):
            raise VitslimError("the model has no masks; make them with vitslim.mask(model)")
        return cls(attention, mlp, token, granularity)

    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds that were searched anywhere."""
        return tuple(k for k in KINDS if any(each is not None for each in getattr(self, k)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors named blocks.<i>.<kind>, beside and then renamed."""
        tensors = {
            f"blocks.{index}.{kind}": values
            for kind in KINDS
            for index, values in enumerate(getattr(self, kind))
            if values is not None
        }
        # One key, because safetensors writes several in no particular order.
        facts = {"blocks": len(self.mlp), "granularity": self.granularity}
        atomic_safetensors(path, tensors, {"masks": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Masks":
        """Reads what `save` wrote; raises VitslimError if it is anything else."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["masks"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            depth, granularity = int(facts["blocks"]), str(facts["granularity"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise VitslimError(f"cannot read masks from {path}: {error}") from None
        columns = {
            kind: [tensors.get(f"blocks.{index}.{kind}") for index in range(depth)]
            for kind in KINDS
        }
        return cls(**columns, granularity=granularity)


def mask_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the learnable masks of a model with their names; token masks as raw values."""
    return [
        (f"{name}.{'raw' if kind == 'token' else 'mask'}", parameter)
        for name, kind, _, parameter in _walk(unwrap_model(model))
    ]


def sparsity_loss(
    model: nn.Module, attention: float = 2e-4, mlp: float = 5e-5, token: float = 1e-4
) -> Tensor:
    """Returns the search's penalty, a float32 scalar to add to the loss once per step.

        w_attention |head masks|_1 + w_mlp |mlp masks|_1 + w_token |tanh(raw)|_1

    It is the same for any number of processes: nothing is divided by their count.

    Args:
        model: A masked model, bare or wrapped by DistributedDataParallel or torch.compile.
        attention: Weight of the attention masks; the paper's values are the defaults.
        mlp: Weight of the MLP masks.
        token: Weight of the token gates.
    """
    weights = {"attention": attention, "mlp": mlp, "token": token}
    parts: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for _, kind, module, parameter in _walk(unwrap_model(model)):
        values = module.gate() if isinstance(module, TokenGate) else parameter
        parts[kind].append(values.float().flatten())
    if not any(parts.values()):
        raise VitslimError("the model has no masks to penalise; make them with vitslim.mask(model)")
    # One norm per kind rather than one per layer: two small kernels instead of two dozen.
    sums = [weights[k] * torch.cat(values).abs().sum() for k, values in parts.items() if values]
    return torch.stack(sums).sum()


def _walk(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    for name, module in model.named_modules():
        if isinstance(module, MaskedAttention):
            yield name, "attention", module, module.mask
        elif isinstance(module, MaskedMlp):
            yield name, "mlp", module, module.mask
        elif isinstance(module, TokenGate):
            yield name, "token", module, module.raw


def _copy(values: Tensor) -> Tensor:
    return values.detach().float().cpu().clone()
