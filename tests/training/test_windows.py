import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from remos_hf.training.windows import TrainingData, seed_of


class Drawing(Dataset):
    """Draws from all three random states, as augmentations do."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return index, torch.rand(()).item(), random.random(), float(np.random.random())  # noqa: NPY002


class DrawingStream(IterableDataset):
    def __iter__(self):
        return (Drawing()[index] for index in range(11))


def data(dataset=None, size=2, accumulation=1, rank=0, world=1):
    return TrainingData(Drawing() if dataset is None else dataset, lambda rows: rows, size, accumulation, rank, world,
                        seed=3, workers=0, pin_memory=False)  # fmt: skip


def taken(epoch=0, skip=0, **options):
    """What each step takes: its samples, with the shares that they have in it."""
    return [
        [(row, share / len(batch)) for batch, share, _ in window.batches for row in batch]
        for window in data(**options).windows(epoch, skip)
    ]


@pytest.mark.parametrize("dataset", [Drawing(), DrawingStream()], ids=["map", "stream"])
def test_a_step_takes_the_same_samples_however_they_are_cut_and_shared_out(dataset):
    def by_step(*parts):
        return [sorted(row for part in step for row, _ in part) for step in zip(*parts, strict=True)]

    whole = by_step(taken(dataset=dataset, size=4))
    assert by_step(taken(dataset=dataset, size=2, accumulation=2)) == whole
    assert by_step(*(taken(dataset=dataset, size=2, rank=rank, world=2) for rank in range(2))) == whole
    assert sorted(row[0] for step in whole for row in step) == list(range(11))


def test_every_sample_of_a_step_weighs_the_same_also_in_the_last_one():
    for step in zip(*(taken(size=3, rank=rank, world=2) for rank in range(2)), strict=True):
        shares = [share for part in step for _, share in part]
        assert sum(shares) == pytest.approx(1)
        assert shares == pytest.approx([1 / len(shares)] * len(shares))


def test_an_epoch_taken_up_again_goes_on_where_it_was_left_and_draws_the_same():
    assert taken(skip=2) == taken()[2:]
    assert taken(epoch=1) != taken(epoch=0)


def test_loading_leaves_the_callers_random_state_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    taken()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_a_loader_or_an_empty_data_set_is_refused():
    with pytest.raises(TypeError, match="is the data set itself, but got a DataLoader"):
        data(DataLoader(Drawing()))
    with pytest.raises(ValueError, match="holds no sample"):
        data([])


def test_seeds_depend_on_all_numbers():
    assert len({seed_of(0, 0), seed_of(0, 1), seed_of(1, 0), seed_of(0, 0, 0)}) > 2
