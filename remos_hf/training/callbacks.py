"""Slicing for anyone's Trainer: `attach_remos` before `train()`; and what RemosTrainer and `fit` share with it."""

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from remos_hf.errors import RemosError
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Batches, Preparation, Strategy
from remos_hf.strategies.slice_and_reset import Remos

logger = logging.getLogger(__name__)


def attach_remos(
    trainer: Trainer,
    *,
    slice_ratio: float | None = None,
    strategy: Strategy | None = None,
    resume_from_checkpoint: str | Path | None = None,
) -> Sidecars:
    """Start the student of any Trainer (SFTTrainer, Seq2SeqTrainer): slice its model now, once, before `train()`.

    Args:
        trainer: The trainer, with its model and training data.
        slice_ratio: Share of the weights to keep, by ReMoS.
        strategy: Any other strategy that does not act in the loss.
        resume_from_checkpoint: The checkpoint that `train()` will resume from: its slice is taken, nothing is chosen.

    Returns:
        What was done. The same is written beside every checkpoint, and into `output_dir` when training ends.

    Raises:
        ValueError: Neither or both of `slice_ratio` and `strategy`, or a strategy that acts in the loss.
    """
    strategy = chosen_strategy(slice_ratio, strategy)
    if strategy.acts_in_loss:
        raise ValueError(
            f"{type(strategy).__name__} acts in the loss, which only RemosTrainer lets it do. Use RemosTrainer."
        )
    if resume_from_checkpoint is None:
        sidecars = start_student(trainer, strategy)
    else:
        sidecars = resumed_sidecars(resume_from_checkpoint, strategy)
    trainer.add_callback(RemosCallback(strategy, sidecars))
    return sidecars


class RemosCallback(TrainerCallback):
    """Acts after each step as the strategy wants, and writes the sidecars beside every checkpoint.

    Args:
        strategy: The strategy.
        sidecars: What to write; None if the trainer writes it itself.
    """

    def __init__(self, strategy: Strategy, sidecars: Sidecars | None = None) -> None:
        self.strategy, self.sidecars = strategy, sidecars

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        """Let the strategy act after an optimizer step."""
        self.strategy.after_step(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401
        """Write the sidecars beside a checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.sidecars is not None and args.should_save and folder.is_dir():
            self.sidecars.save(folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Write the sidecars where the trained student will be saved."""
        if self.sidecars is not None and args.should_save:
            self.sidecars.save(args.output_dir)


def chosen_strategy(
    slice_ratio: float | None, strategy: Strategy | None, head: tuple[str, ...] | None = None
) -> Strategy:
    """Settle what the caller asked for; `head` names the modules that ReMoS spares, None lets it find them."""
    if (slice_ratio is None) == (strategy is None):
        raise ValueError(
            "Pass either slice_ratio= (the share of the teacher's weights that ReMoS keeps) or strategy= (such as "
            f"Finetune()), but got slice_ratio={slice_ratio} and strategy={strategy}."
        )
    return Remos(slice_ratio, head=head) if strategy is None else strategy


def start_student(trainer: Trainer, strategy: Strategy) -> Sidecars:
    """Let a strategy prepare the trainer's model, and say what it did. The global random state stays as it was."""
    return prepare_student(
        trainer.model, strategy, lambda samples: student_batches(trainer, samples), trainer.args.seed
    )


def prepare_student(student: nn.Module, strategy: Strategy, batches: Batches, seed: int) -> Sidecars:
    """Let a strategy prepare a student in place, and say what it did. The global random state stays as it was.

    Args:
        student: The teacher with its new head, before it is wrapped and before its optimizer is built.
        strategy: The strategy.
        batches: Called with a number of samples (None for all), gives this process's share of the training data.
        seed: Seed of the random state that the strategy finds.

    Raises:
        RemosError: The processes chose different slices.
    """
    with own_randomness(seed):
        preparation = strategy.prepare(student, batches)
    _check_same_everywhere(preparation)
    if preparation.summary():
        logger.info(preparation.summary())
    return Sidecars.of(strategy, preparation, student)


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


def _check_same_everywhere(preparation: Preparation) -> None:
    group = torch.distributed
    relevant = preparation.relevant_slice
    if relevant is None or not (group.is_available() and group.is_initialized()) or group.get_world_size() == 1:
        return
    found: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(found, (relevant.teacher_hash, relevant.num_kept))
    if len(set(found)) > 1:
        raise RemosError(f"The processes chose different slices ({found}): they did not load the same teacher.")


def resumed_sidecars(checkpoint: str | Path, strategy: Strategy) -> Sidecars:
    """Read how a checkpoint's student was made, and refuse to go on another way."""
    sidecars = Sidecars.load(checkpoint)
    sidecars.check_strategy(strategy)
    return sidecars


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Give a block its own seeded randomness, so that strategies are compared from the same random state."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state others use
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
