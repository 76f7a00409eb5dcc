"""Slicing for anyone's Trainer: `attach_remos` before `train()`; and what RemosTrainer and `fit` share with it."""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from remos_hf.coverage.profile import CoverageProfile
from remos_hf.errors import RemosError
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Batches, Preparation, Strategy, share_by_group
from remos_hf.strategies.slice_and_reset import Remos, SliceAndReset
from remos_hf.training.randomness import own_randomness
from remos_hf.training.ratio_search import (
    RECORD_KEY,
    RatioSearch,
    resumed_at_its_ratio,
    start_at_smallest_ratio,
)

if TYPE_CHECKING:
    from remos_hf.evaluation.report import DefectReport

logger = logging.getLogger(__name__)


def attach_remos(
    trainer: Trainer,
    *,
    slice_ratio: float | Literal["auto"] | None = None,
    strategy: Strategy | None = None,
    accuracy_budget: float | None = None,
    ratio_search: RatioSearch | None = None,
    resume_from_checkpoint: str | Path | None = None,
) -> Sidecars:
    """Start the student of any Trainer (SFTTrainer, Seq2SeqTrainer): slice its model now, once, before `train()`.

    When training starts, what was done is logged through the trainer's own reporters (see `StartLog`).

    Args:
        trainer: The trainer, with its model and training data.
        slice_ratio: Share of the weights to keep, by ReMoS. "auto" tries ratios now, as RemosTrainer does.
        strategy: Any other strategy that does not act in the loss. Beside "auto", the one whose ratio is searched.
        accuracy_budget: Only with "auto": accuracy that slicing may cost, as a share; 0.02 if None.
        ratio_search: Only with "auto": the whole search, its budget included.
        resume_from_checkpoint: The checkpoint that `train()` will resume from: its slice is taken, nothing is chosen.

    Returns:
        What was done. The same is written beside every checkpoint, and into `output_dir` when training ends.

    Raises:
        ValueError: Neither or both of `slice_ratio` and `strategy`, a strategy that acts in the loss, or a search that
            cannot be made (see RemosTrainer).
        RemosError: No ratio stays within the budget, or the checkpoint was made another way.
    """
    strategy, search = chosen_start(slice_ratio, strategy, accuracy_budget, ratio_search)
    if strategy.acts_in_loss:
        raise ValueError(
            f"{type(strategy).__name__} acts in the loss, which only RemosTrainer lets it do. Use RemosTrainer."
        )
    if search is not None:
        strategy, sidecars = searched_start(trainer, strategy, search, resume_from_checkpoint)
    elif resume_from_checkpoint is None:
        sidecars = start_student(trainer, strategy)
    else:
        sidecars = resumed_sidecars(resume_from_checkpoint, strategy)
    trainer.add_callback(RemosCallback(strategy, sidecars))
    trainer.add_callback(StartLog(trainer, sidecars))
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


class StartLog(TrainerCallback):
    """Logs what was done to the student through the trainer's reporters, once, at the start of a run.

    The names, each a plain float, also in `trainer_state.json` (TensorBoard, W&B and trackio show them as `train/...`):

    - `remos/share_kept`, `remos/share_kept/<layer group>`, `remos/squares_reset`: the slice; shares of the weights and
      of their squares.
    - `remos/share_never_covered`, `remos/mean_coverage_frequency`, `remos/coverage_samples`: the coverage; shares of
      the neurons at both ends of every layer, and the mean of their coverage frequencies.
    - `remos/embedding_rows_reset`, `remos/seconds/<step>`.
    - `remos/ratio_search/accuracy_budget`, `remos/ratio_search/slice_ratio`: what was asked for, and chosen.
    - `remos/ratio_search/accuracy`, with `.../low`, `.../high` and `.../lost`: the curve of a search. The step of its
      points is the slice ratio in thousandths; 1000 is plain fine-tuning.

    A resumed run logs nothing: its history holds it. As with everything that Trainer logs, every process hears of it,
    and reporters write on the first.

    Args:
        trainer: The trainer.
        sidecars: What was done.
    """

    def __init__(self, trainer: Trainer, sidecars: Sidecars) -> None:
        self.trainer, self.sidecars = trainer, sidecars

    # Not on_train_begin: reporters that were added later are set up there, after this one.
    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        """Log it, before the first step."""
        if state.global_step > 0:
            return
        numbers = _start_numbers(self.sidecars)
        if not numbers:
            return
        for point in self.sidecars.config.get(RECORD_KEY, {}).get("curve", ()):
            self._log_point(state, point)
        self.trainer.log(numbers)

    def _log_point(self, state: TrainerState, point: dict[str, Any]) -> None:
        names = {"accuracy": "", "low": "/low", "high": "/high", "lost": "/lost"}
        found = {f"remos/ratio_search/accuracy{end}": point[key] for key, end in names.items()}
        step = state.global_step
        state.global_step = round(1000 * point["slice_ratio"])  # a curve needs an axis, and reporters have this one
        try:
            self.trainer.log({name: float(value) for name, value in found.items() if value is not None})
        finally:
            state.global_step = step


