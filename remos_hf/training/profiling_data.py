"""The student's data as it is profiled: unshuffled, nothing twice, shared out over the processes."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer

from remos_hf.strategies.student_data import StudentData


def trainer_data(trainer: Trainer) -> StudentData:
    """Give the data of a trainer's student, with the run's seed."""
    given = getattr(trainer, "profile_dataset", None)
    data = trainer.train_dataset if given is None else given
    return StudentData(
        lambda samples: student_batches(trainer, samples),
        seed=trainer.args.seed,
        max_samples=getattr(trainer, "max_samples", None),
        is_stream=isinstance(data, IterableDataset),
    )


def student_batches(trainer: Trainer, max_samples: int | None = None) -> Iterable:
    """Give this process's share of the training data as the trainer collates it, unshuffled and nothing twice.

    Args:
        trainer: The trainer. Batches have its evaluation size.
        max_samples: Samples to take over all processes; drawn by the trainer's seed, or the first ones of a stream.

    Returns:
        An iterable of batches on the CPU. The shares of N processes are the batches of one process, each once.

    Raises:
        ValueError: The trainer has no training data.
    """
    # What an augmented training set looks like without augmentation.
    given = getattr(trainer, "profile_dataset", None)
    data = trainer.train_dataset if given is None else given
    if data is None:
        raise ValueError("The student's data decides what is kept, but the trainer has no train_dataset.")
    # The public way to the dataset and the collator without the columns that the model does not take.
    prepared = trainer.get_test_dataloader(data)
    args = trainer.args
    sharded = isinstance(prepared.dataset, IterableDataset) and args.world_size > 1
    return ordered_batches(
        data if sharded else prepared.dataset,
        prepared.collate_fn,
        size=args.per_device_eval_batch_size,
        max_samples=max_samples,
        seed=args.seed,
        rank=args.process_index,
        world=args.world_size,
        workers=args.dataloader_num_workers,
    )


def ordered_batches(
    dataset: Dataset,
    collate_fn: Callable[[list], Any] | None,
    *,
    size: int,
    max_samples: int | None,
    seed: int,
    rank: int,
    world: int,
    workers: int = 0,
) -> Iterable:
    """Give one process's share of a data set, unshuffled and nothing twice. Takes nothing from the random state.

    Args:
        dataset: The data; a stream is one that is not yet shared out over the processes.
        collate_fn: Makes a batch of samples; PyTorch's default if None.
        size: Samples in a batch.
        max_samples: Samples to take over all processes; drawn by the seed, or the first ones of a stream; None for all.
        seed: Seed of the draw.
        rank: This process's number.
        world: Number of processes.
        workers: Processes that load; a stream is read in this one.

    Returns:
        An iterable of batches on the CPU. The shares of N processes are the batches of one process, each once.
    """
    # A loader with a generator of its own takes nothing from the global random state.
    options = {"collate_fn": collate_fn, "generator": torch.Generator().manual_seed(seed)}
    if isinstance(dataset, IterableDataset):
        return islice(DataLoader(_Start(dataset, max_samples), batch_size=size, **options), rank, None, world)
    indices = _drawn(len(dataset), max_samples, seed)
    shares = [indices[start : start + size] for start in range(0, len(indices), size)]
    return DataLoader(dataset, batch_sampler=shares[rank::world], num_workers=workers, **options)


def _drawn(count: int, max_samples: int | None, seed: int) -> list[int]:
    if max_samples is None or max_samples >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:max_samples].tolist())


class _Start(IterableDataset):
    """The first samples of a stream; all of them if `count` is None."""

    def __init__(self, stream: Iterable, count: int | None) -> None:
        self.stream, self.count = stream, count

    def __iter__(self) -> Iterator:
        return islice(iter(self.stream), self.count)
