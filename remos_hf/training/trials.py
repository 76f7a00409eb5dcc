"""Trials of a search: copies of a trainer's model, started, fine-tuned for a share of the steps, and measured.

A sliced student has a new head and holes in its body: before it has trained, its accuracy says nothing. A trial trains
by the trainer's own means, of the same length as every other, from the same random state and over the same batches.
"""

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import has_length

from remos_hf.errors import RemosError
from remos_hf.evaluation.measures import Rate
from remos_hf.profiling.data_pass import on_main_process
from remos_hf.randomness import own_randomness
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.student_data import StudentData
from remos_hf.training.held_out import Measured, check_classes, measured_by, samples_to_tell
from remos_hf.training.moments import Moments, hold_trainer

logger = logging.getLogger(__name__)

Then = Callable[[Trainer], Any]


class Search(Protocol):
    """What trials take from a search: a trial's share of the planned steps, and the metric instead of the accuracy."""

    share_of_steps: float
    metric: str | None


@dataclass(frozen=True)
class Trial:
    """What a trial measured.

    Attributes:
        name: What it is told by.
        setting: The number that was tried; None of plain fine-tuning where no number says it.
        measured: How good it is.
        steps: That it trained for.
        choose_seconds: Ranking and cutting, which is all that another ratio costs beside its training.
        seconds: In all.
        found: What else was looked at.
    """

    name: str
    setting: float | None
    measured: Measured
    steps: int
    choose_seconds: float
    seconds: float
    found: Any = None

    @property
    def accuracy(self) -> float:
        """Share of the held-out samples, or the metric."""
        return self.measured.accuracy

    @property
    def rate(self) -> Rate | None:
        """The accuracy with its interval; None for a metric."""
        return self.measured.rate

    def point(self, plain: "Trial", budget: float) -> dict[str, Any]:
        """Give what a curve holds of it, as JSON values."""
        return {
            "accuracy": self.accuracy,
            "low": self.rate and self.rate.low,
            "high": self.rate and self.rate.high,
            "num_samples": self.rate and self.rate.num_samples,
            "lost": plain.accuracy - self.accuracy,
            "within_budget": self.costs_at_most(budget, plain),
            "steps": self.steps,
            "choose_seconds": round(self.choose_seconds, 4),
            "seconds": round(self.seconds, 3),
        }

    def costs_at_most(self, budget: float, plain: "Trial") -> bool:
        """Whether its accuracy stays within the budget of plain fine-tuning's."""
        return plain.accuracy - self.accuracy <= budget + 1e-9  # counts are whole; their quotients are not

    def told(self) -> str:
        """Say it in a line."""
        interval = f" [{self.rate.low:.4f}, {self.rate.high:.4f}]" if self.rate else ""
        return f"{self.name} {self.accuracy:.4f}{interval}"


def check_searchable(trainer: Trainer, asked: str) -> None:
    """Refuse a trainer that no trial could copy, or that has no held-out data; `asked` is how the search was asked for.

    Raises:
        ValueError: It cannot be searched with.
    """
    train, held_out = trainer.train_dataset, trainer.eval_dataset
    if held_out is None or isinstance(held_out, dict):
        found = "none" if held_out is None else f"a dict of {sorted(held_out)}"
        raise ValueError(
            f"{asked} compares accuracies on held-out clean data, so it needs eval_dataset=, one data set, "
            f"but got {found}."
        )
    if train is None:
        raise ValueError(f"{asked} trains on copies, so it needs train_dataset=, but got none.")
    if held_out is train:
        raise ValueError(
            f"eval_dataset is train_dataset, but {asked} needs data that the student does not train on. Hold some of "
            "it out."
        )
    for name, data in (("train_dataset", train), ("eval_dataset", held_out)):
        if not has_length(data):
            raise ValueError(
                f"{name} is a stream, which cannot be read again for every trial. Give {asked} a data set with a "
                "length, or name a number."
            )
        if len(data) == 0:
            raise ValueError(f"{name} holds no sample.")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            f"{asked} trains copies of the model, but the optimizer or scheduler was made for the model itself. "
            "Leave out optimizers= and use the training arguments, optimizer_cls_and_kwargs= or your own "
            "create_optimizer; or make a new trainer, if this one has trained."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{asked} was tried in one process and by DDP, not with DeepSpeed or FSDP. Search on a smaller machine, "
            "and name the number here."
        )


