"""How a run starts its student: what was asked for, the preparation, and a checkpoint's start."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer

from remos_hf.errors import RemosError
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.randomness import own_randomness
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Batches, Preparation, Strategy
from remos_hf.strategies.slice_and_reset import Remos, SliceAndReset
from remos_hf.training.profiling_data import student_batches
from remos_hf.training.ratio_search import RatioSearch, resumed_at_its_ratio, start_at_smallest_ratio

logger = logging.getLogger(__name__)


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
