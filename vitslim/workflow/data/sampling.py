"""Which image comes when, and with which random numbers: (seed, epoch, position) alone decides.

An epoch is a list of positions. Each has an image and a seed of its own, from which that image is
augmented. So an epoch is the same for any number of workers and processes and from any batch on.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

# Sets the seeds of erasing apart from those of the other augmentation of the same image, and both
# from those of an update of the weights.
ERASING, UPDATE = 1, 2


class Key(NamedTuple):
    """One position of an epoch and the image that stands there."""

    image: int
    epoch: int
    position: int


class Order(Sampler[list[Key]]):
    """The batches of one process: its share of one permutation that all processes have.

    Only whole global batches are given: positions [k * batch_size * size, (k + 1) * batch_size *
    size) are batch k, of which process `rank` takes those p with p % size == rank.

    Args:
        images: How many there are; an epoch has as many positions, less the last partial batch.
        batch_size: Images at a time in each process.
        seed: Of the permutation, together with the epoch.
        rank: This process among all of them.
        size: How many processes there are.
        repeats: Repeated augmentation: how often in a row an image of the permutation comes. The
            copies are augmented apart, and land in different processes where there are several.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
        repeats: int = 1,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.size, self.repeats = rank, size, max(repeats, 1)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.images // (self.batch_size * self.size)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yields the batches of `self.epoch` from number `self.start` on."""
        epoch, step = self.epoch, self.batch_size * self.size
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        order = np.random.default_rng(sequence).permutation(self.images)
        for first in range(self.start * step, len(self) * step, step):
            positions = np.arange(first + self.rank, first + step, self.size)
            images = order[positions // self.repeats].tolist()
            yield [Key(i, epoch, p) for i, p in zip(images, positions.tolist(), strict=True)]


class Seeded(Dataset[Any]):
    """Fetches and augments every image with the random numbers of its own key."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        seed_from(self.seed, key.epoch, key.position)
        return self.dataset[key.image]


class SeededErasing:
    """timm's random erasing of a batch on the device, every image from a seed of its own."""

    def __init__(self, erase: Any, seed: int, batch_size: int, rank: int, size: int) -> None:
        self.erase, self.seed = erase, seed
        self.batch_size, self.rank, self.size = batch_size, rank, size
        self.begin(0, 0)

    def begin(self, epoch: int, start: int) -> None:
        """Says that the next batch is number `start` of an epoch."""
        self.epoch = epoch
        self.positions = itertools.count(start * self.batch_size * self.size + self.rank, self.size)

    def __call__(self, images: Tensor) -> Tensor:
        generator = torch.default_generator
        if images.is_cuda:
            generator = torch.cuda.default_generators[images.device.index]
        # The positions come second, so that none is taken when the images have run out.
        for image, position in zip(images, self.positions, strict=False):
            seed_from(self.seed, self.epoch, position, ERASING, generator=generator)
            self.erase(image)
        return images


def seed_from(seed: int, *key: int, generator: Any = None) -> None:
    """Seeds random, numpy and torch from numbers that may be as alike as consecutive ones.

    Args:
        seed: Not negative.
        key: Further numbers, not negative; another count of them gives other seeds.
        generator: The generator of torch to seed; None is the one of the CPU.
    """
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(9)
    # random and numpy are the same generator: with the same words they draw the same numbers.
    random.seed(int.from_bytes(words[:4].tobytes(), "little"))
    np.random.seed(words[4:8])
    # torch.manual_seed would take longer, for it goes through the generators of all devices.
    (generator or torch.default_generator).manual_seed(int(words[8]))


@contextmanager
def untouched_random(device: torch.device) -> Iterator[None]:
    """Gives random, numpy and torch, also on the device, their states back after the block."""
    numbers, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(array)
