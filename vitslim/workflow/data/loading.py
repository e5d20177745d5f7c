"""Training batches epoch by epoch, from timm's loader around our order of the images."""

import functools
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import VitslimError
from ..options.settings import Settings
from ..runtime.interrupt import SIGNALS
from ..runtime.world import World
from .sampling import Deal, Order, Seeded, SeededErasing
from .streams import Stream


class Loader(DataLoader[Any]):
    """torch's DataLoader, whose workers end when they are told to.

    They leave signals to the main process, also the one with which Python ends its children when it
    exits: whoever takes batches has to `close`, or Python waits for the workers for ever.
    """

    _begun: Any = None

    def __iter__(self) -> Any:
        """Begins the batches anew; workers that persist are those of before."""
        self._begun = super().__iter__()
        return self._begun

    def close(self) -> None:
        """Ends the workers, if there are any; whoever iterates again begins new ones."""
        # Without workers the iterator has none to end.
        if hasattr(self._begun, "_shutdown_workers"):
            self._begun._shutdown_workers()
        self._begun = self._iterator = None


def around(loader: Any, dataset: Any, **how: Any) -> Any:
    """Gives a loader of timm's another dataset, and keeps timm's collate function and prefetcher.

    Args:
        loader: What `create_loader` made.
        dataset: Stands in for the loader's own, and gives what that one gives.
        how: What else is to be told to the `Loader`.
    """
    inner = within(loader)
    other = Loader(
        dataset,
        num_workers=inner.num_workers,
        collate_fn=inner.collate_fn,
        pin_memory=inner.pin_memory,
        worker_init_fn=functools.partial(_begin_worker, inner.worker_init_fn),
        **how,
    )
    if inner is loader:
        return other
    loader.loader = other
    return loader


def within(loader: Any) -> Any:
    """Returns the loader of torch's that is in timm's prefetcher, or is the loader itself."""
    return loader.loader if isinstance(loader, PrefetchLoader) else loader


def _begin_worker(begin: Callable[[int], None] | None, number: int) -> None:
    """Leaves signals to the main process, which finishes its update with what workers load."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if begin is not None:
        begin(number)


class Ordered:
    """Batches of a dataset whose images are read by index.

    Args:
        loader: timm's, around the images.
        dataset: The images.
        settings: Batch size, repeats, workers and seed.
        world: The processes that share every global batch.
    """

    def __init__(self, loader: Any, dataset: Any, settings: Settings, world: World) -> None:
        deal = _dealt(settings, world)
        self.order = Order(len(dataset), deal, settings.seed, repeats=settings.aug_repeats)
        self.erasing = _seed_erasing(loader, settings.seed, deal)
        self.loader = around(
            loader,
            Seeded(dataset, settings.seed),
            batch_sampler=self.order,
            # Every key brings its own seed, so that a worker may live on from epoch to epoch.
            persistent_workers=settings.workers > 0,
        )

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.order)

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch from number `start` on."""
        self.order.epoch, self.order.start = epoch, start
        if self.erasing is not None:
            self.erasing.begin(epoch, start)
        yield from self.loader


class Streamed:
    """Batches of a stream; to start within an epoch, it is read from its beginning.

    Which image comes when depends on the number of workers and processes here, for each reads
    files of its own.

    Args:
        loader: timm's, around the stream.
        stream: The images.
        settings: Batch size and seed.
        world: The processes that share the stream.
    """

    def __init__(self, loader: Any, stream: Stream, settings: Settings, world: World) -> None:
        self.dataset, self.settings, self.rank = stream.dataset, settings, world.rank
        self.steps = len(stream.dataset) // settings.batch_size
        self.erasing = _seed_erasing(loader, settings.seed, _dealt(settings, world))
        # The workers are fresh in every epoch, and take their seeds from this generator.
        self.generator = torch.Generator()
        self.loader = around(
            loader,
            stream,
            batch_size=settings.batch_size,
            drop_last=True,
            generator=self.generator,
        )

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.steps

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch from number `start` on."""
        sequence = np.random.SeedSequence(self.settings.seed, spawn_key=(epoch, self.rank))
        self.generator.manual_seed(int(sequence.generate_state(1)[0]))
        self.dataset.set_epoch(epoch)
        if self.erasing is not None:
            self.erasing.begin(epoch, 0)
        seen = 0
        for batch in islice(self.loader, self.steps):
            seen += 1
            if seen > start:
                yield batch
        if seen < self.steps:
            raise VitslimError(
                f"{self.settings.data} ended after {seen} of {self.steps} batches: correct "
                "--train-num-samples, or lower --workers to at most one per file and process."
            )


def _dealt(settings: Settings, world: World) -> Deal:
    return Deal(settings.batch_size, world.rank, world.size, settings.grad_accum_steps)


def _seed_erasing(loader: Any, seed: int, deal: Deal) -> SeededErasing | None:
    """Seeds the erasing that timm's prefetcher does on the device, where there is any."""
    if getattr(loader, "random_erasing", None) is None:
        return None
    loader.random_erasing = SeededErasing(loader.random_erasing, seed, deal)
    return loader.random_erasing
