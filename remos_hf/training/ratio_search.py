"""slice_ratio="auto": the smallest slice whose accuracy on held-out clean data stays near plain fine-tuning's.

Every candidate ratio gets a trial (see `trials`), and so does plain fine-tuning, which says what the accuracy should
be. The coverage is taken once for all candidates.

Nothing here can see a trigger or an exposed set: there is no argument that takes one. Whether the chosen ratio holds
off a defect is for `evaluate_transfer` to say.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from transformers import Trainer

from remos_hf.errors import RemosError
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import check_slice_ratio
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import Composed
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData
from remos_hf.training.moments import Moments
from remos_hf.training.trials import Trial, Trials, check_searchable, warn_if_unresolved

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
    check_searchable(trainer, "slice_ratio='auto'")
    trials = Trials(trainer, search, data, with_adapters)
    trials.rehearse()
    with trials.bar(1 + len(search.ratios), "the slice ratio"):
        plain = trials.run(Finetune(), "plain fine-tuning", 1.0)
        trials.check_learned(plain, "ratio")
        needed = warn_if_unresolved(plain.rate, search.accuracy_budget)
        tried = _descend(
            lambda ratio: trials.run(_at_ratio(template, ratio), f"slice ratio {ratio:g}", ratio), plain, search
        )
    points = [{"slice_ratio": trial.setting, **trial.point(plain, search.accuracy_budget)} for trial in (plain, *tried)]
    able = [trial.setting for trial in tried if trial.costs_at_most(search.accuracy_budget, plain)]
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


def _descend(run: Callable[[float], Trial], plain: Trial, search: RatioSearch) -> list[Trial]:
    tried: list[Trial] = []
    for ratio in search.ratios:
        tried.append(run(ratio))
        last = tried[-search.failures_in_a_row :]
        failed = not any(trial.costs_at_most(search.accuracy_budget, plain) for trial in last)
        if failed and len(last) == search.failures_in_a_row:
            break
    return tried
