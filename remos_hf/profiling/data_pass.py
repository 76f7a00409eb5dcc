"""Take a coverage profile: one pass over the student's data with the teacher in eval mode.

While a batch runs, three reductions are made of each activation, on its device: extremes by position and the mean of
each neuron. What they leave is small, so everything else waits until the batch is through and is done for all layers of
equal width at once. No activation is kept or copied.
"""

import hashlib
import logging
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device, slice_tensors
from torch import Tensor, nn
from tqdm.auto import tqdm

from remos_hf.activations import evaluating, watch
from remos_hf.adapters.base import LABEL_KEYS, Adapter, inputs_of
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.layers import Layer, rankable_layers, weights_hash
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.criteria import ActivationStatistics, Criterion, threshold_coverage

logger = logging.getLogger(__name__)

# Above this share of neurons that no sample covers, most weights tie and coverage hardly speaks.
_DEGENERATE_SHARE = 0.5
# Values of each sample that go into the data fingerprint: enough to tell data sets apart, too few to cost time.
_FINGERPRINT_VALUES = 1024
# Samples that decide a profile where nobody says how many.
DEFAULT_MAX_SAMPLES = 2048


def profile_coverage(
    teacher: nn.Module,
    dataloader: Iterable,
    *,
    criterion: Criterion | None = None,
    source: Literal["hooks", "hidden_states"] = "hooks",
    head: tuple[str, ...] | None = None,
    embeddings: bool = False,
    max_samples: int | None = None,
    across_processes: bool = False,
    progress: bool = True,
) -> CoverageProfile:
    """Count, for every neuron of the teacher's body, the samples that cover it.

    The teacher runs in eval mode without gradients; its modes are put back and no hook stays, whatever happens.

    Args:
        teacher: The public model, or the student that was just started from it, on the device to run on.
        dataloader: Any iterable of batches: tensors, (inputs, ...) tuples, or mappings as Trainer makes them. Labels
            are not needed. The batches' `attention_mask` says which positions are padding; they never count.
        criterion: When a neuron counts as covered; NC at 0.5 if not given, the artifact's.
        source: "hooks" sees both ends of every layer. "hidden_states" asks the model for `output_hidden_states`
            instead, where hooks cannot be used: it sees the end of each layer that touches the residual stream, and the
            other end counts 0.
        head: Dotted names of the modules that are never sliced; found for transformers models, none for plain modules.
        embeddings: Whether the rows of the input embeddings are profiled too (a row's neuron is its token).
        max_samples: Stop after so many samples; all of them if None.
        across_processes: Every process of torch.distributed's default group gives its own share of the batches, and
            all of them get the counts of all shares.
        progress: Show a bar on passes longer than two seconds.

    Returns:
        The profile. Profiles of two data sets, or of the shards of one, add up to the profile of both.

    Raises:
        ValueError: There is no sample, or an argument is out of range.
        NonFiniteError: An activation is NaN or infinite; the message names the layer.
        UnsupportedModelError: A weight has no magnitude to rank, or an activation's samples cannot be told apart.

    Source:
        ReMoS, ICSE 2022; artifact my_profile.py:38-104.
        Differs: eval mode and padding left out also for text, no dropped last batch, a constant tensor covers nothing.
    """
    if source not in ("hooks", "hidden_states"):
        raise ValueError(f"source is 'hooks' or 'hidden_states', but got {source!r}.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is the number of samples to profile, at least 1, but got {max_samples}.")
    adapter = adapter_for(teacher, head)
    layers = rankable_layers(adapter.layers(embeddings=embeddings))
    counter = _Counter(adapter, layers, threshold_coverage() if criterion is None else criterion)
    quiet = not (progress and on_main_process())
    batches = tqdm(_limited(dataloader, max_samples), desc="Profiling coverage", delay=2, disable=quiet)
    with evaluating(teacher), torch.no_grad():
        for batch in batches:
            counter.count(batch, source)
    if across_processes:
        counter.add_other_processes()
    profile = counter.profile(source)
    if not across_processes or on_main_process():
        _warn_if_degenerate(profile)
    return profile


def _warn_if_degenerate(profile: CoverageProfile) -> None:
    share = profile.share_never_covered
    if share <= _DEGENERATE_SHARE:
        return
    other = "" if profile.criterion["name"] != "ThresholdCoverage" else " Try top_k_coverage() or strong_coverage()."
    warnings.warn(
        f"{share:.0%} of the neurons were never covered by {profile.num_samples} samples under {profile.criterion}, so "
        f"most weights tie in coverage and magnitude alone decides among them.{other} Compare with TopMagnitude.",
        stacklevel=3,
    )


def on_main_process() -> bool:
    """Whether this process speaks for all of torch.distributed's default group; true if there is none."""
    group = torch.distributed
    return not (group.is_available() and group.is_initialized()) or group.get_rank() == 0


