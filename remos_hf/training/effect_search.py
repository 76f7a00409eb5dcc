"""energy="auto": the mildest setting of a strategy whose student loses triggers of the defender's own.

Accuracy alone does not say whether a student was taken far enough from its teacher. So own triggers are taught to a
copy of the teacher on the student's clean data, and a setting is tried twice: on the teacher, for the accuracy and for
what the triggers turn where nobody taught them, and on that copy.

Nothing here can see a trigger of the teacher's: there is no argument that takes one. That own triggers go says that
such triggers go; whether the teacher's own do is for `evaluate_transfer` to say.
"""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import Subset
from transformers import Trainer

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import RemosError
from remos_hf.evaluation.measures import Rate
from remos_hf.layers import is_below
from remos_hf.randomness import own_randomness
from remos_hf.scanning.own_triggers import OwnTrigger, draw_triggers
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import Composed, as_strategy
from remos_hf.strategies.own_backdoors import teach
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.short_runs import Samples, check_counts, free_copy
from remos_hf.strategies.student_data import StudentData
from remos_hf.training.held_out import predicted_labels
from remos_hf.training.moments import Moments
from remos_hf.training.trials import Trial, Trials, check_searchable, warn_if_unresolved

logger = logging.getLogger(__name__)

RECORD_KEY = "effect_search"  # in `remos_config.json`
# Settings that are tried by the name of the field that is searched, the mildest first.
KNOBS: dict[str, tuple[float, ...]] = {
    "energy": (0.99, 0.97, 0.95, 0.9, 0.8),
    "slice_ratio": (0.9, 0.7, 0.5, 0.3, 0.1),
    "k": (4, 8, 16, 32, 64),
}


