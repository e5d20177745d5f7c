"""Which image comes when, and with which random numbers: (seed, epoch, position) alone decides.

An epoch is a list of positions. Each has an image and a seed of its own, from which that image is
augmented. So an epoch is the same for any number of workers and processes and from any update on.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..runtime.seeds import ERASING, seed_from


class Key(NamedTuple):
    """One position of an epoch and the image that stands there."""

    image: int
    epoch: int
    position: int


class Deal(NamedTuple):
    """What one process has of every update: the positions of each of its batches.

    The positions of an update are dealt in turn among all its batches, those of every process and
    those that one process makes after another. So a batch is the same whichever process makes it.

    Args:
        batch_size: Images at a time in each process.
        rank: This process among all of them.
        processes: How many there are.
        batches: How many of an update each process makes.
    """

    batch_size: int
    rank: int = 0
    processes: int = 1
    batches: int = 1

    @property
    def images(self) -> int:
        """Positions of a whole update."""
        return self.batch_size * self.processes * self.batches

    def positions(self, number: int) -> range:
        """Returns the positions of batch `number` of an epoch of this process."""
        update, turn = divmod(number, self.batches)
        first = update * self.images + turn * self.processes + self.rank
        return range(first, first + self.images, self.processes * self.batches)


class Order(Sampler[list[Key]]):
    """The batches of one process: its part of one permutation that all processes have.

    Args:
        images: How many there are; an epoch has as many positions, less the last partial update.
        deal: Which positions come when in this process.
        seed: Of the permutation, together with the epoch.
        repeats: Repeated augmentation: how often in a row an image of the permutation comes. The
            copies are augmented apart, and land in different batches where an update has several.
    """

    def __init__(self, images: int, deal: Deal, seed: int, repeats: int = 1) -> None:
        self.images, self.deal = images, deal
        self.seed, self.repeats = seed, max(repeats, 1)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.images // self.deal.images * self.deal.batches

    def __iter__(self) -> Iterator[list[Key]]:
        """Yields the batches of `self.epoch` from number `self.start` on."""
        epoch = self.epoch
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        order = np.random.default_rng(sequence).permutation(self.images).tolist()
        for number in range(self.start, len(self)):
            yield [
                Key(order[position // self.repeats], epoch, position)
                for position in self.deal.positions(number)
            ]


class Seeded(Dataset[Any]):
    """Fetches and augments every image with the random numbers of its own key."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        seed_from(self.seed, key.epoch, key.position)
        return self.dataset[key.image]


class SeededErasing:
    """timm's random erasing of a batch on the device, every image from a seed of its own."""

    def __init__(self, erase: Any, seed: int, deal: Deal) -> None:
        self.erase, self.seed, self.deal = erase, seed, deal
        self.begin(0, 0)

    def begin(self, epoch: int, start: int) -> None:
        """Says that the next batch is number `start` of an epoch."""
        self.epoch, self.numbers = epoch, itertools.count(start)

    def __call__(self, images: Tensor) -> Tensor:
        generator = torch.default_generator
        if images.is_cuda:
            generator = torch.cuda.default_generators[images.device.index]
        positions = self.deal.positions(next(self.numbers))
        for image, position in zip(images, positions, strict=True):
            seed_from(self.seed, self.epoch, position, ERASING, generator=generator)
            self.erase(image)
        return images