@dataclass
class _Reduced:
    """What is left of one activation: its extremes by position and its neurons' means, and whose they are."""

    low: Tensor  # (samples, positions or 1)
    high: Tensor
    mean: Tensor  # (samples, neurons); the sum over real positions where padding is left out
    padding: "_Padding | None"  # left out when the batch is through
    slots: list[tuple[str, str, int]] = field(default_factory=list)  # (layer, end, part)


class _Padding:
    """The padding of one sequence of a batch."""

    def __init__(self, real: Tensor) -> None:
        self.real = real  # (samples, positions)
        self.weights = real.float()[:, None]
        self.lengths = self.weights.sum(-1).clamp(min=1)  # (samples, 1)
        self._elsewhere: dict[torch.device, _Padding] = {}

    def on(self, device: torch.device) -> "_Padding":
        """Give the same padding on another device, for models whose layers lie on several."""
        if device == self.real.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = _Padding(self.real.to(device))
        return self._elsewhere[device]


class _Counter:
    """Counts covered neurons batch by batch."""

    def __init__(self, adapter: Adapter, layers: dict[str, Layer], criterion: Criterion) -> None:
        self.adapter, self.layers, self.criterion = adapter, layers, criterion
        self.device = next(iter(layers.values())).weight.device
        self.counts: dict[tuple[str, str], Tensor] = {}  # (layer, end) to int64 counts, on the device
        self.finite: dict[tuple[str, str], Tensor] = {}
        self.num_samples = 0
        self.fingerprint = 0
        self._batch: Any = None
        self._padding: dict[str, _Padding] = {}
        self._samples = 0
        self._reduced: list[_Reduced] = []
        self._known: dict[int, tuple[weakref.ref, int, _Reduced]] = {}
        self._tokens: dict[str, Tensor] = {}

    def count(self, batch: Any, source: str) -> None:  # noqa: ANN401 - any batch
        self._samples = _leading_size(batch)
        self.fingerprint = (self.fingerprint + _digest(batch)) % 2**256
        self._batch = send_to_device(batch, self.device)
        masks = self.adapter.position_masks(self._batch)
        self._padding = {name: _Padding(real) for name, real in masks.items()}
        try:
            if source == "hooks":
                self._run_with_hooks()
            else:
                self._read_hidden_states()
            self._close_batch()
        finally:
            self._reduced, self._known, self._tokens, self._batch, self._padding = [], {}, {}, None, {}
        first_batch = self.num_samples == 0
        self.num_samples += self._samples
        if first_batch:  # fail now rather than after hours; later ones are looked at once, at the end
            self._check_finite()

    def add_other_processes(self) -> None:
        """Add up the counts of all processes, also of those whose share was empty."""
        group = torch.distributed
        if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
            return
        sizes = {
            (name, end): size
            for name, layer in self.layers.items()
            for end, size in (("input", layer.in_neurons), ("output", layer.out_neurons))
        }
        # NCCL adds on the GPU, gloo on the host.
        device = self.device if group.get_backend() == "nccl" else torch.device("cpu")
        empty = torch.zeros((), dtype=torch.int64)
        counts = [self.counts.get(key, empty.expand(size)).to(device) for key, size in sizes.items()]
        state = torch.tensor([[key in self.counts, not self.finite.get(key, True)] for key in sizes], device=device)
        flat = torch.cat([*counts, state.long().flatten(), torch.tensor([self.num_samples], device=device)])
        group.all_reduce(flat)
        *pieces, state, num_samples = flat.split([*sizes.values(), state.numel(), 1])
        self.num_samples = int(num_samples)
        for key, piece, (seen, broken) in zip(sizes, pieces, state.view(-1, 2).tolist(), strict=True):
            if seen:
                self.counts[key], self.finite[key] = piece.clone(), torch.tensor(not broken)
        fingerprints: list[Any] = [None] * group.get_world_size()
        group.all_gather_object(fingerprints, self.fingerprint)
        self.fingerprint = sum(fingerprints) % 2**256

    def profile(self, source: str) -> CoverageProfile:
        if not self.num_samples:
            raise ValueError(
                "There is nothing to profile: the dataloader gave no sample. Pass the student's training data."
            )
        self._check_finite()
        seen = {name: layer for name, layer in self.layers.items() if self._was_seen(name)}
        unseen = [name for name in self.layers if name not in seen]
        if not seen:
            raise UnsupportedModelError(
                f"No sliceable layer ran in the forward pass; the first that did not is '{unseen[0]}'."
            )
        if unseen:
            warnings.warn(
                f"{len(unseen)} of {len(self.layers)} layers never ran in the forward pass and are left out of the "
                f"profile and of every slice made from it: {', '.join(unseen[:5])}{' ...' if len(unseen) > 5 else ''}.",
                stacklevel=3,
            )
        ends = {"input": {}, "output": {}}
        for name, layer in seen.items():
            for end, size in (("input", layer.in_neurons), ("output", layer.out_neurons)):
                counts = self.counts.get((name, end))
                ends[end][name] = torch.zeros(size, dtype=torch.int64) if counts is None else counts.cpu()
        return CoverageProfile(
            ends["input"],
            ends["output"],
            self.num_samples,
            self.criterion.to_dict(),
            source,
            weights_hash(seen),
            format(self.fingerprint, "x"),
        )

    def _was_seen(self, name: str) -> bool:
        return (name, "input") in self.counts or (name, "output") in self.counts

    def _run_with_hooks(self) -> None:
        if not self.adapter.samples_first:  # a square batch would be counted along the wrong axis without a word
            raise UnsupportedModelError(
                f"{type(self.adapter.model).__name__} runs with positions before samples, so hooks would count "
                "positions. Profile with source='hidden_states'."
            )
        owners = {alias: name for name, layer in self.layers.items() for alias in (name, *layer.aliases)}
        modules = {alias: self.adapter.model.get_submodule(alias) for alias in owners}
        with watch(modules, lambda alias, given, made: self._see(self.layers[owners[alias]], alias, given, made)):
            self.adapter.forward(self._batch)

    def _see(self, layer: Layer, called_as: str, given: Tensor, made: Tensor) -> None:
        padding = self._padding.get(self.adapter.positions_of(called_as))
        if layer.is_embedding:
            self._see_tokens(layer, given, padding)
        else:
            self._note((layer.name, "input", 0), given, layer.neuron_axis, padding)
        parts = layer.split_parts(made)
        if len(parts) == 1:
            self._note((layer.name, "output", 0), made, layer.neuron_axis, padding)
            return
        for part, piece in enumerate(parts):
            self._note((layer.name, "output", part), piece, -1, padding)

    def _read_hidden_states(self) -> None:
        states = self.adapter.forward(self._batch, hidden_states=True).hidden_states
        for index, block in enumerate(self.adapter.blocks()):
            for layer in self.layers.values():
                if not layer.name.startswith(f"{block}."):
                    continue
                padding = self._padding.get(self.adapter.positions_of(layer.name))
                writes = self.adapter.writes_to_stream(layer)
                state = states[index + 1] if writes else states[index]
                width = layer.out_neurons if writes else layer.in_neurons
                if state.shape[-1] == width:
                    self._note((layer.name, "output" if writes else "input", 0), state, -1, padding)

    def _note(self, slot: tuple[str, str, int], activation: Tensor, axis: int, padding: _Padding | None) -> None:
        # q, k and v read one tensor. It is the same one only if this very object is still alive and was not written to
        # since; an address says nothing, because freed memory is reused.
        known = self._known.get(id(activation))
        written = None if activation.is_inference() else activation._version  # inference tensors do not count writes
        if known is not None and known[0]() is activation and known[1] == written:
            known[2].slots.append(slot)
            return
        reduced = _reduce(slot[0], activation, self._samples, axis, padding)
        reduced.slots.append(slot)
        self._reduced.append(reduced)
        if written is not None:
            self._known[id(activation)] = (weakref.ref(activation), written, reduced)

    def _see_tokens(self, layer: Layer, tokens: Tensor, padding: _Padding | None) -> None:
        tokens = tokens.reshape(self._samples, -1)
        if padding is not None and padding.real.shape != tokens.shape:
            raise UnsupportedModelError(_unclear(layer.name, tokens, self._samples))
        real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else padding.real
        seen = self._tokens.setdefault(
            layer.name, torch.zeros(self._samples, layer.in_neurons, dtype=torch.bool, device=tokens.device)
        )
        samples = torch.arange(self._samples, device=tokens.device)[:, None].expand_as(tokens)
        seen[samples[real], tokens[real]] = True

    def _close_batch(self) -> None:
        groups: dict[tuple, list[_Reduced]] = defaultdict(list)
        for reduced in self._reduced:
            key = reduced.mean.shape[1], reduced.low.shape[1], reduced.mean.device, id(reduced.padding)
            groups[key].append(reduced)
        covered: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
        for group in groups.values():
            statistics = _stack(group)
            finite = (statistics.minimum.isfinite() & statistics.maximum.isfinite()) | (
                statistics.minimum > statistics.maximum  # a sample of padding alone: no position, no value
            )
            for reduced, rows, sound in zip(group, self.criterion(statistics), finite.all(dim=1), strict=True):
                for name, end, part in reduced.slots:
                    parts = covered[name, end]
                    parts[part] = parts[part] | rows if part in parts else rows  # a module called twice covers once
                    self.finite[name, end] = self.finite.get((name, end), sound) & sound
        for (name, end), parts in covered.items():
            rows = parts[0] if len(parts) == 1 else self.layers[name].join_parts(parts[part] for part in sorted(parts))
            self._add(name, end, rows)
        for name, rows in self._tokens.items():
            self._add(name, "input", rows)

    def _add(self, name: str, end: str, covered: Tensor) -> None:
        counts = covered.sum(dim=0)
        known = self.counts.get((name, end))
        self.counts[name, end] = counts if known is None else known.add_(counts)

    def _check_finite(self) -> None:
        if not self.finite or all(torch.stack([sound.cpu() for sound in self.finite.values()]).tolist()):
            return
        name, end = next(key for key, sound in self.finite.items() if not sound)
        raise NonFiniteError(
            f"The {end} of '{name}' (weight '{name}.weight') held NaN or infinity on this data, so coverage is "
            "undefined. Check the data, or run the teacher in float32: float16 overflows above 65504."
        )


