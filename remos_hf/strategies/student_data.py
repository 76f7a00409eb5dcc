"""The student's data as a strategy sees it: batches, and statistics of them that are taken once."""

import json
from collections.abc import Callable, Iterable

from torch import nn

from remos_hf.layers import weights_hash
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.criteria import Criterion
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.slicing.relevant_slice import competing_layers

Batches = Callable[[int | None], Iterable]


class StudentData:
    """This process's share of the student's training data, unshuffled.

    Args:
        batches: Called with a number of samples over all processes (None for all), gives this process's batches.
        seed: The run's seed: that of a strategy which names none of its own.
        max_samples: Samples that a run looks at before it trains, for strategies that name no number; None for all.
        is_stream: The data has no known end, so that nothing may ask for all of it.
    """

    def __init__(
        self, batches: Batches, *, seed: int = 0, max_samples: int | None = None, is_stream: bool = False
    ) -> None:
        self._batches, self.seed, self.max_samples, self.is_stream = batches, seed, max_samples, is_stream
        self._profiles: dict[str, CoverageProfile] = {}

    def batches(self, max_samples: int | None = None) -> Iterable:
        """Give the batches of so many samples; of all if None."""
        return self._batches(max_samples)

    def profile(
        self,
        student: nn.Module,
        *,
        criterion: Criterion,
        source: str = "hooks",
        head: tuple[str, ...] | None = None,
        embeddings: bool = False,
        max_samples: int | None = None,
    ) -> CoverageProfile:
        """Count the coverage of this data, as `profile_coverage` does, over all processes.

        A student that is bit for bit another's equal is not profiled twice: a ratio search starts many.

        Args:
            student: The student before anything was reset.
            criterion: When a neuron counts as covered.
            source: As in `profile_coverage`.
            head: As in `profile_coverage`.
            embeddings: As in `profile_coverage`.
            max_samples: Samples over all processes; the run's number if None.
        """
        samples = self.max_samples if max_samples is None else max_samples
        asked = json.dumps([criterion.to_dict(), source, head, embeddings, samples])
        known = self._profiles.get(asked)
        if known is None or known.teacher_hash != weights_hash(
            competing_layers(student, known, head=head, embeddings=embeddings)
        ):
            known = self._profiles[asked] = profile_coverage(
                student,
                self.batches(samples),
                criterion=criterion,
                source=source,
                head=head,
                embeddings=embeddings,
                across_processes=True,
            )
        return known
