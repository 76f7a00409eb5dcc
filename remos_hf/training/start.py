"""How a run starts its student: what was asked for, and the start itself or a checkpoint's."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch import nn
from transformers import Trainer

from remos_hf.adapters.class_names import take_class_names
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import as_strategy
from remos_hf.strategies.slice_and_reset import Remos
from remos_hf.training.effect_search import (
    EffectSearch,
    asks_for_search,
    knob_of,
    recorded_setting,
    start_at_mildest_setting,
)
from remos_hf.training.moments import Moments, check_best_model
from remos_hf.training.profiling_data import trainer_data
from remos_hf.training.ratio_search import RatioSearch, recorded_ratio, slices, start_at_smallest_ratio
from remos_hf.training.reporting import earlier_slice

logger = logging.getLogger(__name__)


def chosen_strategy(
    slice_ratio: float | None, strategy: Strategy | Sequence[Strategy] | None, head: tuple[str, ...] | None = None
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
    return Remos(slice_ratio, head=head) if strategy is None else as_strategy(strategy)


def chosen_start(
    slice_ratio: float | Literal["auto"] | None,
    strategy: Strategy | Sequence[Strategy] | None,
    accuracy_budget: float | None,
    ratio_search: RatioSearch | EffectSearch | None,
) -> tuple[Strategy, RatioSearch | EffectSearch | None]:
    """Settle what the caller asked for: a strategy, and how its ratio or another field is searched if it is."""
    given = None if strategy is None else as_strategy(strategy)
    by_effect = isinstance(ratio_search, EffectSearch) or (given is not None and asks_for_search(given))
    if slice_ratio != "auto" and (not by_effect or given is None or slice_ratio is not None):
        if accuracy_budget is not None or ratio_search is not None:
            raise ValueError(
                "accuracy_budget= and ratio_search= say how slice_ratio='auto' or energy='auto' searches, but got "
                f"slice_ratio={slice_ratio}."
            )
        return chosen_strategy(slice_ratio, given), None
    if accuracy_budget is not None and ratio_search is not None:
        raise ValueError(
            f"Pass either accuracy_budget={accuracy_budget} or ratio_search=, which has an accuracy_budget of its own "
            f"({ratio_search.accuracy_budget})."
        )
    template = Remos(1.0) if given is None else given
    _check_searched(slice_ratio, template, ratio_search, by_effect)
    if ratio_search is None:
        kind = EffectSearch if by_effect else RatioSearch
        ratio_search = kind() if accuracy_budget is None else kind(accuracy_budget=accuracy_budget)
    return template, ratio_search


def _check_searched(slice_ratio: object, template: Strategy, search: object, by_effect: bool) -> None:
    """Refuse a search that does not go with what it would settle."""
    name = template.to_dict()["name"]
    if slice_ratio == "auto" and not slices(template):
        raise ValueError(
            f"slice_ratio='auto' searches the ratio of a strategy that slices, but {name} keeps no share of the "
            "weights. Leave out one of the two."
        )
    knob = knob_of(template)[1] if by_effect else "slice_ratio"
    if slice_ratio == "auto" and knob != "slice_ratio":
        raise ValueError(
            f"One setting is searched at a time, but got slice_ratio='auto' and {name} with {knob}='auto'."
        )
    if by_effect and isinstance(search, RatioSearch):
        raise ValueError(
            f"RatioSearch searches slice_ratio='auto'. For {knob}='auto' pass ratio_search=EffectSearch(...)."
        )


def start_run(
    trainer: Trainer,
    strategy: Strategy,
    search: RatioSearch | EffectSearch | None,
    checkpoint: str | Path | None,
    with_adapters: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Moments:
    """Start the trainer's model, in place, or take the start of the checkpoint that training will resume from.

    Args:
        trainer: The trainer; its model is the teacher with its new head.
        strategy: The strategy; the template of a search.
        search: How its ratio or another field is searched, if it is.
        checkpoint: The folder that `train()` will resume from, if it will.
        with_adapters: Adds what the trials of a search train instead of the model's own weights.

    Raises:
        ValueError: The search cannot be made, the model has its data's classes in another order, or the strategy would
            overwrite the best checkpoint that the trainer takes back.
        RemosError: No ratio stays within the budget, or the checkpoint was made another way.
    """
    check_best_model(strategy, trainer.args)
    take_class_names(trainer.model, trainer.train_dataset)
    data = trainer_data(trainer)
    if checkpoint is not None:
        if search is not None:
            recorded = recorded_setting if isinstance(search, EffectSearch) else recorded_ratio
            strategy = recorded(Sidecars.load(checkpoint), strategy, search)
        moments = Moments(strategy, data)
        moments.resume(trainer.model, checkpoint)
        return moments
    if search is not None:
        start = start_at_mildest_setting if isinstance(search, EffectSearch) else start_at_smallest_ratio
        moments = start(trainer, strategy, search, data, with_adapters)
    else:
        moments = Moments(strategy, data)
        moments.start(trainer.model)
    before = earlier_slice(getattr(trainer.model, "name_or_path", None) or "")
    if before and moments.sidecars.relevant_slice is not None and trainer.is_world_process_zero():
        logger.warning(before)
    return moments
