"""Masks: what a search learned, read from a model, penalised, saved, loaded."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .allowed import KINDS, SPREADS
from .cost import block_shapes
from .errors import VitslimError
from .families import family_of
from .files import atomic_safetensors
from .layers import MaskedAttention, MaskedMlp, TokenGate
from .layers.walk import MaskedPart, masked_parts
from .wrapped import bare, whole


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
        """Reads the masks of a masked model, wrapped or not, as float32 copies on the CPU.

        Of a sharded model (FSDP2) all processes must ask, and each gets them whole.
        """
        model = bare(model)
        attention: list[Tensor | None] = []
        mlp: list[Tensor | None] = []
        token: list[Tensor | None] = []
        granularity = "head_dim"
        for site in family_of(model, "searched").sites(model):
            block = site.block
            attn: Any = getattr(block, "attn", None)
            has_attention = isinstance(attn, MaskedAttention)
            if has_attention:
                granularity = attn.granularity
            attention.append(_copy(attn.expanded_mask()) if has_attention else None)
            hidden = getattr(block, "mlp", None)
            mlp.append(_copy(hidden.mask) if isinstance(hidden, MaskedMlp) else None)
            gates = getattr(block, "tokens", None)
            token.append(_copy(gates.gate()) if isinstance(gates, TokenGate) else None)
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
        (f"{part.name}.{'raw' if part.kind == 'token' else 'mask'}", part.parameter)
        for part in masked_parts(bare(model))
    ]


def sparsity_loss(
    model: nn.Module,
    attention: float = 2e-4,
    mlp: float = 5e-5,
    token: float = 1e-4,
    per: str = "kind",
) -> Tensor:
    """Returns the search's penalty, a float32 scalar to add to the loss once per step.

        w_attention |head masks|_1 + w_mlp |mlp masks|_1 + w_token |tanh(raw)|_1

    This is the paper's. With another `per` the same total weight is spread over the units of all
    kinds in another way, see `mask_weights`. It is the same for any number of processes: nothing
    is divided by their count, and of sharded masks every process gets the whole penalty.

    Args:
        model: A masked model, bare or wrapped by DistributedDataParallel or torch.compile; its
            masks may be sharded (FSDP2).
        attention: Weight of the attention masks; the paper's values are the defaults.
        mlp: Weight of the MLP masks.
        token: Weight of the token gates.
        per: "kind", the paper's, "unit" or "mac".
    """
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for part, weight in mask_weights(model, attention, mlp, token, per):
        values: Any = part.values().float()
        where = (values.device_mesh, values.placements) if hasattr(values, "placements") else ()
        groups.setdefault((part.kind, weight, *where), []).append(values)
    # One norm per weight rather than one per layer: two small kernels instead of two dozen.
    sums = [weight * _norm(values, *where) for (_, weight, *where), values in groups.items()]
    return torch.stack(sums).sum()


def mask_weights(
    model: nn.Module,
    attention: float = 2e-4,
    mlp: float = 5e-5,
    token: float = 1e-4,
    per: str = "kind",
) -> list[tuple[MaskedPart, float]]:
    """Returns every mask with the penalty's weight, one for all its elements; kind by kind.

    With n_k units of kind k, a unit being an element of a mask, and c_i the MACs of unit i:

        kind   w_i = w_k                       of the unit's own kind, as in the paper
        unit   w_i = W / sum_k n_k             the same for every unit
        mac    w_i = W c_i / sum_j c_j         the same for every MAC

    where W = sum_k w_k n_k, what the paper's weights come to in total, in all three.

    Args:
        model: A masked model, wrapped or not.
        attention: The weight w_k of the attention masks.
        mlp: Of the MLP masks.
        token: Of the token gates.
        per: "kind", "unit" or "mac".
    """
    if per not in SPREADS:
        raise VitslimError(f"a penalty is spread per {', '.join(SPREADS)}, not per {per!r}")
    model = bare(model)
    parts = sorted(masked_parts(model), key=lambda part: KINDS.index(part.kind))
    if not parts:
        raise VitslimError("the model has no masks to penalise; make them with vitslim.mask(model)")
    weights = {"attention": attention, "mlp": mlp, "token": token}
    if per == "kind":
        return [(part, weights[part.kind]) for part in parts]
    units = [part.parameter.numel() for part in parts]
    costs = _unit_macs(model, parts) if per == "mac" else [1] * len(parts)
    total = sum(weights[part.kind] * count for part, count in zip(parts, units, strict=True))
    share = total / sum(count * each for count, each in zip(units, costs, strict=True))
    return [(part, share * each) for part, each in zip(parts, costs, strict=True)]


def _unit_macs(model: nn.Module, parts: list[MaskedPart]) -> list[int]:
    """Returns for every mask the MACs behind one of its elements."""
    macs: dict[nn.Module | None, int] = {}
    sites = family_of(model, "searched").sites(model)
    for (_, block, *_), shape in zip(sites, block_shapes(model), strict=True):
        dim, hidden, place = shape.unit_macs()
        macs |= {block.mlp: hidden, getattr(block, "tokens", None): place}
        if isinstance(block.attn, MaskedAttention):
            # A value that heads or dimensions share stands for all of them.
            macs[block.attn] = dim * (shape.attn_dim // block.attn.mask.numel())
    return [macs[part.module] for part in parts]


def _norm(values: list[Tensor], mesh: Any = None, placements: tuple[Any, ...] = ()) -> Tensor:
    """Returns the l1 norm of tensors; of sharded ones, the whole norm in every process."""
    if mesh is None:
        return torch.cat([each.flatten() for each in values]).abs().sum()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    own: Any = _norm([each.to_local() for each in values])
    summed = [Partial() if place.is_shard() else Replicate() for place in placements]
    whole: Tensor = DTensor.from_local(own, mesh, summed, run_check=False).full_tensor()
    return whole


def _copy(values: Tensor) -> Tensor:
    return whole(values.detach()).float().cpu().clone()
