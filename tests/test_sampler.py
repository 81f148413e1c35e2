"""The order of training: what a batch holds follows from seed and number alone, and proportions hold exactly."""

from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from multiview.rig import load_rig
from multiview.sampler import MixedDataset, StepSampler, load_batches, mixed_lists

LENGTHS, PERCENTS = [30, 7, 50], [30, 45, 25]
OWNERS = [part for part, length in enumerate(LENGTHS) for _ in range(length)]  # data set of a sample


def mixture(batch_size: int = 6, **options) -> StepSampler:
    return StepSampler(LENGTHS, batch_size, **{"seed": 5, "percents": PERCENTS, **options})


def test_one_data_set_is_visited_whole_before_it_is_visited_again():
    keys = StepSampler([7], 28, seed=5).batch(0)
    assert sorted(keys) == [(epoch, index) for epoch in range(4) for index in range(7)]
    orders = {tuple(index for e, index in keys if e == epoch) for epoch in range(4)}
    assert len(orders) == 4 and tuple(range(7)) not in orders


def test_every_window_has_the_exact_proportions_in_an_order_of_its_own():
    windows = [tuple(OWNERS[index] for _, index in mixture(20).batch(window)) for window in range(6)]
    assert all(Counter(window) == {0: 6, 1: 9, 2: 5} for window in windows) and len(set(windows)) == 6
    for percents, window in (([70, 30], 10), ([67, 33], 100)):
        assert StepSampler([5, 5], 1, seed=0, percents=percents).window == window


def test_every_data_set_of_a_mixture_has_epochs_of_its_own():
    keys, start = mixture(2000).batch(0), 0
    for part, (length, percent) in enumerate(zip(LENGTHS, PERCENTS)):
        own = [(epoch, index - start) for epoch, index in keys if OWNERS[index] == part]
        for epoch in range(len(own) // length):
            visit = own[epoch * length : (epoch + 1) * length]
            assert sorted(visit) == [(epoch, index) for index in range(length)]
        assert len(own) == 2000 * percent // 100
        start += length


def test_global_batches_depend_on_seed_and_number_only():
    def batches(start: int, world_size: int, batch_size: int, seed: int = 5) -> list[list[tuple[int, int]]]:
        options = {"seed": seed, "world_size": world_size, "start": start, "stop": 30}
        ranks = [list(mixture(batch_size, rank=rank, **options)) for rank in range(world_size)]
        return [sum(keys, []) for keys in zip(*ranks)]

    whole = batches(0, 1, 6)
    assert len(whole) == 30
    assert batches(0, 3, 2) == whole and batches(17, 2, 3) == whole[17:]  # other processes; resumed
    assert batches(0, 1, 6, seed=6) != whole
    assert list(islice(mixture(start=4), 3)) == whole[4:7]  # without an end


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([], (["main"], [100])), ([0.3], (["main", "a"], [70, 30])), ([0.7, 0.3], (["a", "b"], [70, 30])),
        ([1 / 3, 1 / 3], (["main", "a", "b"], [34, 33, 33])), ([0.125], (["main", "a"], [88, 12])),
        ([0.7, 0.7], "add up to at most 1"),
        ([0.5, 0.0], "above 0"), ([0.001], "never drawn"), ([0.999], "never drawn"),
    ],
)  # fmt: skip
def test_shares_add_up_to_100_percent_or_are_refused(shares, expected):
    """One meaning in both stages: what the shares leave of 1 comes from the main list."""
    others = list(zip("ab", shares))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            mixed_lists("main", others)
    else:
        lists, percents = mixed_lists("main", others)
        assert lists == expected[0] and sorted(percents) == sorted(expected[1]) and sum(percents) == 100


class Numbers(Dataset):
    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.rig, self.list_file = count, error, load_rig("mouse6"), "numbers.txt"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key) -> dict[str, torch.Tensor]:
        if self.error is not None and key[1] == 2:
            raise self.error
        return {"key": torch.tensor(key)}


def test_a_mixture_finds_the_data_set_of_a_sample():
    mixed = MixedDataset([Numbers(3), Numbers(2)])
    assert mixed[7, 4]["key"].tolist() == [7, 1] and mixed.part(2) == (mixed.parts[0], 2) and len(mixed) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_samples_own_error_comes_out_of_the_loader_workers(workers):
    """One sentence, as raised; not the worker's traceback around it."""
    sampler, device = StepSampler([4], 2, seed=0, stop=4), torch.device("cpu")
    batches = list(load_batches(Numbers(4), sampler, workers, device))
    assert [batch["key"].tolist() for batch in batches] == [[list(key) for key in batch] for batch in sampler]
    with pytest.raises(ValueError) as caught:
        list(load_batches(Numbers(4, ValueError("sample 2 is damaged")), sampler, workers, device))
    assert str(caught.value) == "sample 2 is damaged"


def test_small_shared_memory_is_one_sentence(monkeypatch):
    def loader(*_, **__):
        yield from ()
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    monkeypatch.setattr("multiview.sampler.DataLoader", loader)
    with pytest.raises(ValueError, match="/dev/shm.*too small.*--shm-size"):
        next(load_batches(Numbers(4), StepSampler([4], 2, seed=0), 2, torch.device("cpu")))
