"""What each step of `fit` takes: the same samples on any number of processes, each augmented by its place alone."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from remos_hf.strategies.student_data import StudentData
from remos_hf.training.profiling_data import ordered_batches, samples_to_look_at

_END = object()


@dataclass(frozen=True)
class Window:
    """What one optimizer step takes, as one process sees it."""

    batches: Iterator[tuple[Any, float, bool]]  # (batch, its share of the window's samples, whether it is the last)
    ends_epoch: bool


@dataclass(frozen=True)
class TrainingData:
    """The training data as one process sees it."""

    dataset: Dataset
    collate_fn: Callable[[list], Any] | None
    batch_size: int
    accumulation: int
    rank: int
    world: int
    seed: int
    workers: int
    pin_memory: bool
    name: str = "train_dataset"

    def __post_init__(self) -> None:
        if isinstance(self.dataset, DataLoader):
            raise TypeError(
                f"{self.name} is the data set itself, but got a DataLoader. Pass loader.dataset, batch_size= and "
                "collate_fn=: fit() shuffles, shares out and resumes."
            )
        if not self.is_stream and len(self.dataset) == 0:
            raise ValueError(f"{self.name} holds no sample.")

    @property
    def is_stream(self) -> bool:
        """Whether it has no length."""
        return isinstance(self.dataset, IterableDataset)

    @property
    def window_size(self) -> int:
        """Samples of a whole step, over all processes."""
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last one may take fewer samples."""
        return -(-len(self.dataset) // self.window_size)

    def settings(self) -> dict[str, int | None]:
        """Give what decides which samples a step takes: it must not change when a run is resumed."""
        return {
            "seed": self.seed,
            "num_samples": None if self.is_stream else len(self.dataset),
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "num_processes": self.world,
        }

    def in_order(self, max_samples: int | None) -> Iterable:
        """Give this process's share, unshuffled, each sample as the first epoch augments it."""
        kind = _DrawnStream if self.is_stream else _Drawn
        return ordered_batches(
            kind(self.dataset, self.seed, epoch=0),
            self.collate_fn,
            size=self.batch_size,
            max_samples=max_samples,
            seed=self.seed,
            rank=self.rank,
            world=self.world,
            workers=self.workers,
        )

    def for_strategies(self, max_samples: int | Literal["all"] | None) -> StudentData:
        """Give it as strategies see it."""
        return StudentData(
            self.in_order,
            seed=self.seed,
            max_samples=samples_to_look_at(max_samples),
            num_samples=None if self.is_stream else len(self.dataset),
            is_stream=self.is_stream,
        )

    def windows(self, epoch: int, taken: int) -> Iterator[Window]:
        """Give what the steps of an epoch take, without those that were taken before."""
        return self._windows_of_stream(epoch, taken) if self.is_stream else self._windows_by_index(epoch, taken)

    def _windows_by_index(self, epoch: int, taken: int) -> Iterator[Window]:
        order = torch.randperm(len(self.dataset), generator=self._generator(epoch)).tolist()
        starts = range(0, len(order), self.window_size)[taken:]
        parts = [self._parts(order[start : start + self.window_size]) for start in starts]
        loader = iter(
            DataLoader(
                _Drawn(self.dataset, self.seed, epoch),
                batch_sampler=[rows for part in parts for rows, _ in part],
                collate_fn=self.collate_fn,
                num_workers=self.workers,
                pin_memory=self.pin_memory,
                generator=self._generator(epoch),  # else it would draw from the global state
            )
        )
        for place, part in enumerate(parts, start=1):
            shares = [share for _, share in part]
            yield Window(_batches(islice(loader, len(part)), shares), ends_epoch=place == len(parts))

    def _windows_of_stream(self, epoch: int, taken: int) -> Iterator[Window]:
        rows = islice(_DrawnStream(self.dataset, self.seed, epoch), taken * self.window_size, None)
        collate = default_collate if self.collate_fn is None else self.collate_fn
        window = list(islice(rows, self.window_size))
        if not window:
            raise ValueError(f"train_dataset, a stream, gave no sample for step {taken + 1} of epoch {epoch}.")
        while window:
            following = list(islice(rows, self.window_size))
            parts = self._parts(window)
            batches = (collate(part) for part, _ in parts)
            yield Window(_batches(batches, [share for _, share in parts]), ends_epoch=not following)
            window = following

    def _parts(self, window: list) -> list[tuple[list, float]]:
        """Cut a window into this process's batches, as even as can be, each with its share of the window."""
        mine = window[self.rank :: self.world]
        if not mine:  # fewer samples than processes: gradients are added up only if all take part
            return [(window[:1], 0.0)]
        pieces = -(-len(mine) // self.batch_size)
        return [(mine[piece::pieces], len(mine[piece::pieces]) / len(window)) for piece in range(pieces)]

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, epoch))


def _batches(batches: Iterator, shares: list[float]) -> Iterator[tuple[Any, float, bool]]:
    for place, (batch, share) in enumerate(zip(batches, shares, strict=True), start=1):
        yield batch, share, place == len(shares)


class _Drawn(Dataset):
    """A data set whose augmentations depend on the seed, the epoch and the sample alone."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401 - any sample
        with _randomness_of(self.seed, self.epoch, index):
            return self.dataset[index]


class _DrawnStream(IterableDataset):
    """A stream whose augmentations depend on the seed, the epoch and the sample's place alone."""

    def __init__(self, dataset: IterableDataset, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __iter__(self) -> Iterator:
        if hasattr(self.dataset, "set_epoch"):  # of `datasets`, which shuffles its buffer by it
            self.dataset.set_epoch(self.epoch)
        with _randomness_of(self.seed, self.epoch):
            rows = iter(self.dataset)
        for place in count():
            with _randomness_of(self.seed, self.epoch, place):
                row = next(rows, _END)
            if row is _END:
                return
            yield row


def seed_of(*numbers: int) -> int:
    """Give the seed that belongs to some numbers, such as the run's seed and an epoch."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def _randomness_of(*numbers: int) -> Iterator[None]:
    # Without the devices' generators, which own_randomness forks: loading draws on the CPU, and dropout on the GPU must
    # go on undisturbed.
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed = seed_of(*numbers)
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the state that augmentations use
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
