"""Several strategies as one: they prepare in order, and what holds the student is nested."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.base import Hold, Preparation, Run, Strategy
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.plain import Retrain
from remos_hf.strategies.renofeation import DeltaR, Renofeation
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData


@dataclass(frozen=True)
class Composed(Strategy):
    """Strategies one after another. The first prepares first; its loss is outermost.

    Whatever the order, parts that change the inputs (`Hardened`, `Guided`) are outside of all others, and tell them
    which samples are still clean.

    Attributes:
        strategies: The parts, at least two, of which one at most slices. Their descriptions (`to_dict`) will do.

    Raises:
        ValueError: The parts cannot go together: two slice, one is a list, one computes weights that another would not
            hold, or one changes all samples and another looks at clean ones.
    """

    strategies: tuple[Strategy, ...]

    def __post_init__(self) -> None:
        """Refuse parts that cannot go together, before anything is loaded."""
        parts = tuple(one if isinstance(one, Strategy) else strategy_from_dict(one) for one in self.strategies)
        if len(parts) < 2:
            raise ValueError(f"A list of strategies holds two or more, but got {len(parts)}.")
        if any(isinstance(one, Composed) for one in parts):
            raise ValueError("A list of strategies holds strategies, not lists of them. Write them in one list.")
        slicing = [type(one).__name__ for one in parts if isinstance(one, SliceAndReset)]
        if len(slicing) > 1:
            raise ValueError(
                f"One strategy of a list may choose a slice, but {' and '.join(slicing)} both do: a student has one "
                "record of what it kept."
            )
        _check_weights_that_are_held(parts)
        _check_clean_samples(parts)
        object.__setattr__(self, "strategies", parts)

    def to_dict(self) -> dict[str, Any]:
        """Give the parts' names, joined, and their descriptions."""
        parts = [one.to_dict() for one in self.strategies]
        return {"name": " + ".join(one["name"] for one in parts), "strategies": parts}

    def with_seed(self, seed: int) -> "Composed":
        """Give the run's seed to every part that names none."""
        return Composed(tuple(one.with_seed(seed) for one in self.strategies))

    @property
    def refuses_adapters(self) -> str:
        """The reason of the first part that has one."""
        return next((one.refuses_adapters for one in self.strategies if one.refuses_adapters), "")

    @property
    def decays_itself(self) -> bool:
        """Whether any part does."""
        return any(one.decays_itself for one in self.strategies)

    @property
    def computes_weights(self) -> bool:
        """Whether any part does."""
        return any(one.computes_weights for one in self.strategies)

    @property
    def replaces_weights(self) -> bool:
        """Whether any part does."""
        return any(one.replaces_weights for one in self.strategies)

    @property
    def holds(self) -> bool:
        """Whether any part acts while the student trains."""
        return any(one.holds for one in self.strategies)

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Let every part prepare, in order.

        Raises:
            ValueError: Two parts chose a slice.
        """
        return _merged([one.prepare(student, data) for one in self.strategies])

    def restart(self, student: nn.Module, data: StudentData, relevant_slice: RelevantSlice | None) -> None:
        """Let every part start the base again, in order; the slice goes to the part that chose it."""
        for one in self.strategies:
            one.restart(student, data, relevant_slice if isinstance(one, SliceAndReset) else None)

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold | None:
        """Nest what the parts hold the student by; None if none does.

        Warns if one of them pulls back what another gave up.

        Raises:
            ValueError: One of them changes samples that are still clean, and one outside of it leaves none.
        """
        given_up = [type(one).__name__ for one in self.strategies if _gives_up(one)]
        if given_up and any(isinstance(one, L2SP) for one in self.strategies):
            warnings.warn(
                f"L2SP pulls what {given_up[0]} gives up back to the teacher's values while the student trains, "
                "defects included. Leave one of them out. (remos_hf)",
                stacklevel=2,
            )
        found = [(one, one.hold(student, teacher)) for one in self.strategies if one.holds]
        held = sorted((pair for pair in found if pair[1] is not None), key=lambda pair: -pair[1].outside)
        for place, (one, hold) in enumerate(held):
            before = next((other for other, _ in held[:place] if other.changes_all), None)
            if hold.takes_clean and before is not None:
                raise ValueError(_nothing_left(one, before, "change"))
        return _Nested([hold for _, hold in held]) if held else None


def _check_weights_that_are_held(parts: Sequence[Strategy]) -> None:
    computing = [type(one).__name__ for one in parts if one.computes_weights]
    refusing = [one for one in parts if one.refuses_computed_weights]
    if computing and refusing:
        raise ValueError(
            f"{computing[0]} has its student compute with other weights than those that train, and "
            f"{type(refusing[0]).__name__} would not hold them: {refusing[0].refuses_computed_weights}."
        )


def _check_clean_samples(parts: Sequence[Strategy]) -> None:
    changing = [one for one in parts if one.changes_all]
    looking = [one for one in parts if one.needs_clean]
    if changing and looking:
        raise ValueError(_nothing_left(looking[0], changing[0], "compare"))


def _nothing_left(one: Strategy, before: Strategy, does: str) -> str:
    name, other = type(one).__name__, type(before).__name__
    return (
        f"{name} takes the samples that {other} leaves clean, but that changes all of them, so {name} would {does} "
        "none. Leave one of them out, or lower the share of the one that has a share."
    )


def _gives_up(strategy: Strategy) -> bool:
    rows = getattr(strategy, "embedding_rows", "keep") != "keep"
    return rows or isinstance(strategy, (SliceAndReset, Retrain, DeltaR, Renofeation))


class _Nested(Hold):
    """Holds around one another, the first outermost."""

    def __init__(self, holds: Sequence[Hold]) -> None:
        self.holds = holds
        for place, one in enumerate(holds):
            one.around = holds[:place]
        self.needs_teacher = any(one.needs_teacher for one in holds)

    def begin(self, student: nn.Module, data: StudentData) -> None:
        for one in self.holds:
            one.begin(student, data)

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        for one in reversed(self.holds):
            run = _around(one, model, run)
        return run(inputs)

    def after_step(self, model: nn.Module) -> None:
        for one in self.holds:
            one.after_step(model)

    def finish(self, model: nn.Module, data: StudentData) -> None:
        for one in self.holds:
            one.finish(model, data)

    def details(self) -> dict[str, Any]:
        # The student is trained: two parts of one word stand side by side, in the order of the list.
        told: dict[str, Any] = {}
        for one in self.holds:
            for word, what in one.details().items():
                told[_free_word(word, told)] = what
        return told

    def state_dict(self) -> dict[str, Any]:
        return {str(place): one.state_dict() for place, one in enumerate(self.holds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for place, one in enumerate(self.holds):
            one.load_state_dict(state[str(place)])


def _free_word(word: str, taken: Mapping[str, Any]) -> str:
    """Give the word, numbered from the second time on."""
    numbered = (f"{word}_{number}" for number in range(2, len(taken) + 3))
    return next(one for one in (word, *numbered) if one not in taken)


def _around(hold: Hold, model: nn.Module, run: Run) -> Run:
    return lambda inputs: hold.loss(model, inputs, run)


def _merged(done: Sequence[Preparation]) -> Preparation:
    slicing = [one for one in done if one.relevant_slice is not None]
    if len(slicing) > 1:
        raise ValueError(f"{len(slicing)} strategies of a list chose a slice, but a student has one record of it.")
    chosen = slicing[0] if slicing else Preparation()
    seconds: dict[str, float] = {}
    for one in done:
        for step, spent in one.seconds.items():
            seconds[step] = seconds.get(step, 0.0) + spent
    rows = sum(one.rows_reset for one in done)
    return replace(chosen, seconds=seconds, rows_reset=rows, details=_joined(one.details for one in done))


def _joined(several: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Put together what parts of a list say of themselves before training.

    Raises:
        ValueError: Two of them use one word.
    """
    joined: dict[str, Any] = {}
    for one in several:
        twice = joined.keys() & one.keys()
        if twice:
            raise ValueError(f"Two strategies of a list both record {sorted(twice)}, and a record holds one of each.")
        joined |= one
    return joined