@dataclass(frozen=True)
class EffectSearch:
    """How a setting is searched by its effect on own triggers: `energy`, `slice_ratio` or `k` of a strategy.

    Attributes:
        accuracy_budget: Accuracy that a setting may cost, as a share, in (0, 1): 0.02 is two points.
        effect_budget: How far the share of samples that own triggers turn may stay above the same share of a student of
            the teacher itself, which nobody taught them, in (0, 1).
        settings: What to try, the mildest first; None for the ladder of the field in `KNOBS`.
        num: Own triggers, all taught to one copy.
        implant_steps: Steps by which they are taught.
        batch_size: Clean samples in such a step.
        learning_rate: AdamW's in these steps.
        share_of_steps: Length of a trial, as a share of the planned steps, in (0, 1]. At half, the default, a setting
            costs a whole training, and so does plain fine-tuning.
        failures_in_a_row: Stop after so many settings in a row that cost too much accuracy.
        metric: As in `RatioSearch`; own triggers are counted by labels all the same.

    Raises:
        ValueError: A value is out of range.

    Source:
        Own triggers: BD-VAX. Choosing a setting by them is ours.
    """

    accuracy_budget: float = 0.02
    effect_budget: float = 0.05
    settings: tuple[float, ...] | None = None
    num: int = 5
    implant_steps: int = 200
    batch_size: int = 16
    learning_rate: float = 1e-4
    share_of_steps: float = 0.5
    failures_in_a_row: int = 2
    metric: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no search could use, before anything is loaded."""
        for name in ("accuracy_budget", "effect_budget", "share_of_steps", "learning_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is above 0 and at most 1, but got {getattr(self, name)}.")
        check_counts(self, num=1, implant_steps=1, batch_size=1, failures_in_a_row=1)
        if self.settings is not None:
            object.__setattr__(self, "settings", tuple(self.settings))
            if not self.settings or len(set(self.settings)) < len(self.settings):
                raise ValueError(f"settings are numbers to try, each once, the mildest first, but got {self.settings}.")

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return {**asdict(self), "settings": None if self.settings is None else list(self.settings)}


def start_at_mildest_setting(
    trainer: Trainer,
    template: Strategy,
    search: EffectSearch,
    data: StudentData,
    with_adapters: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Moments:
    """Try settings on copies of a trainer's model, and start the model itself, in place, at the mildest that does.

    Args:
        trainer: With its model, training data and `eval_dataset`, the held-out clean data, which has then taken part in
            a choice: report the student's accuracy on other data.
        template: The strategy; its setting is replaced.
        search: What to try.
        data: The student's data.
        with_adapters: Adds what is trained instead of the model's own weights, after it was started.

    Returns:
        The moments of the strategy with the setting that was chosen, started; the record of the search lies in
        `sidecars.config["effect_search"]`.

    Raises:
        ValueError: The trainer or its held-out data cannot be searched with.
        RemosError: Plain fine-tuning learns nothing within a trial, or loses the own triggers by itself; or no setting
            does both. The message has the curve, and the model is left whole.

    Warns:
        UserWarning: The held-out data holds too few samples to tell a difference as small as a budget.
    """
    knob = knob_of(template)[1]
    check_searchable(trainer, f"{knob}='auto'")
    settings = KNOBS[knob] if search.settings is None else search.settings
    strategies = {setting: _at_setting(template, setting) for setting in settings}  # refuses before hours go by
    trials = Trials(trainer, search, data, with_adapters)
    trials.rehearse()
    implanted, triggers = _implanted(trainer.model, template, search, data)

    def tried(setting: float | None, strategy: Strategy, plain: Trial | None = None) -> _Tried:
        name = "plain fine-tuning" if setting is None else f"{knob} {setting:g}"
        flips = partial(_flips, triggers)
        clean = trials.run(strategy, name, setting, then=flips)
        if plain is not None and not clean.costs_at_most(search.accuracy_budget, plain):
            return _Tried(clean)
        return _Tried(clean, trials.run(strategy, f"{name}, own triggers", setting, implanted, flips))

    with trials.bar(2 + 2 * len(settings), knob):
        plain = tried(None, Finetune())
        trials.check_learned(plain.clean, "setting")
        needed = {
            "accuracy_budget": warn_if_unresolved(plain.clean.rate, search.accuracy_budget),
            "effect_budget": warn_if_unresolved(plain.clean.found, search.effect_budget, "effect_budget"),
        }
        if plain.excess <= search.effect_budget:
            raise RemosError(
                f"Plain fine-tuning loses own triggers by itself ({plain.told()}), so {knob} cannot be chosen by them. "
                "Teach them longer (EffectSearch(implant_steps=..., learning_rate=...)), or name a number."
            )
        curve = [plain]
        for setting, strategy in strategies.items():
            curve.append(tried(setting, strategy, plain.clean))
            last = curve[-search.failures_in_a_row :]
            if curve[-1].excess <= search.effect_budget or all(one.own is None for one in last):
                break
    told = "; ".join(one.told() for one in curve)
    if curve[-1].excess > search.effect_budget:
        raise RemosError(
            f"No {knob} that was tried loses own triggers (within effect_budget={search.effect_budget:g} of those "
            f"untaught) and stays within accuracy_budget={search.accuracy_budget:g} of plain fine-tuning after "
            f"{trials.steps} steps: {told}. Allow a larger budget, longer trials (EffectSearch(share_of_steps=1)) or "
            "other settings, or ask for strategy=Finetune(), which takes nothing from the teacher and keeps its "
            "defects."
        )
    logger.info("Chose %s=%g by own triggers: %s.", knob, setting, told)
    moments = Moments(strategy, data)
    moments.start(trainer.model).config[RECORD_KEY] = {
        **search.to_dict(),
        "knob": knob,
        "setting": setting,
        "planned_steps": trials.planned,
        "samples_needed": needed,
        "triggers": [trigger.to_dict() for trigger in triggers],
        "curve": [one.point(search, plain.clean) for one in curve],
    }
    return moments


@dataclass(frozen=True)
class _Tried:
    """A setting: its student of the teacher, and that of the copy that own triggers were taught to.

    The second was not trained where the first has lost too much accuracy.
    """

    clean: Trial
    own: Trial | None = None

    @property
    def excess(self) -> float:
        return math.inf if self.own is None else self.own.found.value - self.clean.found.value

    def told(self) -> str:
        rates = [None if one is None else one.found for one in (self.own, self.clean)]
        taught, untaught = ("not measured" if one is None else f"{one.count} of {one.num_samples}" for one in rates)
        return f"{self.clean.told()}, own triggers turn {taught}, untaught {untaught}"

    def point(self, search: EffectSearch, plain: Trial) -> dict[str, Any]:
        own = {} if self.own is None else {"own": asdict(self.own.found), "own_seconds": round(self.own.seconds, 3)}
        measured = self.clean.point(plain, search.accuracy_budget)
        return {"setting": self.clean.setting, **measured, "untaught": asdict(self.clean.found), **own}


def _implanted(
    teacher: nn.Module, template: Strategy, search: EffectSearch, data: StudentData
) -> tuple[nn.Module, tuple[OwnTrigger, ...]]:
    """Teach own triggers to a copy, and give it the teacher's head back: that of a student was never trained."""
    samples = Samples(data, next(teacher.parameters()).device, data.seed)
    triggers = draw_triggers(teacher, samples.batches, search.num, data.seed)
    with own_randomness(data.seed):
        taught = teach(
            free_copy(teacher),
            samples,
            triggers,
            steps=search.implant_steps,
            batch_size=search.batch_size,
            learning_rate=search.learning_rate,
            seed=data.seed,
        ).state_dict()
    head = adapter_for(teacher, getattr(_parts_of(template)[knob_of(template)[0]], "head", None)).head
    fresh = {name: value for name, value in teacher.state_dict().items() if is_below(name, head)}
    copied = copy.deepcopy(teacher)
    copied.load_state_dict({**taught, **fresh})
    return copied, triggers


