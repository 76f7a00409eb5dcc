"""One pass over the student's data with the teacher in eval mode, whatever is observed in it.

While a batch runs, each activation is laid out sample by sample, as was proved on the first batch, and shown to the
observers. What they keep of it is small, so everything else waits until the batch is through and is done for all layers
of equal width at once. No activation is kept or copied.
"""

import logging
import weakref
from collections.abc import Iterable, Mapping, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from remos_hf.activations import evaluating
from remos_hf.adapters.base import Adapter
from remos_hf.adapters.sequences import Sequence, with_positions
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import RemosError, UnsupportedModelError
from remos_hf.layers import Layer, rankable_layers
from remos_hf.profiling.batches import count_samples, digest, first_samples, take, unpacked
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.coverage_counts import CoverageCounts, warn_of_degenerate
from remos_hf.profiling.criteria import Criterion, median_coverage
from remos_hf.profiling.layouts import WHOLE, Layout, Proof, Unproved, by_sample, prove, real_positions
from remos_hf.profiling.observers import Activation, Observer, Padding, Slot
from remos_hf.profiling.processes import added_up, in_processes, on_main_process, told_by_all
from remos_hf.profiling.taps import Read, Taps

logger = logging.getLogger(__name__)

# What an endless stream is read to, and what trainers profile if not told otherwise. Under NC eight times as many
# change fewer than one bit in a hundred of the slice (benchmarks/results/profile_samples.json), under the median the
# slices of two halves of so many samples do (criteria.md there). It is 2 % of three epochs over 12,800 samples.
DEFAULT_MAX_SAMPLES = 2048


def profile_coverage(
    teacher: nn.Module,
    dataloader: Iterable,
    *,
    criterion: Criterion | None = None,
    source: Literal["hooks", "hidden_states"] = "hooks",
    head: tuple[str, ...] | None = None,
    embeddings: bool = False,
    max_samples: int | Literal["all"] | None = None,
    across_processes: bool = False,
    progress: bool = True,
) -> CoverageProfile:
    """Count, for every neuron of the teacher's body, the samples that cover it.

    The teacher runs in eval mode without gradients; its modes are put back and no hook stays, whatever happens. Which
    axis of an activation is the sample is proved on the first batch, which costs about six samples more. Where rows
    cannot be matched with samples, as those of routed experts, samples run one at a time, and a log line says so.

    Args:
        teacher: The public model, or the student that was just started from it, on the device to run on.
        dataloader: Any iterable of batches: tensors, (inputs, ...) tuples, or mappings as Trainer makes them. Labels
            are not needed. The batches' `attention_mask` says which positions are padding; they never count. Of packed
            rows every sequence is a sample.
        criterion: When a neuron counts as covered; `median_coverage()` if not given. The artifact's is
            `threshold_coverage(0.5)`.
        source: "hooks" sees both ends of every layer. "hidden_states" asks the model for `output_hidden_states`
            instead, where hooks cannot be used: it sees the end of each layer that touches the residual stream, and the
            other end counts 0.
        head: Dotted names of the modules that are never sliced; found for transformers models, none for plain modules.
        embeddings: Whether the rows of the input embeddings are profiled too (a row's neuron is its token).
        max_samples: Stop after so many samples. None takes all of data that has a length and stops at
            `DEFAULT_MAX_SAMPLES` of a stream, which may never end; "all" reads a stream to its end too.
        across_processes: Every process of torch.distributed's default group gives its own share of the batches, and
            all of them get the counts of all shares.
        progress: Show a bar on passes longer than two seconds.

    Returns:
        The profile. Profiles of two data sets, or of the shards of one, add up to the profile of both.

    Raises:
        ValueError: There is no sample, the tensors of a batch disagree on how many, or an argument is out of range.
        NonFiniteError: An activation is NaN or infinite at a real position; the message names the layer.
        UnsupportedModelError: A weight has no magnitude to rank, samples or padding cannot be told apart in an
            activation, or another process failed.

    Source:
        ReMoS, ICSE 2022; artifact my_profile.py:38-104.
        Differs: eval mode and padding left out also for text, no dropped last batch, a constant tensor covers
        nothing, and another default criterion.
    """
    counts = CoverageCounts(median_coverage() if criterion is None else criterion)
    passed = observe(
        teacher,
        dataloader,
        [counts],
        source=source,
        head=head,
        embeddings=embeddings,
        max_samples=max_samples,
        across_processes=across_processes,
        progress=progress,
    )
    profile = counts.profile(source, passed.num_samples, passed.capped, passed.fingerprint)
    if not across_processes or on_main_process():
        warn_of_degenerate(profile, counts.layers)
    return profile


