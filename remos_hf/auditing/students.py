"""The students that an audit makes: what decides whether slicing is worth it, beside ReMoS."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import as_strategy
from remos_hf.strategies.distilled import Distilled
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.hardened import Hardened
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.slice_and_reset import MagPrune, Random, Remos, TopMagnitude
from remos_hf.strategies.subspace import Subspace

_RULES = {
    "random": (Random, "model"),
    "top_magnitude": (TopMagnitude, "model"),
    "mag_prune": (MagPrune, "model"),
    "remos": (Remos, "model"),
    "remos_layer": (Remos, "layer"),
}
# Starts without a slice ratio, by the name that a command gives them; joined by "+" they are one student.
_STARTS = {"subspace": Subspace, "hardened": Hardened, "guided": Guided, "distilled": Distilled}


@dataclass(frozen=True)
class StudentPlan:
    """A student to make.

    Attributes:
        strategy: How it starts, and what holds it; a list of strategies is one.
        lr_factor: Its learning rate over that of the others.
        defects: Make it for these defects (and for the clean teacher); None for all.
        reactivate: Also measure how few poisoned samples bring a backdoor back.
    """

    strategy: Strategy
    lr_factor: float = 1.0
    defects: tuple[str, ...] | None = None
    reactivate: bool = False

    def __post_init__(self) -> None:
        """Take a list of strategies for the strategy that it is."""
        object.__setattr__(self, "strategy", as_strategy(self.strategy))

    def to_dict(self) -> dict[str, Any]:
        """Give the plan as JSON values."""
        return {**asdict(self), "strategy": self.strategy.to_dict()}


def standard_students(
    slice_ratios: Sequence[float],
    *,
    high_lr_factor: float = 3.0,
    curves_for: Sequence[str] | None = None,
    rows: bool = False,
    reactivate: bool = False,
    rules: Sequence[str] = tuple(_RULES),
) -> dict[str, StudentPlan]:
    """Give the students of an honest table: ReMoS beside all that must be beaten.

    Plain fine-tuning at two learning rates, retraining, and for each slice ratio a random reset, a top-magnitude reset,
    mag-prune, and ReMoS at model and at layer scope.

    Args:
        slice_ratios: Shares of weights to keep. The first one is made for every defect.
        high_lr_factor: Learning rate of the rival that only learns faster, over that of the others; at least 3.
        curves_for: Defects that get the other slice ratios too; None for all.
        rows: Also fine-tuning with the embedding rows of unseen tokens reset (texts).
        reactivate: Measure re-activation on the students of the first slice ratio.
        rules: Ways to choose what is reset, by name, all of them by default; the other students are always made. Also
            starts without a slice ratio, "subspace", "hardened", "guided", "distilled", or several joined by "+", which
            get the learning rate of the others.

    Returns:
        Plans by the student's name. Plain fine-tuning is "finetune".

    Raises:
        ValueError: The rival's learning rate is below three times the others', or there is no slice ratio or no such
            rule.
    """
    if high_lr_factor < 3:
        raise ValueError(
            f"high_lr_factor is that of the honest rival's learning rate, at least 3, but got {high_lr_factor}."
        )
    starts = [name for name in rules if name not in _RULES]
    unknown = [name for name in starts if not set(name.split("+")) <= set(_STARTS)]
    if unknown:
        known = f"{', '.join(_RULES)}; {', '.join(_STARTS)}, or several of these joined by +"
        raise ValueError(f"The rules are {known}, but got {unknown[0]!r}.")
    if not slice_ratios:
        raise ValueError("slice_ratios names the shares of weights to keep, at least one.")
    students = {
        "finetune": StudentPlan(Finetune(), reactivate=reactivate),
        f"finetune lr x{high_lr_factor:g}": StudentPlan(Finetune(), high_lr_factor, reactivate=reactivate),
        "retrain": StudentPlan(Retrain(), reactivate=reactivate),
    }
    for ratio in slice_ratios:
        first = ratio == slice_ratios[0]
        only = None if first or curves_for is None else tuple(curves_for)
        if only == ():
            continue
        for name in (one for one in rules if one in _RULES):
            rule, scope = _RULES[name]
            strategy = rule(slice_ratio=ratio, scope=scope)
            students[f"{name} {ratio:g}"] = StudentPlan(strategy, defects=only, reactivate=first and reactivate)
    for name in starts:
        strategy = as_strategy([_STARTS[part]() for part in name.split("+")])
        students[name.replace("+", " + ")] = StudentPlan(strategy, reactivate=reactivate)
    if rows:
        students["finetune, rows mean"] = StudentPlan(Finetune(embedding_rows="mean"), reactivate=reactivate)
    return students
