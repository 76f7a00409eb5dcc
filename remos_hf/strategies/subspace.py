"""Keep the directions of every layer's inputs that the student's data uses, and fit the teacher's outputs in them."""

import copy
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat, zip_longest
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from remos_hf.activations import evaluating
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError, RemosError, UnsupportedModelError
from remos_hf.fields import check_number, check_whole
from remos_hf.layers import Layer, rankable_layers
from remos_hf.profiling.batches import count_samples
from remos_hf.profiling.distinct_inputs import DistinctInput, InputsFound
from remos_hf.profiling.part_runs import PartRuns
from remos_hf.profiling.processes import in_processes, on_main_process, told_by_all
from remos_hf.profiling.second_moments import DEFAULT_MAX_BYTES, patches_under
from remos_hf.profiling.taps import Read, Taps
from remos_hf.profiling.unpadded import without_padding
from remos_hf.slicing.competition import competing_layers
from remos_hf.slicing.subspace import Directions, Fit, InputSums, share_that_keeps
from remos_hf.strategies.base import Preparation, Strategy, check_names
from remos_hf.strategies.norm_statistics import fit_norm_statistics
from remos_hf.strategies.student_data import StudentData

logger = logging.getLogger(__name__)

# Bytes of the teacher's outputs that are kept at once. Where a block makes more, the teacher runs it again.
_KEPT_BYTES = 2**30
# Matrices of a layer's width that are there at once: sums, covariance, eigenvectors, and what finding them takes.
_MATRICES = 5
# The ridge of layers that write to the residual stream, over that of those which read it (ridge_by="kind").
_OF_WRITERS = 10.0
# Images whose patches are laid out at once.
_IMAGES = 16


