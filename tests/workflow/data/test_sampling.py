"""The order of an epoch and its random numbers, from seed, epoch and position alone."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from vitslim.workflow.data.sampling import (
    Deal,
    Key,
    Order,
    Seeded,
    SeededErasing,
)
from vitslim.workflow.runtime.seeds import seed_from, untouched_random


def _order(
    images: int = 50,
    batch_size: int = 4,
    epoch: int = 0,
    start: int = 0,
    seed: int = 7,
    repeats: int = 1,
    **deal: int,
) -> Order:
    order = Order(images, Deal(batch_size, **deal), seed, repeats)
    order.epoch, order.start = epoch, start
    return order


def _drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_an_epoch_has_every_image_once_but_for_the_last_partial_batch() -> None:
    keys = [key for batch in _order() for key in batch]
    assert len(_order()) == 12
    assert len({key.image for key in keys}) == len(keys) == 48
    assert [key.position for key in keys] == list(range(48))


def test_the_order_depends_on_seed_and_epoch() -> None:
    def images(**more: int) -> list[int]:
        return [key.image for batch in _order(**more) for key in batch]

    assert images() == images()
    assert len({tuple(images(**m)) for m in ({}, {"seed": 8}, {"epoch": 1}, {"epoch": 2})}) == 4


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("processes", "batches"), [(2, 1), (3, 1), (1, 2), (2, 3)])
def test_an_update_is_the_same_images_however_it_is_dealt(processes, batches, repeats) -> None:
    count = processes * batches
    alone = list(_order(batch_size=4 * count, repeats=repeats))
    deals = [{"rank": r, "processes": processes, "batches": batches} for r in range(processes)]
    dealt = [list(_order(repeats=repeats, **deal)) for deal in deals]
    assert [len(each) for each in dealt] == [batches * len(alone)] * processes
    for number, update in enumerate(alone):
        for batch in range(count):
            turn, rank = divmod(batch, processes)
            assert dealt[rank][number * batches + turn] == update[batch::count]


def test_a_batch_is_the_same_whichever_process_makes_it() -> None:
    in_turn = list(_order(batches=4))
    for rank in range(2):
        two = list(_order(batches=2, processes=2, rank=rank))
        assert two == in_turn[rank::2]
    for rank in range(4):
        assert list(_order(processes=4, rank=rank)) == in_turn[rank::4]


def test_an_epoch_can_begin_at_any_batch() -> None:
    whole = list(_order(processes=2, rank=1, batches=2, epoch=3))
    for start in (0, 1, 4, len(whole)):
        assert list(_order(processes=2, rank=1, batches=2, epoch=3, start=start)) == whole[start:]


def test_repeats_stand_side_by_side_in_an_epoch_of_the_same_length() -> None:
    plain = [key.image for batch in _order() for key in batch]
    keys = [key for batch in _order(repeats=3) for key in batch]
    assert [key.image for key in keys] == [image for image in plain[:16] for _ in range(3)]
    assert len({key.position for key in keys}) == len(keys) == 48
    # The three copies of an image land in the three batches of an update.
    deals = [{"rank": rank, "processes": 3, "repeats": 3} for rank in range(3)]
    ranks = [{key.image for batch in _order(**deal) for key in batch} for deal in deals]
    assert ranks[0] == ranks[1] == ranks[2]
    images = Counter(key.image for batch in _order(**deals[0]) for key in batch)
    assert set(images.values()) == {1}


def test_the_three_generators_are_seeded_apart_from_alike_numbers() -> None:
    drawn = {}
    for key in [(seed, e, p) for seed in (0, 1) for e in range(3) for p in range(50)] + [
        (0,),
        (1,),
    ]:
        seed_from(*key)
        drawn[key] = _drawn()
    assert len({number for numbers in drawn.values() for number in numbers}) == 3 * len(drawn)
    seed_from(1, 2, 30)
    assert _drawn() == drawn[1, 2, 30]
    # As good as uniform, although the seeds are consecutive.
    assert abs(np.mean(list(drawn.values())) - 0.5) < 0.04


def test_an_item_has_the_random_numbers_of_its_key_alone() -> None:
    class Draws:
        def __getitem__(self, index: int) -> tuple[int, tuple[float, float, float]]:
            return index, _drawn()

    dataset = Seeded(Draws(), seed=3)
    first = dataset[Key(5, 0, 1)]
    assert dataset[Key(5, 0, 2)][1] != first[1]
    assert dataset[Key(5, 1, 1)][1] != first[1]
    assert Seeded(Draws(), seed=4)[Key(5, 0, 1)][1] != first[1]
    assert dataset[Key(5, 0, 1)] == first


def test_random_states_are_given_back_even_after_an_error() -> None:
    seed_from(1)
    expected = _drawn()
    seed_from(1)
    with pytest.raises(ZeroDivisionError), untouched_random(torch.device("cpu")):
        seed_from(2)
        _ = 1 / 0
    assert _drawn() == expected


def test_erasing_is_the_same_for_any_start_and_any_number_of_processes() -> None:
    def erased(start: int, batch_size: int = 8, **deal: int) -> torch.Tensor:
        erase = RandomErasing(0.5, mode="pixel", device="cpu")
        erasing = SeededErasing(erase, 7, Deal(batch_size, **deal))
        erasing.begin(2, start)
        return torch.stack([erasing(torch.zeros(batch_size, 3, 8, 8)) for _ in range(start, 4)])

    alone = erased(0)
    # About half of the images, and no two alike.
    touched = {tuple(image.flatten().tolist()) for image in alone.flatten(0, 1) if image.any()}
    assert 6 < len(touched) < 26
    assert torch.equal(erased(1), alone[1:])
    for rank in range(2):
        assert torch.equal(erased(0, 4, rank=rank, processes=2), alone[:, rank::2])
        assert torch.equal(erased(0, 4, batches=2)[rank::2], alone[:2, rank::2])