@dataclass(frozen=True)
class Passed:
    """What a pass says of its data.

    Attributes:
        num_samples: Samples that were seen, by all processes.
        capped: Whether it stopped at `max_samples`, so that there may be more data.
        fingerprint: Sum of the batches' digests, modulo 2^256.
    """

    num_samples: int
    capped: bool
    fingerprint: int


def observe(
    teacher: nn.Module,
    batches: Iterable,
    observers: list[Observer],
    *,
    source: Literal["hooks", "hidden_states"] = "hooks",
    head: tuple[str, ...] | None = None,
    embeddings: bool = False,
    max_samples: int | Literal["all"] | None = None,
    across_processes: bool = False,
    progress: bool = True,
) -> Passed:
    """Run the student's data through the teacher once, for any number of observers.

    Args:
        teacher: As in `profile_coverage`, like all that is not named here.
        batches: The data.
        observers: What is counted or added up; what they hold afterwards is of all processes.
        source: Likewise.
        head: Likewise.
        embeddings: Likewise.
        max_samples: Likewise.
        across_processes: Likewise.
        progress: Likewise.

    Raises:
        RemosError: The pass failed on another process.
    """
    if source not in ("hooks", "hidden_states"):
        raise ValueError(f"source is 'hooks' or 'hidden_states', but got {source!r}.")
    limit = _limit(batches, max_samples)
    adapter = adapter_for(teacher, head)
    layers = rankable_layers(adapter.layers(embeddings=embeddings))
    for observer in observers:
        observer.start(layers)
    run = _Pass(adapter, layers, observers, source)
    # Whoever fails says so before the others wait for its share.
    failure: Exception | None = None
    try:
        run.see_all(batches, limit, quiet=not (progress and on_main_process()))
    except Exception as error:
        if not across_processes or not in_processes():
            raise
        failure = error
    if across_processes and in_processes():
        _add_processes(run, failure)
    if not run.num_samples:
        raise ValueError(
            "There is nothing to profile: the dataloader gave no sample. Pass the student's training data."
        )
    return Passed(run.num_samples, run.capped, run.fingerprint)


def _limit(batches: Iterable, max_samples: int | str | None) -> int | None:
    if max_samples == "all":
        return None
    if max_samples is None:
        return None if _has_length(batches) else DEFAULT_MAX_SAMPLES
    if isinstance(max_samples, bool) or not isinstance(max_samples, int) or max_samples < 1:
        raise ValueError(
            f"max_samples is the number of samples to profile, at least 1, or 'all', but got {max_samples!r}."
        )
    return max_samples


def _has_length(batches: Iterable) -> bool:
    if not isinstance(batches, Sized):
        return False
    try:
        return len(batches) >= 0
    except TypeError:  # a DataLoader of a stream
        return False


def _add_processes(run: "_Pass", failure: Exception | None) -> None:
    mine = {"failure": None if failure is None else f"{type(failure).__name__}: {failure}"}
    mine |= {"num_samples": run.num_samples, "capped": run.capped, "fingerprint": run.fingerprint}
    others = told_by_all(mine)
    if failure is not None:
        raise failure
    for rank, one in enumerate(others):
        if one["failure"]:
            raise RemosError(f"Process {rank} failed while it profiled its share of the data: {one['failure']}")
    run.set_state(added_up(run.state(), run.device))
    run.num_samples = sum(one["num_samples"] for one in others)
    run.capped = any(one["capped"] for one in others)
    run.fingerprint = sum(one["fingerprint"] for one in others) % 2**256


class _Alone(Exception):  # noqa: N818 - caught below
    """Samples of this model have to run one at a time."""


