"""The models that benchmarks run: DeiT dense, searched and cut to a budget; and a training step."""

from collections.abc import Callable

import shapes
import timm
import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor, nn

import vitslim
from vitslim.masks import mask_parameters

NAMES = {"T": "deit_tiny_patch16_224", "S": "deit_small_patch16_224", "B": "deit_base_patch16_224"}


def dense(shape: Shape, image: int | None = None) -> nn.Module:
    """Returns timm's model with random weights, for images of another size if that is given."""
    sizes = {}
    if shapes.SMOKE:
        sizes = {"depth": shapes.DEPTH, "img_size": shapes.IMAGE, "num_classes": shapes.CLASSES}
        sizes |= {"embed_dim": shape.embed_dim, "num_heads": shape.heads}
    if image is not None:
        sizes["img_size"] = image
    return timm.create_model(NAMES[shape.name], **sizes)


def images(
    batch: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    image: int | None = None,
) -> Tensor:
    """Returns random images, [B, 3, H, W], of another size if that is given."""
    size = image or shapes.IMAGE
    return torch.randn(batch, 3, size, size, device=device).to(dtype)


def searched(model: nn.Module) -> nn.Module:
    """Returns the model with masks as a search leaves them: every head has a level of its own."""
    masked = vitslim.mask(model, kinds=("attention", "mlp"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, mask in mask_parameters(masked):
            levels = torch.rand(*mask.shape[:-1], 1, generator=generator) + 0.3
            mask.copy_(levels * torch.rand(mask.shape, generator=generator))
    return masked


def slim_at_60(masked: nn.Module) -> tuple[nn.Module, float]:
    """Returns a searched model cut to 60% of its MACs, and the ratio of the MACs."""
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%", round_to=8)).eval()
    return slim, vitslim.cost(masked).macs / vitslim.cost(slim).macs


class Step:
    """A step of training, or of a search, on one batch: call it to make one.

    Args:
        model: Whose parameters get gradients; with masks, the search's penalty is added.
        batch: Images and their targets.
        network: What is called instead of the model: the model compiled.
        autocast: The dtype of products, None for the parameters' own.
        optimizer: Makes the update; None leaves that out.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        network: Callable[[Tensor], Tensor] | None = None,
        autocast: torch.dtype | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model, self.network = model, network or model
        self.x, self.target = batch
        self.autocast, self.optimizer = autocast, optimizer
        self.penalised = bool(mask_parameters(model))

    def __call__(self) -> None:
        """Forward, loss, penalty, backward, update; no gradient is left afterwards."""
        device = self.x.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            loss = F.cross_entropy(self.network(self.x), self.target)
        if self.penalised:
            loss = loss + vitslim.sparsity_loss(self.model)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def resident_mib(self) -> float:
        """Returns the MiB of parameters, buffers and the optimizer's state."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                kept += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(each.nbytes for each in kept) / 2**20