def _flips(triggers: Sequence[OwnTrigger], trial: Trainer) -> Rate:
    """Count what own triggers turn, of the held-out samples of other labels that are right without.

    Each trigger has samples of its own, so that those that are counted are independent.
    """
    held_out, collate, flipped, hosts = trial.eval_dataset, trial.data_collator, 0, 0
    for at, trigger in enumerate(triggers):
        mine = Subset(held_out, range(at, len(held_out), len(triggers)))
        predictions, labels = predicted_labels(trial, mine)
        trial.data_collator = lambda rows, trigger=trigger: trigger.put_into(collate(rows))
        try:
            turned, _ = predicted_labels(trial, mine)
        finally:
            trial.data_collator = collate
        right = (predictions == labels) & (labels != trigger.label)
        flipped, hosts = flipped + int((right & (turned == trigger.label)).sum()), hosts + int(right.sum())
    if not hosts:
        raise RemosError("No held-out sample of another label is right, so own triggers have nothing to turn.")
    return Rate.of(flipped, hosts)


def recorded_setting(checkpoint_sidecars: Sidecars, template: Strategy, search: EffectSearch) -> Strategy:
    """Give the strategy with the setting that was found when a checkpoint's run started; nothing is searched again.

    Raises:
        RemosError: The checkpoint's setting was not searched, or was searched for otherwise.
    """
    record = checkpoint_sidecars.config.get(RECORD_KEY)
    knob, asked = knob_of(template)[1], search.to_dict()
    found = record and {name: record.get(name) for name in asked}
    if found != asked or record["knob"] != knob:
        was = f"searched by {found} of {record['knob']}" if record else "given, not searched by effect"
        raise RemosError(
            f"The checkpoint's setting was {was}, but the trainer asks for {asked} of {knob}. Resume as it was "
            "started, or start anew from the teacher."
        )
    return _at_setting(template, record["setting"])


def asks_for_search(strategy: Strategy) -> bool:
    """Whether a strategy, or one of a list, says energy="auto"; k="auto" is a search of its own."""
    return any(getattr(part, "energy", None) == "auto" for part in _parts_of(strategy))


def knob_of(strategy: Strategy) -> tuple[int, str]:
    """Say which of a list of strategies (0 for one alone) has the field that a search by effect settles, and its name.

    Raises:
        ValueError: None has such a field, or several have and not one of them is "auto".
    """
    parts = _parts_of(strategy)
    found = [(at, knob) for at, part in enumerate(parts) for knob in KNOBS if hasattr(part, knob)]
    found = [(at, knob) for at, knob in found if getattr(parts[at], knob) == "auto"] or found
    if len(found) != 1:
        what = " and ".join(f"{type(parts[at]).__name__}({knob}=)" for at, knob in found) or "none"
        raise ValueError(
            f"A search by effect settles one field of {', '.join(KNOBS)}, but {strategy.to_dict()['name']} has {what}. "
            "Say 'auto' for one."
        )
    return found[0]


def _at_setting(template: Strategy, setting: float) -> Strategy:
    parts = list(_parts_of(template))
    at, knob = knob_of(template)
    parts[at] = replace(parts[at], **{knob: setting})
    return as_strategy(parts)


def _parts_of(strategy: Strategy) -> tuple[Strategy, ...]:
    return strategy.strategies if isinstance(strategy, Composed) else (strategy,)
