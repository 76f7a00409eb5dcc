"""The student's data as it is profiled: unshuffled, nothing twice, shared out over the processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer

from remos_hf.profiling.data_pass import DEFAULT_MAX_SAMPLES
from remos_hf.strategies.student_data import StudentData


def trainer_data(trainer: Trainer) -> StudentData:
    """Give the data of a trainer's student, with the run's seed."""
    given = getattr(trainer, "profile_dataset", None)
    data = trainer.train_dataset if given is None else given
    stream = isinstance(data, IterableDataset)
    several = trainer.eval_dataset
    held_out = next(iter(several.values()), None) if isinstance(several, dict) else several
    return StudentData(
        lambda samples: student_batches(trainer, samples),
        seed=trainer.args.seed,
        max_samples=samples_to_look_at(getattr(trainer, "max_samples", None)),
        num_samples=None if stream or data is None else len(data),
        is_stream=stream,
        mask_token=getattr(trainer.processing_class, "mask_token_id", None),
        held_out=None if held_out is None else lambda: _batches_of(trainer, held_out, None),
    )


def samples_to_look_at(max_samples: int | Literal["all"] | None) -> int | None:
    """Settle how many samples a run looks at before it trains: `DEFAULT_MAX_SAMPLES` if not said, None for "all".

    Raises:
        ValueError: It is no whole number of at least 1.
    """
    if max_samples == "all":
        return None
    found = DEFAULT_MAX_SAMPLES if max_samples is None else max_samples
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(
            f"max_samples is the number of samples to look at before training, at least 1, or 'all', but got "
            f"{max_samples!r}."
        )
    return found


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
    try:
        prepared = trainer.get_test_dataloader(data)
    except ValueError as error:
        if given is None:
            raise
        raise ValueError(_unprepared(trainer)) from error
    return _shared_out(trainer, data, prepared, max_samples)


def _batches_of(trainer: Trainer, data: Dataset, max_samples: int | None) -> Iterable:
    return _shared_out(trainer, data, trainer.get_test_dataloader(data), max_samples)


def _shared_out(trainer: Trainer, data: Dataset, prepared: DataLoader, max_samples: int | None) -> Iterable:
    args = trainer.args
    sharded = isinstance(prepared.dataset, IterableDataset) and args.world_size > 1
    return ordered_batches(
        data if sharded else prepared.dataset,
        _Collator.of(trainer, prepared.collate_fn),
        size=args.per_device_eval_batch_size,
        max_samples=max_samples,
        seed=args.seed,
        rank=args.process_index,
        world=args.world_size,
        workers=args.dataloader_num_workers,
    )


@dataclass(frozen=True)
class _Collator:
    """Collates rows, and refuses what the trainer's model cannot be run on, in the caller's words."""

    collate: Callable[[list], Any]
    trainer: str
    model: str
    takes: frozenset[str]
    unprepared: str | None

    @classmethod
    def of(cls, trainer: Trainer, collate_fn: Callable[[list], Any]) -> "_Collator":
        taken = signature(trainer.model.forward).parameters.values()
        names = frozenset(one.name for one in taken if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL))
        given = getattr(trainer, "profile_dataset", None) is not None
        unprepared = _unprepared(trainer) if given else None
        return cls(collate_fn, type(trainer).__name__, type(trainer.model).__name__, names, unprepared)

    def __call__(self, rows: list) -> Any:  # noqa: ANN401 - any batch
        try:
            batch = self.collate(rows)
        except (KeyError, ValueError) as error:
            if self.unprepared is None:
                raise
            raise ValueError(self.unprepared) from error
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        named = isinstance(batch, Mapping)
        if (named and (not self.takes or self.takes & batch.keys())) or isinstance(first, Tensor):
            return batch
        found = f"the columns {sorted(batch)}" if named else f"a {type(batch).__name__}"
        raise ValueError(
            f"{self.trainer} makes {found} of its rows, which {self.model} cannot be run on as they are, so nothing "
            "says what the student's data covers. Slice the model before the trainer is made (profile_coverage on "
            "batches of your own, choose_slice, reset_outside), or take a strategy that slices nothing."
        )


def _unprepared(trainer: Trainer) -> str:
    known = getattr(trainer.train_dataset, "column_names", None)
    return (
        f"The rows of profile_dataset={trainer.profile_dataset} are not prepared as those that "
        f"{type(trainer).__name__} trains on{f', which have the columns {known}' if known else ''}. Give a part of "
        "trainer.train_dataset, or rows like its own."
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
