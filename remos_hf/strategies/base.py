"""Strategy: how a student starts. Hold: what is kept while it trains. All moments are optional."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from remos_hf.fields import plain
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.tokens import seen_tokens
from remos_hf.slicing.refill import reset_unseen_rows
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.student_data import StudentData

Run = Callable[[Any], tuple[Tensor, Any]]
EmbeddingRows = Literal["keep", "mean"]


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did to a student, for the log and for the files beside it.

    Attributes:
        profile: The coverage it was decided by; None if no coverage was needed.
        relevant_slice: The weights that were kept; None if nothing was sliced.
        seconds: Wall-clock time by step.
        squares_reset: Share of the sum of squared weights that was given up, in [0, 1]; None if nothing was sliced.
        rows_reset: Embedding rows given up because the student's data never shows their token.
        details: What a strategy without a slice did, JSON values by a word of its own, such as the kept rank of each
            layer. They stand in the record as they are.
    """

    profile: CoverageProfile | None = None
    relevant_slice: RelevantSlice | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    squares_reset: float | None = None
    rows_reset: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """Say in one paragraph what was kept, where, and how long it took; empty if nothing was sliced."""
        relevant = self.relevant_slice
        rows = (
            f"Reset {self.rows_reset:,} embedding rows of tokens that the data never shows." if self.rows_reset else ""
        )
        if relevant is None:
            return rows
        took = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in self.seconds.items())
        groups = ", ".join(f"{group} {share:.1%}" for group, share in share_by_group(relevant).items())
        tied = f" {relevant.tie_group:,} weights tied at the threshold." if relevant.tie_group > 1 else ""
        seen = ""
        if self.profile is not None:
            seen = (
                f" Coverage of {self.profile.num_samples:,} samples{', the limit' if self.profile.capped else ''};"
                f" {self.profile.share_never_covered:.0%} of the neurons never covered."
            )
        return (
            f"Kept {relevant.num_kept:,} of {relevant.num_weights:,} weights ({relevant.share_kept:.2%}, asked for "
            f"{relevant.slice_ratio:.2%}) by rule {relevant.rule}, scope {relevant.scope}.{seen}{tied} "
            f"The weights given up hold {self.squares_reset or 0:.0%} of the squares. "
            f"Share kept by layer group: {groups}. Took {took}. {rows}"
        ).rstrip()


class Hold:
    """What a strategy keeps while one student trains: tensors, a teacher, averages. It does nothing by default.

    Everything that a step changes belongs into `state_dict`, the state of a generator of its own included: a resumed
    run is then the uninterrupted one, bit for bit.
    """

    # Whether the teacher decides what it does, so that a run resumed with another one is refused.
    needs_teacher: bool = False
    # In a list of any order, holds of a larger number are outside: what makes texts longer (2) of what moves inputs (1)
    # of what leaves them as they are (0).
    outside: int = 0
    # Whether it changes those samples alone that holds around it left as they came.
    takes_clean: bool = False
    # Of the latest batch, which samples it passed on as they came: bool, (samples,), on the CPU. None: all.
    clean: Tensor | None = None
    # The holds of a list that are outside of this one, and so have changed what it is given.
    around: "Sequence[Hold]" = ()

    def begin(self, student: nn.Module, data: StudentData) -> None:
        """Act once, before training, on every process; not in a run that is resumed.

        Args:
            student: As it was prepared, not yet wrapped.
            data: As in `Strategy.prepare`.
        """
        return

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401 - a batch as collated
        """Give the loss of a training step, and the model's outputs.

        Args:
            model: The student, unwrapped, in train mode.
            inputs: The batch, on its device.
            run: Gives (loss, outputs) of a batch: the trainer's own loss of the wrapped student, a scalar on the scale
                of a mean over the batch. Hooks may be laid around the call; it may be called more than once.
        """
        return run(inputs)

    def after_step(self, model: nn.Module) -> None:
        """Act after an optimizer step that was taken."""
        return

    def finish(self, model: nn.Module, data: StudentData) -> None:
        """Act once, after training, on every process."""
        return

    def details(self) -> dict[str, Any]:
        """Give what the record says of the run, after `finish`: JSON values by a word of its own.

        In a list, a word that comes again is numbered: "delta", "delta_2".
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint must hold: tensors and JSON values by name, dicts of them included."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; tensors are on the CPU."""
        return


