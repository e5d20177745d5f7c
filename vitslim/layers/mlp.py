"""The MLP with a learnable mask on its hidden units while searching, and narrower when slim."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh, Mlp, QuickGELU
from torch import Tensor, nn

from ..ops import masked_mlp
from .attention import linear
from .path import fused
from .plain import features, is_hooked, is_plain, like, why_not_cut

_FUSED_ACTIVATIONS: dict[type[nn.Module], str] = {
    GELU: "gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    QuickGELU: "quick_gelu",
    GELUTanh: "gelu_tanh",
}


def why_not_mlp(module: nn.Module) -> str | None:
    """Returns why an MLP can be neither masked nor cut, or None if it can.

    To be cut its layers must be plain besides, see `why_not_cut_mlp`.
    """
    if type(module) is not Mlp:
        return f"its MLP is a {type(module).__name__}, not timm's Mlp"
    if isinstance(module.fc1, nn.Conv2d):
        return "its MLP is made of convolutions"
    if _hidden(module) is None:
        return "neither its fc1 nor its fc2 says how many hidden units there are"
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        return "its MLP normalises the hidden units, and cutting a unit changes that norm"
    return None


def why_not_cut_mlp(module: nn.Module) -> str | None:
    """Returns why an MLP, timm's or a masked one, cannot lose hidden units."""
    why = None if isinstance(module, MaskedMlp) else why_not_mlp(module)
    return why or why_not_cut({"fc1": module.fc1, "fc2": module.fc2})


def activation_name(module: nn.Module) -> str | None:
    """Returns the ops' name of an activation, None for one they have not."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _FUSED_ACTIVATIONS.get(type(module))


class _TwoLayers(nn.Module):
    """What both MLPs share: timm's layers under timm's names, fused where the device gains."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, hidden, **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, out_features or in_features, **factory)
        self.drop2 = nn.Dropout(drop)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if fused(type(self).__name__, x):
            act = self._activation_to_fuse()
            if act is not None:
                weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
                return self.drop2(masked_mlp(x, *weights, mask, act))
        hidden = self.drop1(self.act(self.fc1(x)))
        if mask is None:
            return self.drop2(self.fc2(hidden))
        if is_plain(self.fc2):
            # (h z) W^T = h (W z)^T: the mask costs one product of the size of the weight.
            return self.drop2(F.linear(hidden, self.fc2.weight * mask, self.fc2.bias))
        return self.drop2(self.fc2(hidden * mask))

    def _activation_to_fuse(self) -> str | None:
        """Returns the op's name of the activation, None where the op does not what the parts do."""
        act, drop = self.act, self.drop1
        idle = type(drop) is nn.Dropout and not (drop.training and drop.p > 0)
        called = is_hooked(act) or is_hooked(drop)
        plain = is_plain(self.fc1) and is_plain(self.fc2)
        return activation_name(act) if idle and plain and not called else None


class MaskedMlp(_TwoLayers):
    """timm's Mlp with a learnable mask on the hidden units: fc2(z * act(fc1(x))).

    Arguments are timm's. `mask` [hidden_features] starts at 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, hidden_features, out_features, act_layer, bias, drop, device, dtype
        )
        self.mask = nn.Parameter(torch.ones(self.fc1.out_features, device=device, dtype=dtype))

    @classmethod
    def from_timm(cls, mlp: Mlp) -> "MaskedMlp":
        """Takes over the parts of timm's Mlp, whatever they are; the mask starts at 1."""
        hidden = _hidden(mlp)
        masked = cls(1, hidden, device="meta")
        masked.fc1, masked.act, masked.drop1 = mlp.fc1, mlp.act, mlp.drop1
        masked.fc2, masked.drop2 = mlp.fc2, mlp.drop2
        masked.mask = nn.Parameter(like(mlp).new_ones(hidden))
        masked.training = mlp.training
        return masked

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., C] to [..., C_out]."""
        return self._forward(x, self.mask)


class SlimMlp(_TwoLayers):
    """timm's Mlp with the hidden units that were kept. Arguments are timm's."""

    @classmethod
    def from_timm(cls, mlp: Mlp | MaskedMlp, hidden: Sequence[int], fold: bool = True) -> "SlimMlp":
        """Cuts an MLP, masked or not, down to the hidden units kept.

        Args:
            mlp: timm's Mlp or a MaskedMlp; it is left as it is.
            hidden: The units kept.
            fold: Multiply what the mask learned into fc2; else it is forgotten.
        """
        fc1, fc2 = mlp.fc1, mlp.fc2
        keep = torch.tensor(list(hidden), dtype=torch.long, device=fc1.weight.device)
        out_weight = fc2.weight.detach()
        if fold and isinstance(mlp, MaskedMlp):
            out_weight = out_weight * mlp.mask.detach().to(out_weight.dtype)
        slim = cls(1, 1, device="meta")
        fc1_bias = None if fc1.bias is None else fc1.bias.detach()[keep]
        slim.fc1 = linear(fc1.weight.detach()[keep], fc1_bias, fc1)
        slim.fc2 = linear(out_weight[:, keep], fc2.bias, fc2)
        slim.act, slim.drop1, slim.drop2 = mlp.act, mlp.drop1, mlp.drop2
        slim.training = mlp.training
        return slim

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., C] to [..., C_out]."""
        return self._forward(x, None)


def _hidden(mlp: nn.Module) -> int | None:
    """Returns the hidden units of an MLP, as far as its layers say."""
    return features(mlp.fc1, "out_features") or features(mlp.fc2, "in_features")