@dataclass(frozen=True)
class Subspace(Strategy):
    """Keep the directions of each layer's inputs that the student's data uses; forget what the teacher does elsewhere.

    Layer by layer in forward order: the covariance of the layer's inputs in the student as it is rebuilt so far, its
    strongest eigenvectors, and the least-squares fit, inside them, of what the teacher's layer makes of the same
    samples. Biases take what the means leave; without a bias the mean input is one more direction, that is always
    kept. Batch norms get new statistics. Layers that read one tensor are fitted together, those of one input that
    groups or experts share out each by itself. An expert is fitted to what its own weights make of the student's
    inputs: the teacher may route a token to another one. Embeddings and the head stay. A seed is not needed: nothing
    is drawn.

    Every process reads all samples, so that N processes give the bits of one.

    Attributes:
        energy: Share of the inputs' variance that is kept, in (0, 1]. 1 keeps all that the samples show. "auto" where
            a trainer searches it by effect (`EffectSearch`).
        scope: "layer": every layer keeps this share, of each convolution group. "model": every layer keeps the
            directions that hold at least one share of its own trace, chosen so that the layers hold `energy` on
            average in the teacher; each distinct input counts alike. It reads the data twice.
        ridge: Instead of the cut, the weight of a ridge: W = Cov(t, x) (Cov(x, x) + ridge P)^-1. None: the cut.
        ridge_by: "channel": P holds the variance of each channel, so that the few large channels of a layer norm
            cost no less. "median": the median variance everywhere. "kind": by channel where a layer reads the residual
            stream, ten times as much by the median where it writes to it, as was measured best on texts.
        head: Modules that stay; None finds them.
        max_samples: Samples to read, drawn by the run's seed, or "all"; the run's number if None. About 400 were enough
            where it was measured, and what it costs grows with them.

    Source:
        Ours. Singular directions of activations are cut for size in ASVD (Yuan et al. 2023) and SliceGPT (Ashkboos
        et al. 2024).
        Differs: the student keeps its shape and trains on; what is cut is what a defect hides in.
    """

    energy: float | Literal["auto"] = 0.95
    scope: Literal["layer", "model"] = "layer"
    ridge: float | None = None
    ridge_by: Literal["channel", "median", "kind"] = "channel"
    head: tuple[str, ...] | None = None
    max_samples: int | Literal["all"] | None = 512

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        if self.energy != "auto":
            told = "the share of a layer's inputs that is kept, above 0 and at most 1"
            check_number(self, told, lambda one: 0 < one <= 1, "energy")
        if self.scope not in ("layer", "model"):
            raise ValueError(f"scope is 'layer' or 'model', but got {self.scope!r}.")
        if self.ridge is not None:
            told = "a number above 0, or None for a cut by energy"
            check_number(self, told, lambda one: 0 < one < float("inf"), "ridge")
        if self.ridge is not None and self.scope == "model":
            raise ValueError("A ridge cuts nothing, so it has no scope: leave scope='layer', or ridge=None.")
        if self.ridge_by not in ("channel", "median", "kind"):
            raise ValueError(f"ridge_by is 'channel', 'median' or 'kind', but got {self.ridge_by!r}.")
        if self.max_samples not in (None, "all"):
            check_whole(self, "a number of at least 1, 'all' or None", 1, "max_samples")
        check_names(self, "head")

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Rebuild the student in place. It is left as it was if anything fails.

        Raises:
            NonFiniteError: A weight, or what a layer reads or makes on this data, holds NaN or infinity.
            UnsupportedModelError: Nothing competes, or a covariance takes too much memory.
            ValueError: There is no sample.
        """
        if self.energy == "auto":
            raise ValueError("energy='auto' is searched by RemosTrainer and attach_remos. Name a number here.")
        started = time.perf_counter()
        adapter = adapter_for(student, self.head)
        layers = rankable_layers(adapter.layers())
        _check_finite(layers)
        if self.ridge_by == "kind" and self.ridge is not None:
            adapter.writes_to_stream(next(iter(layers.values())))  # refuses a model whose stream is not known
        samples = data.max_samples if self.max_samples is None else self.max_samples
        given = _batches_of_all(data, None if samples == "all" else samples)
        given = send_to_device(given, next(iter(layers.values())).device)
        batches = without_padding(adapter, given)
        if not batches:
            raise ValueError("There is nothing to look at: the data gave no sample. Pass the student's training data.")
        with evaluating(student), torch.no_grad():
            inputs = InputsFound(PartRuns(adapter, batches), layers)
            layers, account = competing_layers(student, head=adapter.head, ran=inputs.names)
            account.tell()
            teacher = adapter_for(copy.deepcopy(student), adapter.head)
            found = time.perf_counter()
            try:
                rebuild = _Rebuild(self, inputs.of(layers), PartRuns(adapter, batches), PartRuns(teacher, batches))
                kept = rebuild.run()
                built = time.perf_counter()
                if self.energy < 1 or self.ridge is not None:  # otherwise nothing was given up
                    fit_norm_statistics(PartRuns(adapter, batches))
            except BaseException:
                student.load_state_dict(teacher.model.state_dict())
                raise
        seconds = {"inputs": found - started, "subspace": built - found, "norms": time.perf_counter() - built}
        energies = [one["energy"] for one in kept.values() if one["energy"] is not None]
        told = {
            "samples": sum(map(count_samples, given)),
            "energy": sum(energies) / len(energies) if energies else None,
            "layers": kept,
            "unread": rebuild.unread,
            "rounding": rebuild.rounding,
            "left_out": account.to_dict(),
        }
        _tell(told)
        return Preparation(seconds=seconds, details={"subspace": told})


class _Rebuild:
    """Rebuilds a student, input by input.

    Attributes:
        unread: Layers that nothing reached in the rebuilt student, so that they stay the teacher's.
        rounding: Largest relative error that a weight or bias of half precision added; 0 in float32.
    """

    def __init__(self, strategy: Subspace, inputs: list[DistinctInput], student: PartRuns, teacher: PartRuns) -> None:
        self.strategy, self.inputs, self.student, self.teacher = strategy, inputs, student, teacher
        self.unread: list[str] = []
        self.rounding = 0.0
        self._originals = teacher.adapter.layers()
        self._samples = sum(map(count_samples, student.batches))
        self._targets: dict[str, list[list[Tensor]]] = {}
        most = max(inputs, key=lambda one: one.layers[0].groups * one.columns**2)
        size = 8 * _MATRICES * most.layers[0].groups * most.columns**2
        if size > DEFAULT_MAX_BYTES:
            raise UnsupportedModelError(
                f"The covariance of what '{most.layers[0].name}' reads and its eigenvectors take "
                f"{size / 2**30:.1f} GiB at {most.columns:,} columns, more than {DEFAULT_MAX_BYTES / 2**30:.0f} GiB. "
                "Take a strategy that slices weights, or name the module in head= to leave it alone."
            )
        logger.info(
            "%d distinct inputs of %d layers are looked at one at a time; the largest takes up to %.2f GiB.",
            len(inputs),
            sum(len(one.layers) for one in inputs),
            size / 2**30,
        )

    def run(self) -> dict[str, dict[str, Any]]:
        """Rebuild all layers in place; give what was fitted, by layer name, in forward order."""
        smallest = self._smallest_share() if self.strategy.scope == "model" else None
        told: dict[str, dict[str, Any]] = {}
        for place, one in enumerate(tqdm(self.inputs, desc="Rebuilding", delay=2, disable=not on_main_process())):
            for runs in (self.student, self.teacher):
                while runs.through < one.block:
                    runs.pass_block()
            if one.layers[0].name not in self._targets:
                self._targets = self._targets_from(place)
            try:
                sums = self._sums(self.student, one)
            except _Routed:
                sums = self._sums(self.student, one, own=True)
            if sums.count:
                told |= self._fitted(one, sums, smallest)
            else:
                self.unread += [layer.name for layer in one.layers]
        return told

    def _smallest_share(self) -> float:
        """Find the threshold on the inputs of the teacher, before anything is rebuilt."""
        runs, shares = PartRuns(self.teacher.adapter, self.teacher.batches), []
        for one in tqdm(self.inputs, desc="Reading", delay=2, disable=not on_main_process()):
            while runs.through < one.block:
                runs.pass_block()
            sums = self._sums(runs, one)
            shares += [sums.directions(biased=False).shares] if sums.count else []
        return share_that_keeps(shares, self.strategy.energy)

    def _targets_from(self, place: int) -> dict[str, list[list[Tensor]]]:
        """Give what the teacher makes, by layer, batch and call, of this input and as many more as may be kept."""
        some, size = [self.inputs[place]], self.inputs[place].outputs * self._samples
        for one in self.inputs[place + 1 :]:
            size += one.outputs * self._samples
            if one.block != some[0].block or size > _KEPT_BYTES:
                break
            some.append(one)
        layers = {layer.name: self._originals[layer.name] for one in some for layer in one.layers}
        ends: dict[str, int] | None = {}
        for one in some:
            ends = None if ends is None or one.ends is None else ends | one.ends
        made: dict[str, list[list[Tensor]]] = {name: [] for name in layers}
        taps = self.teacher.taps(layers)
        for number in range(len(self.teacher.batches)):
            for of_batches in made.values():
                of_batches.append([])

            def look(read: Read) -> None:
                if not _is_own(read.layer):
                    made[read.layer.name][-1] += _targets_in(read)

            self.teacher.read(number, taps, look, ends)
        return made

    def _sums(self, runs: PartRuns, one: DistinctInput, *, own: bool = False) -> InputSums:
        """Add up an input over all batches, with what the teacher's layers make at the same places.

        Args:
            runs: Of the student, or of the teacher, which needs nothing to be fitted to.
            one: The input.
            own: Whether layers are fitted to what their own weights make of this input instead.
        """
        layers = [self._originals[layer.name] for layer in one.layers]
        first = one.layers[0] if runs is self.student else layers[0]
        ends = None if one.ends is None else {first.name: one.ends[first.name]}
        sums, taps, alone = InputSums(), runs.taps({first.name: first}), own or runs is not self.student
        for number in range(len(runs.batches)):
            for call, values in enumerate(_inputs_of(runs, number, taps, ends)):
                if call in one.tables or not values.numel():
                    continue
                alone = own or runs is not self.student
                made = [
                    None if alone or _is_own(layer) else self._target_of(layer, number, call, values)
                    for layer in layers
                ]
                _add(sums, layers, values, made)
        return sums

    def _target_of(self, layer: Layer, number: int, call: int, values: Tensor) -> Tensor:
        kept = self._targets[layer.name][number]
        same = len(kept) > call and (_is_convolution(layer) or kept[call].shape[:-1] == values.shape[:-1])
        if not same:
            raise _Routed
        return kept[call]

    def _fitted(self, one: DistinctInput, sums: InputSums, smallest: float | None) -> dict[str, dict[str, Any]]:
        """Fit the layers of one input and write their weights; give what the record says of them."""
        names = " and ".join(f"'{layer.name}'" for layer in one.layers)
        if not sums.is_finite:
            raise NonFiniteError(
                f"What {names} read or make on this data holds NaN or infinity, so it has no covariance. Check the "
                "data, or run the teacher in float32."
            )
        told = {}
        sizes = [layer.out_neurons // layer.groups for layer in one.layers]
        for biased in _kinds(one):
            fit = self._fit(sums.directions(biased=biased, ridge=self.strategy.ridge is not None), one, smallest)
            says = {"rank": fit.rank, "of": fit.of, "energy": fit.energy, "empty": fit.empty}
            says |= {"rows": fit.rows_seen, "columns": one.columns}
            parts = fit.rows.split(sizes, 1), fit.offset.split(sizes, 1)
            for layer, rows, offset in zip(one.layers, *parts, strict=True):
                if biased != _is_biased(layer):
                    continue
                self._write(layer.weight, layer.from_output(rows))
                if biased:
                    self._write(layer.bias, offset.flatten())
                told[layer.name] = says
        return told

    def _write(self, values: Tensor, new: Tensor) -> None:
        values.copy_(new)
        if values.dtype != torch.float32:
            error = (values.double() - new).norm() / new.norm().clamp(min=torch.finfo(torch.float64).tiny)
            self.rounding = max(self.rounding, float(error))

    def _fit(self, directions: Directions, one: DistinctInput, smallest: float | None) -> Fit:
        ridge, by = self.strategy.ridge, self.strategy.ridge_by
        if ridge is None:
            return directions.fit(energy=self.strategy.energy, smallest_share=smallest)
        writes = by == "kind" and self.student.adapter.writes_to_stream(one.layers[0])
        by_channel = by == "channel" or (by == "kind" and not writes)
        return directions.ridge_fit(_OF_WRITERS * ridge if writes else ridge, by_channel=by_channel)


class _Routed(Exception):  # noqa: N818 - caught within the module
    """The teacher ran a layer on other positions than the student."""


def _is_own(layer: Layer) -> bool:
    """Whether a layer is fitted to its own outputs.

    The teacher may route a token to another expert, and of several modules that share a weight each has its own bias.
    """
    return layer.index is not None or bool(layer.aliases)


def _is_biased(layer: Layer) -> bool:
    return layer.bias is not None and not layer.aliases


def _kinds(one: DistinctInput) -> list[bool]:
    """Whether layers have a bias, or have none; both if both read this input."""
    return sorted({_is_biased(layer) for layer in one.layers})


def _inputs_of(runs: PartRuns, number: int, taps: Taps, ends: Mapping[str, int] | None) -> list[Tensor]:
    given: list[Tensor] = []

    def look(read: Read) -> None:
        if read.end == "input":
            given.append(read.values.clone())  # what runs next may write into it

    runs.read(number, taps, look, ends)
    return given


def _targets_in(read: Read) -> list[Tensor]:
    """Give what a layer makes, if this read says it.

    What a module makes may hold a bias that is not its own, and packed weights make it in parts. Then it is computed.
    """
    layer = read.layer
    if _is_convolution(layer) or (layer.bias is not None and not isinstance(layer.module, nn.MultiheadAttention)):
        return [read.values.clone()] if read.end == "output" else []
    if read.end == "output":
        return []
    return [nn.functional.linear(read.values, layer.by_output(layer.weight)[0], layer.bias)]


def _is_convolution(layer: Layer) -> bool:
    return layer.neuron_axis == 1


def _add(sums: InputSums, layers: Sequence[Layer], values: Tensor, made: Sequence[Tensor | None]) -> None:
    """Add what layers read, and what they should make of it; None is what their own weights make."""
    first = layers[0]
    if not _is_convolution(first):
        rows = values.flatten(0, -2)[None]
        outputs = [one if one is None else one.flatten(0, -2)[None] for one in made]
        sums.add(rows, torch.cat(list(map(_outputs_of, layers, outputs, repeat(rows))), -1))
        return
    for start in range(0, len(values), _IMAGES):
        some = slice(start, start + _IMAGES)
        rows = patches_under(first, values[some].float()).transpose(0, 1).flatten(1, 2)
        outputs = [one if one is None else _by_group(first, one[some]) for one in made]
        sums.add(rows, torch.cat(list(map(_outputs_of, layers, outputs, repeat(rows))), -1))


def _by_group(layer: Layer, images: Tensor) -> Tensor:
    """Lay what a convolution makes beside its patches. Shape (groups, images * places, outputs of a group)."""
    return images.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _outputs_of(layer: Layer, made: Tensor | None, rows: Tensor) -> Tensor:
    if made is not None:
        return made
    made = rows.double() @ layer.by_output(layer.weight.double()).mT
    return made + layer.bias.double().view(layer.groups, 1, -1) if _is_biased(layer) else made


def _check_finite(layers: Mapping[str, Layer]) -> None:
    for layer in layers.values():
        if not bool(layer.weight.isfinite().all()):
            raise NonFiniteError(
                f"'{layer.key}' holds NaN or infinity, so the teacher's outputs say nothing. Its checkpoint is broken "
                "or overflowed in its dtype; load a sound one."
            )


def _batches_of_all(data: StudentData, samples: int | None) -> list[Any]:
    """Give the batches of all processes, in the order in which one process has them."""
    mine, failure = [], None
    try:  # whoever fails says so before the others wait for its batches
        mine = list(data.batches(samples))
    except Exception as error:
        failure = error
    told = told_by_all((mine, failure and str(failure))) if in_processes() else [(mine, None)]
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(told):
        if failed:
            raise RemosError(f"Process {rank} failed while it read its share of the data: {failed}")
    in_turn = zip_longest(*(batches for batches, _ in told))
    return [batch for turn in in_turn for batch in turn if batch is not None]


def _tell(told: Mapping[str, Any]) -> None:
    """Log what was kept; warn where the samples do not show all directions."""
    layers = told["layers"]
    logger.info(
        "Rebuilt %d layers on %s samples: %s of %s directions are kept%s.",
        len(layers),
        f"{told['samples']:,}",
        f"{sum(one['rank'] for one in layers.values()):,.0f}",
        f"{sum(one['of'] for one in layers.values()):,}",
        "" if told["energy"] is None else f", which hold {told['energy']:.1%} of the inputs' variance",
    )
    few = {name: one for name, one in layers.items() if one["rows"] < one["columns"]}
    if few:
        name, one = next(iter(few.items()))
        warnings.warn(
            f"{len(few)} of {len(layers)} layers saw fewer positions than their inputs have directions ('{name}': "
            f"{one['rows']:,} of {one['columns']:,}), so directions that more samples would show are given up too. "
            "Take more samples (max_samples), or a ridge.",
            stacklevel=3,
        )
