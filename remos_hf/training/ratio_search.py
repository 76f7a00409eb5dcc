"""slice_ratio="auto": the smallest slice whose accuracy on held-out clean data stays near plain fine-tuning's.

A sliced student has a new head and holes in its body: before it has trained, its accuracy says nothing. So every
candidate ratio gets a trial: a copy of the teacher, sliced, is fine-tuned for a share of the planned steps by the
trainer's own means, and measured. A trial of plain fine-tuning, of the same length, from the same random state and over
the same batches, says what the accuracy should be. The coverage is taken once for all candidates.

Nothing here can see a trigger or an exposed set: there is no argument that takes one. Whether the chosen ratio holds
off a defect is for `evaluate_transfer` to say.
"""

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

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
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import check_slice_ratio
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import Composed
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData
from remos_hf.training.held_out import Measured, check_classes, measured_by, samples_to_tell
from remos_hf.training.moments import Moments, hold_trainer

logger = logging.getLogger(__name__)

RECORD_KEY = "ratio_search"  # in `remos_config.json`


@dataclass(frozen=True)
class RatioSearch:
    """How `slice_ratio="auto"` searches.

    Attributes:
        accuracy_budget: Accuracy that slicing may cost, as a share, in (0, 1): 0.02 is two points.
        ratios: Slice ratios to try, each in (0, 1); tried from the largest down.
        share_of_steps: Length of a trial, as a share of the planned steps, in (0, 1]. 1 tries what will be done, and
            costs a whole training for each candidate. A shorter trial has a whole learning rate schedule of its own.
            Sliced students start behind and catch up, so short trials overstate what slicing costs: the ratio found is
            rather too large than too small. Half, the default, costs at most three trainings (five candidates and plain
            fine-tuning), and mostly two.
        failures_in_a_row: Stop after so many candidates in a row that cost too much. With 1, the noise of one trial can
            end the search.
        metric: Name of one of the shares that the trainer's `compute_metrics` gives, to be used for the accuracy. None
            compares the largest logit with the label, one a sample, and gives an interval.

    Raises:
        ValueError: A value is out of range.
    """

    accuracy_budget: float = 0.02
    ratios: tuple[float, ...] = (0.97, 0.95, 0.9, 0.8, 0.7)
    share_of_steps: float = 0.5
    failures_in_a_row: int = 2
    metric: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no search could use, before anything is loaded."""
        if not 0 < self.accuracy_budget < 1:
            raise ValueError(
                "accuracy_budget is the accuracy that slicing may cost, as a share between 0 and 1 (0.02 is two "
                f"points), but got {self.accuracy_budget}."
            )
        if not 0 < self.share_of_steps <= 1:
            raise ValueError(
                f"share_of_steps is a trial's share of the planned steps, in (0, 1], but got {self.share_of_steps}."
            )
        if self.failures_in_a_row < 1:
            raise ValueError(f"failures_in_a_row is at least 1, but got {self.failures_in_a_row}.")
        for ratio in self.ratios:
            check_slice_ratio(ratio)
        object.__setattr__(self, "ratios", tuple(sorted(set(self.ratios), reverse=True)))
        if not self.ratios or self.ratios[0] == 1:
            raise ValueError(
                f"ratios holds slice ratios to try, each below 1 (1 is plain fine-tuning), but got {self.ratios}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return {**asdict(self), "ratios": list(self.ratios)}


@dataclass(frozen=True)
class _Trial:
    """What a trial measured; the JSON of it is one point of the curve."""

    slice_ratio: float  # 1 is plain fine-tuning
    measured: Measured
    steps: int
    choose_seconds: float  # ranking and cutting, which is all that another ratio costs beside its training
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.measured.accuracy

    @property
    def rate(self) -> Rate | None:
        return self.measured.rate

    def point(self, plain: "_Trial", budget: float) -> dict[str, Any]:
        return {
            "slice_ratio": self.slice_ratio,
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

    def costs_at_most(self, budget: float, plain: "_Trial") -> bool:
        return plain.accuracy - self.accuracy <= budget + 1e-9  # counts are whole; their quotients are not

    def told(self) -> str:
        interval = f" [{self.rate.low:.4f}, {self.rate.high:.4f}]" if self.rate else ""
        name = "plain fine-tuning" if self.slice_ratio == 1 else f"slice ratio {self.slice_ratio:g}"
        return f"{name} {self.accuracy:.4f}{interval}"


def start_at_smallest_ratio(
    trainer: Trainer,
    template: Strategy,
    search: RatioSearch,
    data: StudentData,
    with_adapters: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Moments:
    """Try slice ratios on copies of a trainer's model, and start the model itself, in place, at the smallest that does.

    Trials keep the trainer's data, collator, loss, optimizer and arguments, and none of its callbacks: nothing is
    logged, saved or evaluated but at the end. A copy of the model and its optimizer's state are held in memory at a
    time. The global random state stays as it was; data sets with a generator of their own move on.

    Args:
        trainer: With its model, training data and `eval_dataset`, the held-out clean data. That data has then taken
            part in a choice: report the student's accuracy on other data.
        template: The strategy; its slice ratio is replaced.
        search: What to try.
        data: The student's data, which every trial and the student itself are started by.
        with_adapters: Adds what is trained instead of the model's own weights, after it was started.

    Returns:
        The moments of the strategy with the ratio that was chosen, started; the record of the search lies in
        `sidecars.config["ratio_search"]`.

    Raises:
        ValueError: The held-out data is missing, is the training data, is a stream or has no labels of classes; the
            trainer trains in a way that no copy can.
        RemosError: Plain fine-tuning learns nothing within a trial, or no candidate stays within the budget. The model
            is left whole: a student that nothing was taken from must be asked for by `strategy=Finetune()`.
        NonFiniteError: A trial's predictions or metric are NaN or infinite.

    Warns:
        UserWarning: The held-out data holds too few samples to tell a difference as small as the budget.
    """
    _check_searchable(trainer)
    trials = _Trials(trainer, search, data, with_adapters)
    trials.rehearse()
    with trials.bar():
        plain = trials.run(Finetune(), 1.0)
        trials.check_learned(plain)
        needed = _warn_if_unresolved(plain, search.accuracy_budget)
        tried = _descend(lambda ratio: trials.run(_at_ratio(template, ratio), ratio), plain, search)
    points = [trial.point(plain, search.accuracy_budget) for trial in (plain, *tried)]
    able = [trial.slice_ratio for trial in tried if trial.costs_at_most(search.accuracy_budget, plain)]
    if not able:
        raise RemosError(
            f"No slice ratio stays within accuracy_budget={search.accuracy_budget:g} of plain fine-tuning after "
            f"{trials.steps} steps: {'; '.join(trial.told() for trial in (plain, *tried))}. Allow a larger budget or "
            "longer trials (RatioSearch(share_of_steps=1)), try larger ratios, or ask for strategy=Finetune(), which "
            "takes nothing from the teacher and keeps its defects."
        )
    ratio = min(able)
    chosen = _at_ratio(template, ratio)
    logger.info(
        "Chose slice_ratio=%g, within %g of plain fine-tuning on held-out data after %d steps: %s.%s",
        ratio,
        search.accuracy_budget,
        trials.steps,
        "; ".join(trial.told() for trial in (plain, *tried)),
        " It is the smallest that was tried: smaller ones may do as well." if ratio == search.ratios[-1] else "",
    )
    moments = Moments(chosen, data)
    moments.start(trainer.model).config[RECORD_KEY] = {
        **search.to_dict(),
        "slice_ratio": ratio,
        "planned_steps": trials.planned,
        "samples_needed": needed,
        "profile_seconds": round(trials.profile_seconds, 3),
        "curve": points,
    }
    return moments


def recorded_ratio(checkpoint_sidecars: Sidecars, template: Strategy, search: RatioSearch) -> Strategy:
    """Give the strategy with the ratio that was found when a checkpoint's run started; nothing is searched again.

    Raises:
        RemosError: The checkpoint's ratio was not searched, or was searched for otherwise.
    """
    record = checkpoint_sidecars.config.get(RECORD_KEY)
    if record is None:
        given = checkpoint_sidecars.config["strategy"].get("slice_ratio")
        raise RemosError(
            f"The checkpoint's slice_ratio={given} was given, not searched, but the trainer asks for 'auto'. Resume "
            f"with slice_ratio={given}, or start anew from the teacher."
        )
    asked = search.to_dict()
    found = {name: record.get(name) for name in asked}
    if found != asked:
        raise RemosError(
            f"The checkpoint's slice ratio was searched by {found}, but the trainer asks for {asked}. Resume with the "
            "same search, or start anew from the teacher."
        )
    return _at_ratio(template, record["slice_ratio"])


def slices(strategy: Strategy) -> bool:
    """Whether a strategy, or one of a list, keeps a share of the weights."""
    parts = strategy.strategies if isinstance(strategy, Composed) else (strategy,)
    return any(isinstance(one, SliceAndReset) for one in parts)


def _at_ratio(template: Strategy, ratio: float) -> Strategy:
    if isinstance(template, Composed):
        return Composed(tuple(_at_ratio(one, ratio) for one in template.strategies))
    return replace(template, slice_ratio=ratio) if isinstance(template, SliceAndReset) else template


def _descend(run: Callable[[float], _Trial], plain: _Trial, search: RatioSearch) -> list[_Trial]:
    tried: list[_Trial] = []
    for ratio in search.ratios:
        tried.append(run(ratio))
        last = tried[-search.failures_in_a_row :]
        failed = not any(trial.costs_at_most(search.accuracy_budget, plain) for trial in last)
        if failed and len(last) == search.failures_in_a_row:
            break
    return tried


def _check_searchable(trainer: Trainer) -> None:
    train, held_out = trainer.train_dataset, trainer.eval_dataset
    if held_out is None or isinstance(held_out, dict):
        found = "none" if held_out is None else f"a dict of {sorted(held_out)}"
        raise ValueError(
            "slice_ratio='auto' compares accuracies on held-out clean data, so it needs eval_dataset=, one data set, "
            f"but got {found}."
        )
    if train is None:
        raise ValueError("slice_ratio='auto' trains on copies, so it needs train_dataset=, but got none.")
    if held_out is train:
        raise ValueError(
            "eval_dataset is train_dataset, but slice_ratio='auto' needs data that the student does not train on. Hold "
            "some of it out."
        )
    for name, data in (("train_dataset", train), ("eval_dataset", held_out)):
        if not has_length(data):
            raise ValueError(
                f"{name} is a stream, which cannot be read again for every trial. Give slice_ratio='auto' a data set "
                "with a length, or name a slice_ratio."
            )
        if len(data) == 0:
            raise ValueError(f"{name} holds no sample.")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "slice_ratio='auto' trains copies of the model, but the optimizer or scheduler was made for the model "
            "itself. Leave out optimizers= and use the training arguments, optimizer_cls_and_kwargs= or your own "
            "create_optimizer; or make a new trainer, if this one has trained."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "slice_ratio='auto' was tried in one process and by DDP, not with DeepSpeed or FSDP. Search on a smaller "
            "machine, and name the slice_ratio here."
        )


class _Trials:
    """Runs trials of one search: what they share, and what they have found."""

    def __init__(
        self, trainer: Trainer, search: RatioSearch, data: StudentData, with_adapters: Callable[[nn.Module], nn.Module]
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

    def bar(self) -> tqdm:
        """Count the steps of all trials, if none is saved by stopping early."""
        quiet = self.trainer.args.disable_tqdm or not on_main_process()
        total = self.steps * (1 + len(self.search.ratios))
        self._bar = tqdm(total=total, desc="Choosing the slice ratio", delay=2, disable=True if quiet else None)
        return self._bar

    def run(self, strategy: Strategy, ratio: float) -> _Trial:
        """Train and measure a copy from the random state that the student itself will find."""
        start = time.perf_counter()
        self._bar.set_postfix(slice_ratio=f"{ratio:g}", refresh=False)
        model = copy.deepcopy(self.trainer.model)
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
        trainer.accelerator.free_memory()
        seconds = time.perf_counter() - start
        # The processes agree on what they measured, not on how long it took; one record for all.
        told = broadcast_object_list([_Trial(ratio, measured, self.steps, spent.get("choose", 0.0), seconds)])
        logger.info("Trial of %d steps: %s, %.1f s.", self.steps, told[0].told(), told[0].seconds)
        return told[0]

    def check_learned(self, plain: _Trial) -> None:
        """Refuse to compare students none of which has learned anything: every ratio would pass."""
        commonest = plain.measured.commonest
        if plain.rate is not None and plain.rate.low <= commonest:
            raise RemosError(
                f"After {self.steps} steps, {plain.told()} is not surely better than always giving the commonest label "
                f"({commonest:.4f} of {plain.rate.num_samples} held-out samples): trials that learn nothing "
                "cost nothing, and every ratio would pass. Make trials longer (RatioSearch(share_of_steps=...), or "
                "more planned steps), or hold out more samples."
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


def _warn_if_unresolved(plain: _Trial, budget: float) -> int | None:
    """Say when so few samples cannot tell a difference as small as the budget; give how many could."""
    if plain.rate is None:
        return None
    needed = samples_to_tell(plain.rate, budget)
    if plain.rate.num_samples < needed and on_main_process():
        warnings.warn(
            f"{plain.rate.num_samples} held-out samples cannot tell whether accuracy falls by "
            f"accuracy_budget={budget:g}: near {plain.accuracy:.3f} that takes about {needed:,}. The ratio may be "
            "chosen by chance. Hold out more samples, or allow more.",
            stacklevel=2,
        )
    return needed