class _Pass:
    """Runs batches and shows their activations to the observers."""

    def __init__(self, adapter: Adapter, layers: Mapping[str, Layer], observers: list[Observer], source: str) -> None:
        self.adapter, self.observers = adapter, observers
        self.device = next(iter(layers.values())).device
        self.num_samples, self.fingerprint, self.capped = 0, 0, False
        self._taps = Taps(adapter, layers, source)
        self._proof: Proof | None = None
        self._alone = self._careful = self._unpadded = False
        self._start({}, 0)

    def _start(self, found: Mapping[str, Sequence], samples: int) -> None:
        self._sequences, self._samples = found, samples
        self._paddings: dict[tuple, Padding] = {}
        self._known: dict[tuple, tuple[weakref.ref, int, Activation]] = {}
        self._padded: list[Activation] = []
        self._any_padding: bool | None = None

    def see_all(self, batches: Iterable, limit: int | None, *, quiet: bool) -> None:
        """Run all batches, or as many as hold `limit` samples."""
        taken_apart = unpacked(batches)
        some = taken_apart if limit is None else first_samples(taken_apart, limit)
        total = len(batches) if _has_length(batches) else None
        with evaluating(self.adapter.model), torch.no_grad():
            for batch in tqdm(some, desc="Profiling", delay=2, disable=quiet, total=total):
                self.see_batch(batch)
        self.capped = limit is not None and self.num_samples >= limit
        if self.capped:
            logger.info("Profiling stopped at max_samples=%d.", limit)

    def see_batch(self, batch: Any) -> None:  # noqa: ANN401 - any batch
        """Run one batch and let the observers add it up."""
        samples = count_samples(batch)
        self.fingerprint = (self.fingerprint + digest(batch)) % 2**256
        batch = send_to_device(batch, self.device)
        if self._proof is None:
            self._prove(batch, samples)
        try:
            self._run(batch, samples)
        except Unproved:  # other sizes than before: this batch says what they mean
            self._prove(batch, samples)
            try:
                self._run(batch, samples)
            except Unproved as why:
                self._run_alone_from_now_on(str(why))
                self._run(batch, samples)
        except _Alone as why:
            self._unpadded = True
            self._run_alone_from_now_on(str(why))
            self._run(batch, samples)
        self.num_samples += samples

    def _prove(self, batch: Any, samples: int) -> None:  # noqa: ANN401 - any batch
        def run(some: Any, see: Any) -> None:  # noqa: ANN401 - a batch, a function
            self._taps.run(some, lambda read: see(read.call, read.values, read.neurons))

        try:
            self._proof = prove(self.adapter, batch, samples, run)
        except (RuntimeError, ValueError) as error:
            if samples > 1:
                raise
            # A model that takes one sample at a time needs no proof of which rows are whose.
            self._proof = Proof()
            self._run_alone_from_now_on(f"the model does not take two of them at once ({error})")
        if self._proof.alone and not self._alone:
            self._run_alone_from_now_on(f"rows of '{self._proof.alone[0][0]}' cannot be matched with samples")

    def _run_alone_from_now_on(self, why: str) -> None:
        self._alone = True
        logger.warning("Samples run one at a time, which takes longer: %s.", why)

    def _run(self, batch: Any, samples: int) -> None:  # noqa: ANN401 - any batch
        if not self._alone:
            self._run_together(batch, samples)
            return
        for row in range(samples):
            one = self._without_padding(take(batch, torch.tensor([row]), samples) if samples > 1 else batch)
            if one is not None:
                self._run_together(one, 1)

    def _without_padding(self, batch: Any) -> Any:  # noqa: ANN401 - any batch
        """Cut what is padding alone out of a batch of one sample; None if nothing is left."""
        for name, sequence in self.adapter.sequences(batch).items():
            if sequence.real is None:
                continue
            kept = sequence.real.flatten(0, -2).any(0).nonzero()[:, 0]
            if not len(kept):
                return None
            batch = with_positions(batch, name, sequence.shape, kept)
        return batch

    def _run_together(self, batch: Any, samples: int) -> None:  # noqa: ANN401 - any batch
        self._start(self.adapter.sequences(batch), samples)
        try:
            self._watch(batch)
            if not self._careful and self._is_stained():
                self._careful = True
                self._drop()
                self._start(self._sequences, samples)
                self._watch(batch)
            for observer in self.observers:
                observer.close_batch()
        except BaseException:
            self._drop()
            raise
        finally:
            self._start({}, 0)

    def _watch(self, batch: Any) -> None:  # noqa: ANN401 - any batch
        with ExitStack() as around:
            for observer in self.observers:
                around.enter_context(observer.around(self.adapter, batch))
            self._taps.run(batch, self._see)

    def _drop(self) -> None:
        for observer in self.observers:
            observer.drop_batch()

    def _is_stained(self) -> bool:
        """Whether a sum holds NaN or infinity, which may come from padding alone: 0 times NaN is NaN."""
        sums = [one.mean.sum() for one in self._padded if "mean" in one.__dict__]
        return bool(sums) and not bool(torch.stack([one.cpu() for one in sums]).isfinite().all())

    def _see(self, read: Read) -> None:
        watching = [observer for observer in self.observers if observer.wants(read.layer, read.end)]
        layout = self._layout_of(read)
        if layout is None or not watching or not read.values.numel():
            return
        if read.layer.is_embedding and read.end == "input":
            self._see_tokens(read, layout, watching)
            return
        parts = [read.values]
        if read.end == "output" and read.part is None:
            parts = read.layer.split_parts(read.values)
        for part, values in enumerate(parts, start=read.part or 0):
            activation, view = self._activation_of(values, read.neurons, layout, read)
            activation.hold(values, view)
            for observer in watching:
                observer.see(Slot(read.layer.name, read.end, part), activation)
            activation.hold(None, None)

    def _layout_of(self, read: Read) -> Layout | None:
        """Find how an activation lies; None if it is not of samples."""
        layout = self._proof.layouts.get(read.call)
        if layout is None:
            if not self._alone:
                raise Unproved(f"'{read.call[0]}' ran in another way than on the first batch")
            return WHOLE
        if layout.axis is None:
            return None
        if not self._has_padding():
            if self._unpadded and layout.unclear and _positions_of(read) > self._longest():
                self._cannot_find_padding(read)  # the model pads by itself, as Longformer to its window
            return WHOLE if self._alone else layout
        if layout.unclear:
            self._cannot_find_padding(read)
        return layout

    def _longest(self) -> int:
        return max((one.shape[1:].numel() for one in self._sequences.values()), default=0)

    def _cannot_find_padding(self, read: Read) -> None:
        if not self._alone:
            raise _Alone(f"padding cannot be found in the {read.end} of '{read.call[0]}'")
        raise UnsupportedModelError(
            f"'{read.call[0]}' ran on an activation of shape {tuple(read.values.shape)}, in which the padding of the "
            f"{self._samples} samples cannot be found. Profile with source='hidden_states', give batches without "
            "padding, or name this module in head=."
        )

    def _has_padding(self) -> bool:
        if self._any_padding is None:
            masks = [one.real for one in self._sequences.values() if one.real is not None]
            self._any_padding = any(not bool(real.all()) for real in masks)
        return self._any_padding

    def _activation_of(self, values: Tensor, neurons: int, layout: Layout, read: Read) -> tuple[Activation, Tensor]:
        if layout is WHOLE:
            view, channels_first, padding = values.movedim(neurons, -1).flatten(0, -2)[None], False, None
        else:
            view, axis = by_sample(values, layout, self._samples, neurons, self._sequences)
            padding = self._padding_of(values, neurons, layout, view, axis, read)
            channels_first = axis != view.dim() - 1
            view = view.movedim(axis, 1).flatten(2) if channels_first else view.reshape(len(view), -1, view.shape[-1])
        # q, k and v read one tensor. It is the same one only if this very object is still alive and was not written to
        # since; an address says nothing, because freed memory is reused.
        key = id(values), neurons, layout
        known, written = self._known.get(key), None if values.is_inference() else values._version
        if known is not None and known[0]() is values and known[1] == written:
            return known[2], view
        activation = Activation(channels_first, padding, self._careful, view.shape[2 if channels_first else 1])
        if written is not None:  # inference tensors do not count writes
            self._known[key] = weakref.ref(values), written, activation
        if padding is not None:
            self._padded.append(activation)
        return activation, view

    def _padding_of(
        self, values: Tensor, neurons: int, layout: Layout, view: Tensor, axis: int, read: Read
    ) -> Padding | None:
        sequence = self._sequences.get(layout.sequence)
        if sequence is None or sequence.real is None:
            return None
        others = (*view.shape[1:axis], *view.shape[axis + 1 :])
        key = layout, others, values.device
        if key not in self._paddings:
            real = real_positions(sequence.real, layout, others, neurons % values.dim())
            if real is None:
                self._cannot_find_padding(read)
            self._paddings[key] = self._same_padding(real.to(values.device))
        return self._paddings[key]

    def _same_padding(self, real: Tensor) -> Padding:
        """Give one object for one padding, so that activations of several layouts are added up together."""
        for known in self._paddings.values():
            if known.real.device == real.device and torch.equal(known.real, real):
                return known
        return Padding(real)

    def _see_tokens(self, read: Read, layout: Layout, watching: list[Observer]) -> None:
        activation, view = self._activation_of(read.values, read.neurons, layout, read)
        tokens = view[..., 0]
        real = torch.ones_like(tokens, dtype=torch.bool) if activation.padding is None else activation.padding.real
        for observer in watching:
            observer.see_tokens(Slot(read.layer.name, read.end), tokens, real)

    def state(self) -> dict[str, Tensor]:
        """Give all that the observers added up."""
        return {
            f"{place}/{name}": tensor
            for place, observer in enumerate(self.observers)
            for name, tensor in observer.state().items()
        }

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Give the sums of all processes' states to the observers."""
        for place, observer in enumerate(self.observers):
            prefix = f"{place}/"
            mine = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
            observer.set_state(mine)


def _positions_of(read: Read) -> int:
    return read.values.numel() // read.values.shape[read.neurons]