def _reduce(name: str, activation: Tensor, samples: int, axis: int, padding: _Padding | None) -> _Reduced:
    values = activation.detach()
    if values.dtype != torch.float32:
        values = values.float()  # means of many half-precision values need the longer mantissa
    if axis == 1:
        if values.shape[0] != samples:
            values = _by_sample(name, values, samples).transpose(1, 2)
        rest = tuple(range(1, values.dim()))
        return _Reduced(values.amin(rest)[:, None], values.amax(rest)[:, None], values.mean(rest[1:]), None)
    if values.shape[0] != samples:
        if padding is not None and (values.dim() != 2 or len(values) != padding.real.numel()):
            raise UnsupportedModelError(_unclear(name, values, samples))
        values = _by_sample(name, values, samples)
    values = values.reshape(samples, -1, values.shape[-1])
    low, high = values.amin(-1), values.amax(-1)
    if padding is None or values.shape[1] == 1:  # one vector a sample: pooled, or a single token
        return _Reduced(low, high, values.mean(1), None)
    padding = padding.on(values.device)
    if padding.real.shape[1] != values.shape[1]:
        raise UnsupportedModelError(_unclear(name, values, samples))
    return _Reduced(low, high, torch.bmm(padding.weights, values)[:, 0], padding)


def _by_sample(name: str, values: Tensor, samples: int) -> Tensor:
    if values.shape[0] % samples:
        raise UnsupportedModelError(_unclear(name, values, samples))
    return values.unflatten(0, (samples, -1))  # windows or frames, sample by sample