def _start_numbers(sidecars: Sidecars) -> dict[str, float]:
    relevant, profile, config = sidecars.relevant_slice, sidecars.profile, sidecars.config
    numbers: dict[str, float] = {}
    if relevant is not None:
        numbers["remos/share_kept"] = relevant.share_kept
        numbers |= {f"remos/share_kept/{group}": share for group, share in share_by_group(relevant).items()}
        numbers["remos/squares_reset"] = config["slice"]["squares_reset"]
    if profile is not None:
        counts = torch.cat([*profile.input_counts.values(), *profile.output_counts.values()])
        numbers["remos/share_never_covered"] = profile.share_never_covered
        numbers["remos/mean_coverage_frequency"] = counts.double().mean().item() / profile.num_samples
        numbers["remos/coverage_samples"] = profile.num_samples
    if "embedding_rows_reset" in config:
        numbers["remos/embedding_rows_reset"] = config["embedding_rows_reset"]
    if RECORD_KEY in config:
        for name in ("accuracy_budget", "slice_ratio"):
            numbers[f"remos/ratio_search/{name}"] = config[RECORD_KEY][name]
    numbers |= {f"remos/seconds/{step}": seconds for step, seconds in config["seconds"].items()}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def log_defects(trainer: Trainer, report: "DefectReport") -> None:
    """Log what students inherited through a trainer's reporters, and into its history.

    The names are `remos/<measure>/<task>/<defect>/<student>`, seeds pooled, without the task where it has no name; a
    slash within a name becomes an underscore. The measures are shares: `acc`; `dir`; `floor`, the benign twin's DIR;
    `excess`, DIR minus floor; and the count `dir_num_samples`. What was not measured is left out.

    Args:
        trainer: Any Trainer: a RemosTrainer, or one with `attach_remos`. The step is the one it has come to.
        report: The report; students of other trainers may be in it.
    """
    numbers: dict[str, float] = {}
    for (task, defect), rows in report.tables().items():
        for row in rows:
            place = "/".join(part.replace("/", "_") for part in (task, defect, row["student"]) if part)
            measured = {measure: row[measure] and row[measure].value for measure in ("acc", "dir", "floor", "excess")}
            measured["dir_num_samples"] = row["dir"] and row["dir"].num_samples
            for measure, value in measured.items():
                if value is not None:
                    numbers[f"remos/{measure}/{place}"] = float(value)
    trainer.log(numbers)


def chosen_strategy(
    slice_ratio: float | None, strategy: Strategy | None, head: tuple[str, ...] | None = None
) -> Strategy:
    """Settle what the caller asked for; `head` names the modules that ReMoS spares, None lets it find them."""
    if isinstance(slice_ratio, str):
        raise ValueError(
            f"slice_ratio is a number in (0, 1], or 'auto' with RemosTrainer and attach_remos, but got {slice_ratio!r}."
        )
    if (slice_ratio is None) == (strategy is None):
        raise ValueError(
            "Pass either slice_ratio= (the share of the teacher's weights that ReMoS keeps) or strategy= (such as "
            f"Finetune()), but got slice_ratio={slice_ratio} and strategy={strategy}."
        )
    return Remos(slice_ratio, head=head) if strategy is None else strategy


def chosen_start(
    slice_ratio: float | Literal["auto"] | None,
    strategy: Strategy | None,
    accuracy_budget: float | None,
    ratio_search: RatioSearch | None,
) -> tuple[Strategy, RatioSearch | None]:
    """Settle what the caller asked for: a strategy, and how its ratio is searched if it is."""
    if slice_ratio != "auto":
        if accuracy_budget is not None or ratio_search is not None:
            raise ValueError(
                "accuracy_budget= and ratio_search= say how slice_ratio='auto' searches, but got "
                f"slice_ratio={slice_ratio}."
            )
        return chosen_strategy(slice_ratio, strategy), None
    if accuracy_budget is not None and ratio_search is not None:
        raise ValueError(
            f"Pass either accuracy_budget={accuracy_budget} or ratio_search=, which has an accuracy_budget of its own "
            f"({ratio_search.accuracy_budget})."
        )
    template = Remos(1.0) if strategy is None else strategy
    if not isinstance(template, SliceAndReset):
        raise ValueError(
            f"slice_ratio='auto' searches the ratio of a strategy that slices, but {type(template).__name__} keeps "
            "no share of the weights. Leave out one of the two."
        )
    if ratio_search is None:
        ratio_search = RatioSearch() if accuracy_budget is None else RatioSearch(accuracy_budget=accuracy_budget)
    return template, ratio_search


def searched_start(
    trainer: Trainer,
    template: SliceAndReset,
    search: RatioSearch,
    checkpoint: str | Path | None,
    with_adapters: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> tuple[Strategy, Sidecars]:
    """Start the trainer's model at the smallest ratio that will do, or take the one that a checkpoint started with."""
    if checkpoint is not None:
        return resumed_at_its_ratio(Sidecars.load(checkpoint), template, search)
    return start_at_smallest_ratio(trainer, template, search, _preparer(trainer), with_adapters)


def start_student(trainer: Trainer, strategy: Strategy) -> Sidecars:
    """Let a strategy prepare the trainer's model, and say what it did. The global random state stays as it was."""
    return _preparer(trainer)(trainer.model, strategy)


def _preparer(trainer: Trainer) -> Callable[..., Sidecars]:
    return lambda student, strategy, **known: prepare_student(
        student, strategy, lambda samples: student_batches(trainer, samples), trainer.args.seed, **known
    )


def prepare_student(
    student: nn.Module, strategy: Strategy, batches: Batches, seed: int, **known: CoverageProfile
) -> Sidecars:
    """Let a strategy prepare a student in place, and say what it did. The global random state stays as it was.

    Args:
        student: The teacher with its new head, before it is wrapped and before its optimizer is built.
        strategy: The strategy.
        batches: Called with a number of samples (None for all), gives this process's share of the training data.
        seed: Seed of the random state that the strategy finds.
        known: What the strategy's `prepare` takes beside these, such as the profile of an earlier one.

    Raises:
        RemosError: The processes chose different slices.
    """
    with own_randomness(seed):
        preparation = strategy.prepare(student, batches, **known)
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
