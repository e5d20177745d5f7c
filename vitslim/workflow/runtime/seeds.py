"""Seeds of torch, numpy and random, so that whatever is drawn can be drawn again."""

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Sets the seeds of erasing apart from those of the other augmentation of the same image, and both
# from those of an update of the weights.
ERASING, UPDATE = 1, 2


def seed_from(seed: int, *key: int, generator: Any = None) -> None:
    """Seeds random, numpy and torch from numbers that may be as alike as consecutive ones.

    Args:
        seed: Not negative.
        key: Further numbers, not negative; another count of them gives other seeds.
        generator: The generator of torch to seed; None is the one of the CPU.
    """
    # A hash, and for numpy a single word: an image is seeded in a third of the time that numpy's
    # SeedSequence and the four words of it would take.
    text = " ".join(map(str, (seed, *key)))
    digest = hashlib.blake2b(text.encode(), digest_size=20).digest()
    python, array, tensor = struct.unpack("<QIQ", digest)
    random.seed(python)
    np.random.seed(array)
    # torch.manual_seed would take longer, for it goes through the generators of all devices.
    (generator or torch.default_generator).manual_seed(tensor)


def seed_everything(seed: int, update: int, batch: int = 0) -> None:
    """Seeds torch, numpy and random for a batch of an update, so that it can be replayed."""
    seed_from(seed, update, batch, UPDATE)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(torch.initial_seed())


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