def _unclear(name: str, values: Tensor, samples: int) -> str:
    return (
        f"'{name}' ran on an activation of shape {tuple(values.shape)}, in which the {samples} samples of the batch "
        "(and their padding) cannot be told apart. Profile with source='hidden_states', or name this module in head=."
    )


def _stack(group: list[_Reduced]) -> ActivationStatistics:
    low, high, mean = (torch.stack([getattr(r, part) for r in group]) for part in ("low", "high", "mean"))
    padding = group[0].padding
    if padding is not None:
        low, high = low.masked_fill(~padding.real, float("inf")), high.masked_fill(~padding.real, float("-inf"))
        mean = mean / padding.lengths
    return ActivationStatistics(low.amin(-1), high.amax(-1), mean)


def _limited(batches: Iterable, max_samples: int | None) -> Iterable:
    if max_samples is None:
        return batches
    return _first_samples(batches, max_samples)


def _first_samples(batches: Iterable, left: int) -> Iterator:
    for batch in batches:
        size = _leading_size(batch)
        yield batch if size <= left else slice_tensors(batch, slice(0, left))
        left -= size
        if left <= 0:
            return


def _input_tensors(batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 - any batch
    if isinstance(batch, Mapping):
        return {key: batch[key] for key in sorted(batch) if isinstance(batch[key], Tensor) and key not in LABEL_KEYS}
    inputs = inputs_of(batch)
    return {"inputs": inputs} if isinstance(inputs, Tensor) else {}


def _leading_size(batch: Any) -> int:  # noqa: ANN401 - any batch
    tensors = _input_tensors(batch)
    if not tensors:
        raise TypeError(
            "A batch must be a tensor, an (inputs, ...) tuple, or a mapping that holds tensors, as Trainer makes them, "
            f"but got {type(batch).__name__}."
        )
    return len(next(iter(tensors.values())))


def _digest(batch: Any) -> int:  # noqa: ANN401 - any batch
    digest = hashlib.sha256()
    for key, tensor in _input_tensors(batch).items():
        rows = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
        some = rows[:, :: max(1, rows.shape[1] // _FINGERPRINT_VALUES)].contiguous().cpu()
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(memoryview(some.view(torch.uint8).flatten().numpy()))
    return int(digest.hexdigest(), 16)