class Trials:
    """Runs trials of one search: what they share, and what they have found.

    Args:
        trainer: Its model is copied for every trial.
        search: How long trials are and what they are measured by.
        data: The student's data.
        with_adapters: Adds what is trained instead of the model's own weights, after it was started.
    """

    def __init__(
        self, trainer: Trainer, search: Search, data: StudentData, with_adapters: Callable[[nn.Module], nn.Module]
    ) -> None:
        self.trainer, self.search, self.data, self.with_adapters = trainer, search, data, with_adapters
        self.profile_seconds = 0.0  # the first trial's: the coverage is found once and holds for every ratio
        self.planned = self.steps = 0
        self._bar = tqdm(disable=True)

    def rehearse(self) -> None:
        """Count the steps, and measure a few samples before hours go into training: the measure must be one."""
        with own_randomness(None):
            trainer = _copy_of(self.trainer, copy.deepcopy(self.trainer.model), max_steps=1)
            arguments = self.trainer.args
            batches = len(trainer.get_train_dataloader())
            each = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
            self.planned = (
                arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * each)
            )
            self.steps = max(1, math.ceil(self.search.share_of_steps * self.planned))
            held_out = self.trainer.eval_dataset
            few = Subset(held_out, range(min(len(held_out), arguments.eval_batch_size * arguments.world_size)))
            if self.search.metric is None:
                batch = next(iter(trainer.get_test_dataloader(few)))
                # Before a model sees labels that it cannot take.
                check_classes(trainer, [batch[name] for name in trainer.label_names if name in batch])
            measured_by(trainer, few, self.search.metric)
            trainer.accelerator.free_memory()

    def bar(self, most: int, knob: str) -> tqdm:
        """Count the steps of all trials, if none is saved by stopping early."""
        quiet = self.trainer.args.disable_tqdm or not on_main_process()
        self._bar = tqdm(total=self.steps * most, desc=f"Choosing {knob}", delay=2, disable=True if quiet else None)
        return self._bar

    def run(
        self,
        strategy: Strategy,
        name: str,
        setting: float | None,
        model: nn.Module | None = None,
        then: Then | None = None,
    ) -> Trial:
        """Train and measure a copy from the random state that the student itself will find.

        Args:
            strategy: How it starts.
            name: What the trial is told by.
            setting: The number that is tried.
            model: What is copied; the trainer's model if None.
            then: Called with the trial's trainer, trained and measured; what it gives is the trial's `found`.
        """
        start = time.perf_counter()
        self._bar.set_postfix_str(name, refresh=False)
        model = copy.deepcopy(self.trainer.model if model is None else model)
        moments = Moments(strategy, self.data)
        spent = moments.start(model).config["seconds"]
        self.profile_seconds = max(self.profile_seconds, spent.get("profile", 0.0))
        arguments = self.trainer.args
        with own_randomness(None):
            trainer = _copy_of(
                self.trainer, self.with_adapters(model), **_shortened(arguments, self.steps, self.planned)
            )
            trainer.moments = moments  # a RemosTrainer starts nothing that was started
            hold_trainer(trainer, moments)
            trainer.callback_handler.add_callback(_StepByStep(self._bar))
            trainer.train()
            measured = measured_by(trainer, self.trainer.eval_dataset, self.search.metric)
            found = then(trainer) if then is not None else None
        trainer.accelerator.free_memory()
        seconds = time.perf_counter() - start
        # The processes agree on what they measured, not on how long it took; one record for all.
        mine = Trial(name, setting, measured, self.steps, spent.get("choose", 0.0), seconds, found)
        told = broadcast_object_list([mine])
        logger.info("Trial of %d steps: %s, %.1f s.", self.steps, told[0].told(), told[0].seconds)
        return told[0]

    def check_learned(self, plain: Trial, knob: str) -> None:
        """Refuse to compare students none of which has learned anything: every setting would pass."""
        commonest = plain.measured.commonest
        if plain.rate is not None and plain.rate.low <= commonest:
            raise RemosError(
                f"After {self.steps} steps, {plain.told()} is not surely better than always giving the commonest label "
                f"({commonest:.4f} of {plain.rate.num_samples} held-out samples): trials that learn nothing "
                f"cost nothing, and every {knob} would pass. Make trials longer ({type(self.search).__name__}"
                "(share_of_steps=...), or more planned steps), or hold out more samples."
            )


def _shortened(arguments: TrainingArguments, steps: int, planned: int) -> dict[str, Any]:
    """Give the length of a trial; a warm-up counted in steps shrinks with it."""
    warmup = arguments.warmup_steps
    return {"max_steps": steps, **({"warmup_steps": round(warmup * steps / planned)} if warmup >= 1 else {})}


def _copy_of(trainer: Trainer, model: nn.Module, **arguments: Any) -> Trainer:  # noqa: ANN401
    """Copy a trainer, whatever its class, to train another model without leaving a trace in the first."""
    trial = copy.copy(trainer)
    trial.args = copy.copy(trainer.args)
    # Set, not replaced: making new arguments settles devices and folders anew.
    for name, value in {
        **arguments,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_first_step": False,
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "prediction_loss_only": False,
        "disable_tqdm": True,
    }.items():
        setattr(trial.args, name, value)
    trial.model = trial.model_wrapped = model
    vars(trial).pop("compute_loss", None)  # what was laid around it acts on another model
    trial.create_accelerator_and_postprocess()
    trial.callback_handler = CallbackHandler([DefaultFlowCallback()], model, trainer.processing_class, None, None)
    trial.state = TrainerState(
        is_local_process_zero=trainer.is_local_process_zero(), is_world_process_zero=trainer.is_world_process_zero()
    )
    trial.control = TrainerControl()
    return trial


class _StepByStep(TrainerCallback):
    """Moves the bar."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_step_end(self, *_: object, **__: object) -> None:
        self.bar.update()


def warn_if_unresolved(rate: Rate | None, budget: float, name: str = "accuracy_budget") -> int | None:
    """Say when so few samples cannot tell a difference as small as the budget; give how many could.

    Args:
        rate: Of plain fine-tuning; None for a metric of the caller's, of which nothing can be said.
        budget: The difference, as a share.
        name: What the caller calls it.
    """
    if rate is None:
        return None
    needed = samples_to_tell(rate, budget)
    if rate.num_samples < needed and on_main_process():
        what = "accuracy falls by" if name == "accuracy_budget" else "own triggers turn more than those untaught by"
        warnings.warn(
            f"{rate.num_samples} held-out samples cannot tell whether {what} {name}={budget:g}: near {rate.value:.3f} "
            f"that takes about {needed:,}. The choice may be by chance. Hold out more samples, or allow more.",
            stacklevel=2,
        )
    return needed
