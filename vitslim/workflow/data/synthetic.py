"""Random images that are never read, to measure how fast a model trains without its data."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

# What an epoch of ImageNet has, where nothing else is asked for.
IMAGENET_TRAIN, IMAGENET_VAL = 1281167, 50000
DIFFERENT_BATCHES = 2


class Synthetic:
    """A few batches of noise with random labels, made once on the device and given in turns.

    Args:
        images: How many an epoch has in this process.
        batch_size: Images at a time.
        shape: Of one image [channels, height, width].
        num_classes: Labels are below it.
        device: Where the images are made and stay.
        seed: Of images and labels.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        shape: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.images, self.batch_size = images, batch_size
        generator = torch.Generator(device).manual_seed(seed)
        self.batches = [
            (
                torch.randn(batch_size, *shape, generator=generator, device=device),
                torch.randint(num_classes, (batch_size,), generator=generator, device=device),
            )
            for _ in range(DIFFERENT_BATCHES)
        ]

    def __len__(self) -> int:
        """Whole batches per epoch."""
        return self.images // self.batch_size

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the whole batches from number `start` on, the same in every epoch."""
        return islice(self, start, len(self))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every image, the last ones in a smaller batch."""
        for number, first in enumerate(range(0, self.images, self.batch_size)):
            images, target = self.batches[number % DIFFERENT_BATCHES]
            count = min(self.batch_size, self.images - first)
            # Mixup writes into the images it is given.
            yield images[:count].clone(), target[:count].clone()
