"""The order of training: what a batch holds follows from seed and number alone, and proportions hold exactly."""

from collections import Counter
from itertools import islice

import pytest

from multiview.sampler import StepSampler, hundredths

LENGTHS, PERCENTS = [30, 7, 50], [30, 45, 25]


def owner(index: int) -> int:
    return [part for part, length in enumerate(LENGTHS) for _ in range(length)][index]


def mixture(batch_size: int = 6, **options) -> StepSampler:
    return StepSampler(LENGTHS, batch_size, **{"seed": 5, "percents": PERCENTS, **options})


def test_one_data_set_is_visited_whole_before_it_is_visited_again():
    sampler = StepSampler([7], 4, seed=5)
    keys = [sampler.key(position) for position in range(28)]
    assert sorted(keys) == [(epoch, index) for epoch in range(4) for index in range(7)]
    orders = {tuple(index for e, index in keys if e == epoch) for epoch in range(4)}
    assert len(orders) == 4 and tuple(range(7)) not in orders


def test_every_window_has_the_exact_proportions_in_an_order_of_its_own():
    sampler = mixture()
    windows = []
    for window in range(6):
        keys = [sampler.key(position) for position in range(window * 20, (window + 1) * 20)]
        windows.append(tuple(owner(index) for _, index in keys))
        assert Counter(windows[-1]) == {0: 6, 1: 9, 2: 5}
    assert len(set(windows)) == 6
    assert StepSampler([5, 5], 1, seed=0, percents=[70, 30]).window == 10
    assert StepSampler([5, 5], 1, seed=0, percents=[67, 33]).window == 100


def test_every_data_set_of_a_mixture_has_epochs_of_its_own():
    sampler, start = mixture(), 0
    keys = [sampler.key(position) for position in range(2000)]
    for part, (length, percent) in enumerate(zip(LENGTHS, PERCENTS)):
        own = [(epoch, index - start) for epoch, index in keys if owner(index) == part]
        for epoch in range(len(own) // length):
            visit = own[epoch * length : (epoch + 1) * length]
            assert sorted(visit) == [(epoch, index) for index in range(length)]
        assert len(own) == 2000 * percent // 100
        start += length


def test_global_batches_depend_on_seed_and_number_only():
    def batches(start: int, world_size: int, batch_size: int, seed: int = 5) -> list[list[tuple[int, int]]]:
        ranks = [
            list(mixture(batch_size, seed=seed, rank=rank, world_size=world_size, start=start, stop=30))
            for rank in range(world_size)
        ]
        return [sum(keys, []) for keys in zip(*ranks)]

    whole = batches(0, 1, 6)
    assert len(whole) == 30 == len(mixture(stop=30))
    assert batches(0, 3, 2) == whole and batches(17, 2, 3) == whole[17:]  # other processes; resumed
    assert batches(0, 1, 6, seed=6) != whole
    assert list(islice(mixture(start=4), 3)) == whole[4:7]  # without an end


def test_shares_are_rounded_to_hundredths_and_wrong_ones_refused():
    assert hundredths([0.7, 0.3]) == [70, 30] and hundredths([1 / 3, 1 / 3, 1 / 3]) in ([34, 33, 33], [33, 33, 34])
    with pytest.raises(ValueError, match="of sum 1"):
        hundredths([0.7, 0.7])
    with pytest.raises(ValueError, match="never drawn"):
        hundredths([0.999, 0.001])
    for percents in ([70, 20], [100], [100, 0]):
        with pytest.raises(ValueError, match="of sum 100"):
            StepSampler([7, 30], 4, seed=0, percents=percents)