def as_strategy(given: Strategy | Sequence[Strategy]) -> Strategy:
    """Give the strategy that the caller meant: itself, or that of a list.

    Raises:
        TypeError: It is neither a strategy nor a list of them.
    """
    if isinstance(given, Strategy):
        return given
    parts = tuple(given) if isinstance(given, (list, tuple)) else ()
    if not parts or not all(isinstance(one, Strategy) for one in parts):
        raise TypeError(f"strategy is a Strategy such as Finetune(), or a list of them, but got {given!r}.")
    return parts[0] if len(parts) == 1 else Composed(parts)


def strategy_from_dict(description: Mapping[str, Any]) -> Strategy:
    """Make a strategy from what its `to_dict` gave, such as a record's.

    Raises:
        ValueError: No strategy of that name is known. One of your own must be imported first.
    """
    values = dict(description)
    name = values.pop("name", None)
    if "strategies" in values:
        return Composed(tuple(strategy_from_dict(one) for one in values["strategies"]))
    kinds = {kind.__name__: kind for kind in _kinds_of(Strategy)}
    if name not in kinds:
        raise ValueError(f"There is no strategy {name!r}. Known are {', '.join(sorted(kinds))}.")
    return kinds[name](**values)


def _kinds_of(kind: type[Strategy]) -> list[type[Strategy]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _kinds_of(child))]