@dataclass(frozen=True)
class Strategy:
    """A recipe that turns a teacher into a student. Fields are hyper-parameters, JSON values only.

    A list of strategies is a strategy too (`Composed`).
    """

    # Why it cannot train adapters instead of the student's own weights; empty where it can.
    refuses_adapters: ClassVar[str] = ""
    # Whether it decays or pulls weights by its loss, so that an optimizer's weight decay would do so a second time.
    decays_itself: ClassVar[bool] = False
    # Whether the student computes its weights from others while it trains, so that those that train are no weights.
    computes_weights: ClassVar[bool] = False
    # Why it cannot hold such a student; empty where it can.
    refuses_computed_weights: ClassVar[str] = ""
    # Whether its hold has other weights take the place of those that trained, once training ends.
    replaces_weights: ClassVar[bool] = False
    # Whether it changes all samples of a batch, so that none is left as it came.
    changes_all: ClassVar[bool] = False
    # Whether it looks at those samples alone that the other strategies of a list left as they came.
    needs_clean: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Give the name and the hyper-parameters as JSON values, for `remos_config.json`."""
        return {"name": type(self).__name__, **plain(asdict(self))}

    def with_seed(self, seed: int) -> "Strategy":
        """Give the recipe with the run's seed where it has a seed and names none.

        Raises:
            ValueError: It names one that is no whole number.
        """
        if not any(one.name == "seed" for one in fields(self)):
            return self
        given = seed if self.seed is None else plain(self.seed)
        if isinstance(given, bool) or not isinstance(given, int):
            raise ValueError(f"seed is a whole number, or None for the run's, but got {given!r}.")
        return self if given is self.seed else replace(self, seed=given)

    @property
    def holds(self) -> bool:
        """Whether it acts while the student trains."""
        return type(self).hold is not Strategy.hold

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Start the student, in place, before it is wrapped and before its optimizer is built.

        Args:
            student: A copy of the teacher, with its new head.
            data: The student's training data, and the run's seed.

        Returns:
            What was done.
        """
        return Preparation()

    def restart(self, student: nn.Module, data: StudentData, relevant_slice: RelevantSlice | None) -> None:
        """Start the base of a resumed adapter run as `prepare` did, in place, without choosing anything again.

        Args:
            student: A copy of the teacher, with its new head.
            data: As in `prepare`.
            relevant_slice: The slice that `prepare` chose, if it chose one.
        """
        self.prepare(student, data)

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold | None:
        """Give what holds the student while it trains; None for nothing. Called once, after `prepare`.

        Args:
            student: The student. In a resumed run its weights are not yet those of the checkpoint, so take names and
                shapes from it, never values.
            teacher: A frozen copy of the student as it was before `prepare`, in eval mode. It is made only for
                strategies that override this method.
        """
        return None


def check_names(recipe: Strategy, *fields_of_names: str) -> None:
    """Make a recipe's lists of names tuples; refuse what holds none, and one string, whose letters would be names.

    Raises:
        ValueError: Names the first such field.
    """
    for name in fields_of_names:
        given = getattr(recipe, name)
        if isinstance(given, str):
            raise ValueError(f"{name} is a tuple of names, but got the string {given!r}: write ({given!r},).")
        if given is None:
            continue
        names = tuple(given) if isinstance(given, Iterable) else (given,)
        if not isinstance(given, Iterable) or not all(isinstance(one, str) for one in names):
            raise ValueError(f"{name} is a tuple of names, but got {given!r}.")
        object.__setattr__(recipe, name, names)


def check_embedding_rows(embedding_rows: str) -> None:
    """Refuse what is neither."""
    if embedding_rows not in ("keep", "mean"):
        raise ValueError(f"embedding_rows is 'keep' or 'mean', but got {embedding_rows!r}.")


def reset_rows(embedding_rows: EmbeddingRows, student: nn.Module, data: StudentData) -> int:
    """Reset the embedding rows of tokens that the data never shows, in place, if asked to; give their number.

    All of the data is read; of a stream, which may have no end, the samples that a run looks at.
    """
    if embedding_rows == "keep":
        return 0
    batches = data.batches(data.max_samples if data.is_stream else None)
    return reset_unseen_rows(student, seen_tokens(student, batches, across_processes=True))


def share_by_group(relevant: RelevantSlice) -> dict[str, float]:
    """Share kept of each group of layers: a block (names up to the first number), or a module of its own."""
    kept: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, shape in relevant.kept.shapes.items():
        group = _group_of(name)
        kept[group] = kept.get(group, 0) + relevant.kept.num_kept(name)
        total[group] = total.get(group, 0) + shape.numel()
    return {group: kept[group] / total[group] for group in total}


def _group_of(parameter_name: str) -> str:
    parts = parameter_name.split(".")[:-1]
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])
