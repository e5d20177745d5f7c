"""What a loss would feel, without labels: gradients for labels that a model itself draws."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families import Family
from .images import Images
from .watching import Point, watching


def drawn_loss(output: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Returns the sum over images of -log p(y), y drawn from the model's own output.

    Its squared gradients are the Fisher information. Features of a model without a classifier are
    the means of normal distributions of variance 1.

    Args:
        output: Of the model.
        classes: Of its classifier, 0 where there is none.
        generator: Of the random numbers, on the CPU.
    """
    if not classes:
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32)
        return (output * noise.to(output)).sum()
    labels = torch.multinomial(output.detach().softmax(-1).cpu(), 1, generator=generator)
    return F.cross_entropy(output, labels.squeeze(1).to(output.device), reduction="sum")


def felt_tokens(
    model: Any,
    family: Family,
    images: Images,
    *,
    most: int = 256,
    seed: int = 0,
    quiet: bool = False,
) -> list[list[Tensor]]:
    """Returns by block how much the loss feels of each token after each of its halves.

    That is the mean over images of |g|^2, [tokens], g being the gradient in the residual stream.
    Where a class token alone is read, it is all that counts after the last block.

    Args:
        model: Dense or masked, in evaluation mode.
        family: Of it.
        images: That it looks at.
        most: Images that are enough.
        seed: Of the labels that are drawn.
        quiet: Whether there is no progress bar.
    """
    sites, generator = family.sites(model), torch.Generator().manual_seed(seed)
    points: list[Point] = []
    for index, site in enumerate(sites):
        for half in family.halves(site.block)[1:]:
            points.append(Point((index, len(points)), half.norm, "input"))
        points.append(Point((index, len(points)), site.block, "output"))
    sums: dict[Any, Any] = {point.key: 0 for point in points}
    images = images.evenly(most)
    for batch, _ in images.shown("gradients", quiet):
        with watching(points) as seen, torch.enable_grad():
            output = model(batch.detach().clone().requires_grad_())
            loss = drawn_loss(output, int(getattr(model, "num_classes", 0)), generator)
        slopes = torch.autograd.grad(loss, [seen[key] for key in sums])
        for key, slope in zip(sums, slopes, strict=True):
            sums[key] = sums[key] + slope.double().square().sum((0, 2))
    felt: list[list[Tensor]] = [[] for _ in sites]
    for (index, _), total in sums.items():
        felt[index].append(total / images.count)
    return felt
