"""Strategy: how a student starts and what holds it while it trains. Five moments, all optional."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.tokens import seen_tokens
from remos_hf.slicing.refill import reset_unseen_rows
from remos_hf.slicing.relevant_slice import RelevantSlice

Batches = Callable[[int | None], Iterable]
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
    """

    profile: CoverageProfile | None = None
    relevant_slice: RelevantSlice | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    squares_reset: float | None = None
    rows_reset: int = 0

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
                f" Coverage of {self.profile.num_samples:,} samples;"
                f" {self.profile.share_never_covered:.0%} of the neurons never covered."
            )
        return (
            f"Kept {relevant.num_kept:,} of {relevant.num_weights:,} weights ({relevant.share_kept:.2%}, asked for "
            f"{relevant.slice_ratio:.2%}) by rule {relevant.rule}, scope {relevant.scope}.{seen}{tied} "
            f"The weights given up hold {self.squares_reset or 0:.0%} of the squares. "
            f"Share kept by layer group: {groups}. Took {took}. {rows}"
        ).rstrip()


@dataclass(frozen=True)
class Strategy:
    """A way to turn a teacher into a student. Fields are hyper-parameters, JSON values only."""

    def to_dict(self) -> dict[str, Any]:
        """Give the name and the hyper-parameters as JSON values, for `remos_config.json`."""
        return {"name": type(self).__name__, **asdict(self)}

    def prepare(self, student: nn.Module, batches: Batches) -> Preparation:
        """Start the student, in place, before it is wrapped and before its optimizer is built.

        Args:
            student: A copy of the teacher, with its new head.
            batches: Called with a number of samples (None for all), gives this process's share of the student's
                training data, unshuffled.

        Returns:
            What was done.
        """
        return Preparation()

    def restart(self, student: nn.Module, batches: Batches, relevant_slice: RelevantSlice | None) -> None:
        """Start the base of a resumed adapter run as `prepare` did, in place, without choosing anything again.

        Args:
            student: A copy of the teacher, with its new head.
            batches: As in `prepare`.
            relevant_slice: The slice that `prepare` chose, if it chose one.
        """
        self.prepare(student, batches)

    def before_forward(self, model: nn.Module, inputs: Any) -> Any:  # noqa: ANN401 - a batch as it was collated
        """Give the inputs that a training step really runs on."""
        return inputs

    def penalty(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor | None:  # noqa: ANN401
        """Give what is added to the loss of a training step; a scalar, or None for nothing."""
        return None

    def after_step(self, model: nn.Module) -> None:
        """Act after each optimizer step."""
        return

    def finish(self, model: nn.Module, batches: Batches) -> None:
        """Act once, after training."""
        return

    @property
    def acts_in_loss(self) -> bool:
        """Whether `before_forward` or `penalty` does anything, so that the loss must be computed by us."""
        kind = type(self)
        return kind.before_forward is not Strategy.before_forward or kind.penalty is not Strategy.penalty


def check_embedding_rows(embedding_rows: str) -> None:
    """Refuse what is neither."""
    if embedding_rows not in ("keep", "mean"):
        raise ValueError(f"embedding_rows is 'keep' or 'mean', but got {embedding_rows!r}.")


def reset_rows(embedding_rows: EmbeddingRows, student: nn.Module, batches: Batches) -> int:
    """Reset the embedding rows of tokens that the data never shows, in place, if asked to; give their number."""
    if embedding_rows == "keep":
        return 0
    return reset_unseen_rows(student, seen_tokens(student, batches(None), across_processes=True))


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
