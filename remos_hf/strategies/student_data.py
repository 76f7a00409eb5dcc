"""The student's data as a strategy sees it: batches, and statistics of them that are taken once."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import RemosError, UnsupportedModelError
from remos_hf.layers import weights_hash
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.criteria import Criterion
from remos_hf.profiling.data_pass import observe, profile_coverage
from remos_hf.profiling.means import InputMeans
from remos_hf.profiling.observers import Activation, Observer, Slot
from remos_hf.profiling.processes import in_processes, told_by_all
from remos_hf.profiling.second_moments import SecondMoments

logger = logging.getLogger(__name__)

Batches = Callable[[int | None], Iterable]


class StudentData:
    """This process's share of the student's training data, unshuffled.

    Args:
        batches: Called with a number of samples over all processes (None for all), gives this process's batches.
        seed: The run's seed: that of a strategy which names none of its own.
        max_samples: Samples that a run looks at before it trains, for strategies that name no number; None for all.
        num_samples: Samples that there are; None where that is not known.
        is_stream: The data may have no end, so that nothing asks for all of it unasked.
        mask_token: Id of the mask token of the tokenizer that made the data; None where there is none, or none is
            known.
        held_out: Called, gives this process's batches of clean data that the student does not train on; None if there
            are none.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        seed: int = 0,
        max_samples: int | None = None,
        num_samples: int | None = None,
        is_stream: bool = False,
        mask_token: int | None = None,
        held_out: Callable[[], Iterable] | None = None,
    ) -> None:
        self._batches, self.seed, self.max_samples = batches, seed, max_samples
        self.num_samples, self.is_stream = num_samples, is_stream
        self.mask_token, self.held_out = mask_token, held_out
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
        if known is None or not _is_of(known, student):
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

    def layers_that_run(
        self, student: nn.Module, *, head: tuple[str, ...] | None = None, embeddings: bool = False
    ) -> frozenset[str] | None:
        """Name the layers that run on this data, over all processes: those over which every rule competes.

        It reads until all have run, mostly one batch, and at most the run's number of samples.

        Args:
            student: The student before anything was reset.
            head: As in `profile_coverage`.
            embeddings: As in `profile_coverage`.

        Returns:
            Names as `CoverageProfile.input_counts` has them. None if that cannot be told of this model; the log says
            so.
        """
        wanted = set(adapter_for(student, head).layers(embeddings=embeddings))
        ran, failure = _Ran(), None
        try:  # whoever fails says so before the others wait for its names
            for batch in self.batches(self.max_samples):
                observe(student, [batch], [ran], head=head, embeddings=embeddings, progress=False)
                if ran.names >= wanted:
                    break
        except Exception as error:
            failure = error
        mine = (sorted(ran.names), failure and str(failure), isinstance(failure, UnsupportedModelError))
        told = told_by_all(mine) if in_processes() else [mine]
        if failure is not None and not isinstance(failure, UnsupportedModelError):
            raise failure
        for rank, (_, failed, unsupported) in enumerate(told):
            if failed and not unsupported:
                raise RemosError(f"Process {rank} failed while it read its share of the data: {failed}")
            if failed:
                logger.info("All layers compete, whether they run or not: %s", failed)
                return None
        return frozenset(name for names, _, _ in told for name in names)

    def input_means(self, student: nn.Module, *, head: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Give the mean of what every layer reads, by layer name, over the run's number of samples."""
        means = InputMeans()
        self._observe(student, means, head)
        return means.means()

    def second_moments(self, student: nn.Module, *, head: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Give the mean of x x^T of what every layer reads, by layer name, over the run's number of samples."""
        moments = SecondMoments()
        self._observe(student, moments, head)
        return moments.moments()

    def _observe(self, student: nn.Module, observer: InputMeans | SecondMoments, head: tuple[str, ...] | None) -> None:
        observe(
            student, self.batches(self.max_samples), [observer], head=head, max_samples="all", across_processes=True
        )


def _is_of(profile: CoverageProfile, student: nn.Module) -> bool:
    layers = adapter_for(student, ()).layers(embeddings=True)
    if not profile.input_counts.keys() <= layers.keys():
        return False
    return profile.teacher_hash == weights_hash({name: layers[name] for name in profile.input_counts})


class _Ran(Observer):
    """Notes which layers run. It adds nothing up: who asks joins the names of all processes."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def see(self, slot: Slot, activation: Activation) -> None:
        self.names.add(slot.name)

    def see_tokens(self, slot: Slot, tokens: Tensor, real: Tensor) -> None:
        self.names.add(slot.name)
