"""The student's data as a strategy sees it: batches, and statistics of them that are taken once."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from torch import nn

from remos_hf.layers import weights_hash
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.criteria import Criterion
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.slicing.competition import competing_layers

Batches = Callable[[int | None], Iterable]


class StudentData:
    """This process's share of the student's training data, unshuffled.

    Args:
        batches: Called with a number of samples over all processes (None for all), gives this process's batches.
        seed: The run's seed: that of a strategy which names none of its own.
        max_samples: Samples that a run looks at before it trains, for strategies that name no number; None for all.
        num_samples: Samples that there are; None where that is not known.
        is_stream: The data may have no end, so that nothing asks for all of it unasked.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        seed: int = 0,
        max_samples: int | None = None,
        num_samples: int | None = None,
        is_stream: bool = False,
    ) -> None:
        self._batches, self.seed, self.max_samples = batches, seed, max_samples
        self.num_samples, self.is_stream = num_samples, is_stream
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
        max_samples: int | Literal["all"] | None = None,
    ) -> CoverageProfile:
        """Count the coverage of this data, as `profile_coverage` does, over all processes.

        A student that is bit for bit another's equal is not profiled twice: a ratio search starts many.

        Args:
            student: The student before anything was reset.
            criterion: When a neuron counts as covered.
            source: As in `profile_coverage`.
            head: As in `profile_coverage`.
            embeddings: As in `profile_coverage`.
            max_samples: Samples over all processes, or "all"; the run's number if None.
        """
        samples = self.max_samples if max_samples is None else None if max_samples == "all" else max_samples
        asked = json.dumps([criterion.to_dict(), source, head, embeddings, samples])
        known = self._profiles.get(asked)
        if known is None or known.teacher_hash != weights_hash(
            competing_layers(student, known, head=head, embeddings=embeddings)[0]
        ):
            known = profile_coverage(
                student,
                self.batches(samples),
                criterion=criterion,
                source=source,
                head=head,
                embeddings=embeddings,
                max_samples="all",  # of the batches, which are no more than was asked for
                across_processes=True,
            )
            capped = samples is not None and known.num_samples >= samples and samples != self.num_samples
            known = self._profiles[asked] = replace(known, capped=True) if capped else known
        return known
