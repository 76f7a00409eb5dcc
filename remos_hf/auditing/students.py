"""The students that an audit makes: what decides whether slicing is worth it, beside ReMoS."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remos_hf.errors import nearest
from remos_hf.strategies import STRATEGIES
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import as_strategy
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.slice_and_reset import SliceAndReset

_LAYERWISE = {"remos_layer": "remos"}  # names beside those of STRATEGIES: the same, layer by layer
_KNOWN = (*STRATEGIES, *_LAYERWISE)
_RULES = ("random", "top_magnitude", "mag_prune", "remos", "remos_layer")


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
    rules: Sequence[str] = _RULES,
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
        rules: What is made beside fine-tuning and retraining, which are always made: names of
            `remos_hf.strategies.STRATEGIES`, or "remos_layer". Several joined by "+" are one student, such as
            "subspace+guided". What keeps a share of the weights is made at each slice ratio, the others once, as they
            are when nobody sets them otherwise.

    Returns:
        Plans by the student's name. Plain fine-tuning is "finetune".

    Raises:
        ValueError: The rival's learning rate is below three times the others', or there is no slice ratio or no such
            name: the nearest one is told.
    """
    if high_lr_factor < 3:
        raise ValueError(
            f"high_lr_factor is that of the honest rival's learning rate, at least 3, but got {high_lr_factor}."
        )
    for name in rules:
        _check_known(name)
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
        for name in (one for one in rules if _slices(one)):
            plan = StudentPlan(_strategy(name, ratio), defects=only, reactivate=first and reactivate)
            students[f"{name.replace('+', ' + ')} {ratio:g}"] = plan
    for name in (one for one in rules if not _slices(one)):
        students[name.replace("+", " + ")] = StudentPlan(_strategy(name, None), reactivate=reactivate)
    if rows:
        students["finetune, rows mean"] = StudentPlan(Finetune(embedding_rows="mean"), reactivate=reactivate)
    return students


def _check_known(name: str) -> None:
    for part in name.split("+"):
        if part not in _KNOWN:
            raise ValueError(
                f"Students are named {', '.join(_KNOWN)}, or several of these joined by +, but got {name!r}."
                f"{nearest([part], _KNOWN)}"
            )


def _kind(part: str) -> type[Strategy]:
    return STRATEGIES[_LAYERWISE.get(part, part)]


def _slices(name: str) -> bool:
    return any(issubclass(_kind(part), SliceAndReset) for part in name.split("+"))


def _strategy(name: str, ratio: float | None) -> Strategy:
    parts = []
    for part in name.split("+"):
        recipe: dict[str, Any] = {"slice_ratio": ratio} if issubclass(_kind(part), SliceAndReset) else {}
        parts.append(_kind(part)(**recipe, **({"scope": "layer"} if part in _LAYERWISE else {})))
    return as_strategy(parts)
