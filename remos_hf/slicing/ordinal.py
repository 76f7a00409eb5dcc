"""Exact ordinal ranks over all weights of a model, by counting instead of sorting.

The score of a weight is its rank of coverage minus its rank of magnitude. No list of scores is made. Coverage ranks
come from a histogram of integer sums, magnitude ranks from a histogram over the ordered bits of |w|. For one coverage
sum the score falls as |w| grows, so keeping the best weights means: for every coverage sum, keep what lies below some
magnitude. Those cuts are found in four steps, each a pass in chunks that are thrown away:

1. histogram of magnitudes, fine enough that a bin holds about 1 weight in 10,000 (exact for 16-bit weights);
2. a sample of scores brackets the wanted threshold;
3. every weight outside the bracket is decided by one comparison; the few inside are written down;
4. the handful whose bins straddle the threshold get their exact ranks.

The sample only decides how many are written down: the result is exact for any bracket. Tables of shards add up to the
table of the whole. Ranks are doubled, so that the mean rank of a tie group is an integer.

With ties="artifact" equal values are ranked by traversal order instead. Then the coverage rank is not one of the sum
but of the (input, output) pair: it is made layer by layer, from the table and from what earlier layers held, and thrown
away.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from remos_hf.layers import Layer, largest_magnitude
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing.decided import Decided
from remos_hf.slicing.magnitude_table import MagnitudeTable, magnitudes_of

# Weights of a chunk. On a CPU: temporaries that stay in its cache, and that torch shares out over two threads at most,
# as its threads wait by spinning. On a GPU: enough to fill it.
_CPU_CHUNK, _GPU_CHUNK = 2**16, 2**24
_SAMPLE = 2**17
# Coverage sums that there is a table for: 0.5 GiB of them.
_MOST_SUMS = 2**26
# Up to so many distinct counts, adding shifted histograms is faster than a Fourier transform.
_FEW_VALUES = 32
_WIDENINGS = (4.0, 40.0)  # half-widths of the bracket in standard deviations of the sample quantile, then everything


@dataclass(frozen=True)
class Entry:
    """A layer in the competition, with the coverage counts along its matrix view.

    Attributes:
        layer: The layer; its weight is read once a pass.
        rows: Coverage counts of the matrix rows. Int32, shape (rows,); None if coverage plays no part.
        columns: Coverage counts of the columns, for each group. Int32, shape (groups, columns); None likewise.
    """

    layer: Layer
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.layer.numel

    def magnitudes_at(self, places: Tensor, weight: Tensor) -> Tensor:
        """Absolute values of some of the layer's weights, by places in memory order, where the places lie. Float32."""
        weight = weight.reshape(-1)
        return magnitudes_of(weight[places.to(weight.device)].to(places.device))

    def sums_at(self, places: Tensor) -> Tensor:
        """Coverage sums of some weights, by their places in memory order; 0 if coverage plays no part. Int64."""
        if self.rows is None:
            return torch.zeros_like(places)
        width = self.columns.shape[1]
        rows, columns = places // width, places % width
        groups = rows // (len(self.rows) // len(self.columns))
        return (self.rows[rows] + self.columns[groups, columns]).long()

    @property
    def kernel(self) -> int:
        """Weights of one (input, output) pair."""
        return 1 if self.layer.inputs_first else self.layer.shape[2:].numel()

    def traversal_ranks(self, earlier: Tensor) -> Tensor:
        """Weights in all earlier pairs, for each pair; equal sums go by (layer, input, output).

        Args:
            earlier: Weights of smaller sums, and of the same sum in earlier layers. Int64, shape (largest sum + 1,).

        Returns:
            Int64, shape (pairs,), pairs in the weight's memory order.
        """
        if self.layer.inputs_first:
            sums = (self.rows[:, None] + self.columns[0])[None]
        else:
            groups = len(self.columns)
            sums = self.columns[:, :: self.kernel, None] + self.rows.view(groups, 1, -1)
        ordered, order = sums.reshape(-1).long().sort(stable=True)
        places = torch.arange(len(ordered), device=ordered.device)
        ranks = torch.empty_like(ordered)
        ranks[order] = earlier[ordered] + self.kernel * (places - torch.searchsorted(ordered, ordered))
        by_input = ranks.view(sums.shape)
        return (by_input if self.layer.inputs_first else by_input.transpose(1, 2)).reshape(-1)


@dataclass(frozen=True)
class Selection:
    """Which weights were kept, and how well that meets the request.

    Attributes:
        bits: Kept weights of each entry, 1 bit each, lowest bit first, in memory order. Uint8, on the CPU.
        num_kept: Number of kept weights.
        tie_group: Number of weights that tied at the threshold and therefore went together; 1 if nothing tied.
    """

    bits: list[Tensor]
    num_kept: int
    tie_group: int = 1

    @classmethod
    def of(cls, kept: Sequence[Tensor]) -> "Selection":
        """Pack what a rule keeps: one bool tensor a layer, of the weight's shape, True = kept."""
        wrong = next((one.dtype for one in kept if one.dtype != torch.bool), None)
        if wrong is not None:
            raise TypeError(f"What is kept is told in bool tensors, True = kept, but got {wrong}.")
        return cls([pack(one) for one in kept], sum(int(torch.count_nonzero(one)) for one in kept))


def entries_of(layers: Sequence[Layer], profile: CoverageProfile | None) -> list[Entry]:
    """Pair layers with the profile's counts, laid along their matrix views, on the first weight's device.

    Raises:
        ValueError: A neuron is covered by more samples than there is a table for.
    """
    if profile is None:
        return [Entry(layer) for layer in layers]
    most = max(
        int(counts[layer.name].max()) for layer in layers for counts in (profile.input_counts, profile.output_counts)
    )
    if 2 * most >= _MOST_SUMS:  # a count that does not fit 32 bits would wrap around without a word
        raise ValueError(
            f"A neuron is covered by {most:,} samples, but ranks are made of at most {_MOST_SUMS // 2 - 1:,}: profile "
            "fewer (max_samples=)."
        )
    entries, device = [], layers[0].device  # where tables are kept, also if layers lie on several devices
    for layer in layers:
        counts = profile.input_counts[layer.name], profile.output_counts[layer.name]
        rows, columns = layer.axis_counts(*(count.to(torch.int32) for count in counts))
        entries.append(Entry(layer, rows.contiguous().to(device), columns.contiguous().to(device)))
    return entries


def select(
    entries: Sequence[Entry], num_reset: int, *, ties: Literal["mean", "artifact"] = "mean", progress: bool = False
) -> Selection:
    """Keep all but the `num_reset` weights of the lowest ordinal score.

    Args:
        entries: The layers that compete, all with coverage counts or none. Without, score = -rank of magnitude.
        num_reset: Number of weights to give up, in [0, weights].
        ties: "mean": equal coverage or magnitude share their mean rank; where the threshold falls into a group of equal
            scores, the group is kept or given up as a whole, whichever comes nearer. "artifact": equal values are
            ranked in traversal order, and a group of equal scores is given up.
        progress: Show a bar on selections longer than two seconds.

    Returns:
        The kept weights.

    Raises:
        NonFiniteError: A weight is NaN or infinite.

    Source:
        ReMoS artifact, nc_weight_rank_pruner.py:53-156.
        Differs: mean ranks for ties by default; ranks are exact beyond 2^24 (there float32).
    """
    total = sum(entry.numel for entry in entries)
    if num_reset <= 0:
        largest_magnitude({entry.layer.name: entry.layer for entry in entries})
        return Selection([pack(torch.ones(entry.numel, dtype=torch.bool)) for entry in entries], total, 1)
    search = _Search(entries, ties, progress)
    for deviations in (*_WIDENINGS, None):
        selection = search.run(num_reset, deviations)
        if selection is not None:
            return selection
    raise AssertionError("an unbounded bracket holds every threshold")


class _Search:
    """One selection: its tables, and the passes over the weights."""

    def __init__(self, entries: Sequence[Entry], ties: str, progress: bool) -> None:
        self.entries, self.ties, self.progress = entries, ties, progress
        self.total = sum(entry.numel for entry in entries)
        self.device = entries[0].layer.device
        self.sums = _sum_counts(entries, self.device)
        self.magnitudes = MagnitudeTable.sized_for([entry.layer for entry in entries])
        for entry in self._each("Ranking magnitudes"):
            for chunk in _chunks(entry, self.device):
                self.magnitudes.add(chunk.magnitudes())
            del chunk  # it holds the layer's weight, which may have been read for this pass alone
        self.magnitudes.close(ties_share=ties == "mean")

    def _ranked(self, what: str) -> Iterator["_Ranked"]:
        """Go through the layers with the doubled coverage ranks of their weights."""
        below = self.sums.cumsum(0) - self.sums
        shared = 2 * below + self.sums - 1
        for number, entry in enumerate(self._each(what)):
            if self.ties == "mean":
                yield _Ranked(number, entry, shared, by_pair=False)
                continue
            yield _Ranked(number, entry, 2 * entry.traversal_ranks(below), by_pair=True)
            here = torch.from_numpy(_sum_histogram(entry)).to(self.device)
            below[: len(here)] += here

    def run(self, num_reset: int, deviations: float | None) -> Selection | None:
        low, high = self._bracket(num_reset, deviations)
        decided = self._decide(low, high)
        below = self.total - decided.num_kept - decided.num_open
        place = num_reset - 1 - below  # of the threshold, among the open ones
        if not 0 <= place < decided.num_open:
            return None
        selection, threshold = self._settle(decided, place)
        # Open are also weights outside the bracket whose bins reach into it. A threshold there is none: among the
        # decided weights may be some between it and the bracket.
        inside = (low is None or low <= threshold) and (high is None or threshold <= high)
        return selection if inside else None

    def _each(self, what: str) -> Iterator[Entry]:
        return tqdm(self.entries, desc=what, delay=2, disable=not self.progress, leave=False)

    def _bracket(self, num_reset: int, deviations: float | None) -> tuple[int | None, int | None]:
        """Guess from a sample two scores between which the num_reset-th lowest lies. None stands for infinity."""
        if deviations is None or self.total <= 2 * _SAMPLE:
            return None, None
        scores = torch.cat([self._sampled_scores(ranked) for ranked in self._ranked("Sampling")]).sort().values
        share = num_reset / self.total
        middle = share * len(scores)
        reach = deviations * (len(scores) * share * (1 - share)) ** 0.5 + deviations
        first, last = int(middle - reach), int(middle + reach) + 1
        # The sample's scores take each weight for the first of its bin; widening by the largest bin covers the others.
        slack = 2 * int(self.magnitudes.counts.max())
        low = int(scores[first]) - slack if first >= 0 else None
        high = int(scores[last]) + slack if last < len(scores) else None
        return low, high

    def _sampled_scores(self, ranked: "_Ranked") -> Tensor:
        step = max(1, self.total // _SAMPLE) | 1
        places = torch.arange(0, ranked.entry.numel, step, device=self.device)
        bins = self.magnitudes.bin_of(ranked.entry.magnitudes_at(places, ranked.entry.layer.weight))
        return ranked.coverage_at(places) - self.magnitudes.lowest.index_select(0, bins)

    def _decide(self, low: int | None, high: int | None) -> Decided:
        """Decide every weight whose score is certainly outside [low, high]; write down the others."""
        decided = Decided([entry.numel for entry in self.entries], 2**16 + self.total // 100, self.device)
        buffers = torch.empty(2, max(entry.numel for entry in self.entries), dtype=torch.bool, device=self.device)
        cuts = None
        for ranked in self._ranked("Choosing weights"):
            entry = ranked.entry
            keep, still_open = buffers[:, : entry.numel]
            if cuts is None or ranked.by_pair:
                cuts = self.magnitudes.cuts(ranked.coverage, low, high)
            weight = entry.layer.weight
            for chunk in _chunks(entry, self.device, weight):
                magnitudes, index = chunk.magnitudes(), ranked.index_of(chunk)
                for below, bits in zip(cuts, (keep, still_open), strict=True):
                    cut = below[0] if index is None else below.index_select(0, index)
                    _less(magnitudes, cut, bits[chunk.start : chunk.stop])
            places = _places(still_open.logical_xor_(keep))
            decided.note(ranked.number, places, ranked.coverage_at(places), entry.magnitudes_at(places, weight))
            del weight, chunk
            decided.bits[ranked.number].copy_(pack(keep))
            decided.num_kept += _count(keep)
        return decided

    def _settle(self, decided: Decided, place: int) -> tuple[Selection, int]:
        """Find the exact threshold among the open weights, and decide them by it."""
        coverage, magnitudes = decided.coverage, decided.magnitudes
        bins = self.magnitudes.bin_of(magnitudes)
        lowest, highest = coverage - self.magnitudes.highest[bins], coverage - self.magnitudes.lowest[bins]
        at_least, at_most = (int(ends.kthvalue(place + 1).values) for ends in (lowest, highest))
        straddles = (highest >= at_least) & (lowest <= at_most)
        scores = highest[straddles]
        if bool((lowest[straddles] != scores).any()):
            scores = coverage[straddles] - self._exact_ranks(decided, straddles)
        surely_below = int((highest < at_least).sum())
        threshold = int(scores.kthvalue(place - surely_below + 1).values)
        less, equal = int((scores < threshold).sum()), int((scores == threshold).sum())
        wanted = place - surely_below + 1 - less  # of the tie group, this many should go
        ties_stay = self.ties == "mean" and wanted < equal - wanted
        keep = lowest > at_most
        keep[straddles] = scores >= threshold if ties_stay else scores > threshold
        decided.keep(keep)
        return Selection(decided.bits, decided.num_kept + int(keep.sum()), equal), threshold

    def _exact_ranks(self, decided: Decided, straddles: Tensor) -> Tensor:
        """Find the doubled magnitude ranks of some open weights, by counting all weights that share their bins."""
        table = self.magnitudes
        values, inverse = torch.unique(decided.magnitudes[straddles], return_inverse=True)
        owners, own_places = decided.owners[straddles], decided.places[straddles]
        touched = torch.zeros(len(table.counts), dtype=torch.bool, device=self.device)
        touched[table.bin_of(values)] = True
        less = torch.zeros(len(values) + 1, dtype=torch.int64, device=self.device)
        equal, before = torch.zeros_like(less), torch.zeros_like(inverse)
        buffer = torch.empty(max(entry.numel for entry in self.entries), dtype=torch.bool, device=self.device)
        for number, entry in enumerate(self._each("Settling ties")):
            shares, weight = buffer[: entry.numel], entry.layer.weight
            for chunk in _chunks(entry, self.device, weight):
                bins = table.bin_of(chunk.magnitudes())
                torch.index_select(touched, 0, bins, out=shares[chunk.start : chunk.stop])
            places = _places(shares)
            magnitudes = entry.magnitudes_at(places, weight)
            del weight, chunk
            found = torch.searchsorted(values, magnitudes)
            same = values[found.clamp(max=len(values) - 1)] == magnitudes
            if self.ties == "artifact":  # equal magnitudes of earlier layers, and of this one at earlier places
                own = owners == number
                in_order = (found[same] * entry.numel + places[same]).sort().values
                first = inverse[own] * entry.numel
                here = [torch.searchsorted(in_order, key) for key in (first + own_places[own], first)]
                before[own] = equal[inverse[own]] + here[0] - here[1]
            less += torch.bincount(found[~same], minlength=len(less))
            equal += torch.bincount(found[same], minlength=len(less))
        less, equal = less[:-1], equal[:-1]
        counted = less.cumsum(0) + equal.cumsum(0) - equal  # weights in touched bins that are smaller
        bins = table.bin_of(values)
        counts = table.counts * touched
        in_lower_bins = counts.cumsum(0) - counts
        below = table.below[bins] + counted - in_lower_bins[bins]
        return (2 * below + equal - 1)[inverse] if self.ties == "mean" else 2 * (below[inverse] + before)


@dataclass(frozen=True)
class _Ranked:
    """A layer with its weights' doubled coverage ranks, by coverage sum or by (input, output) pair."""

    number: int
    entry: Entry
    coverage: Tensor
    by_pair: bool

    def coverage_at(self, places: Tensor) -> Tensor:
        """Doubled coverage rank of some weights, by their places in memory order. Int64."""
        return self.coverage[places // self.entry.kernel if self.by_pair else self.entry.sums_at(places)]

    def index_of(self, chunk: "_Chunk") -> Tensor | None:
        """Where the coverage rank of each weight of a chunk stands; None if all stand at 0."""
        if self.by_pair:
            return torch.arange(chunk.start, chunk.stop, device=chunk.device) // self.entry.kernel
        return chunk.sums()


@dataclass
class _Chunk:
    """Some whole rows of a layer's matrix view, flattened."""

    matrix: Tensor
    entry: Entry
    first_row: int
    last_row: int
    device: torch.device

    @property
    def start(self) -> int:
        return self.first_row * self.matrix.shape[1]

    @property
    def stop(self) -> int:
        return self.last_row * self.matrix.shape[1]

    def magnitudes(self) -> Tensor:
        """Absolute values as float32, in memory of their own. Shape (weights,)."""
        return magnitudes_of(self.matrix[self.first_row : self.last_row].reshape(-1).to(self.device))

    def sums(self) -> Tensor | None:
        """Coverage sum of each weight. Int32, shape (weights,)."""
        if self.entry.rows is None:
            return None
        rows, columns = self.entry.rows[self.first_row : self.last_row, None], self.entry.columns
        if len(columns) > 1:
            per_group = self.matrix.shape[0] // len(columns)
            columns = columns[torch.arange(self.first_row, self.last_row, device=rows.device) // per_group]
        return (rows + columns).reshape(-1)


def _less(values: Tensor, bounds: Tensor, out: Tensor) -> None:
    if values.device.type != "cpu":
        torch.lt(values, bounds, out=out)
    else:  # NumPy compares four times as fast
        np.less(values.numpy(), bounds.numpy(), out=out.numpy())


def _count(bits: Tensor) -> int:
    return int(torch.count_nonzero(bits)) if bits.device.type != "cpu" else int(np.count_nonzero(bits.numpy()))


def _places(bits: Tensor) -> Tensor:
    """Places of the few true entries among many, ascending. Int64."""
    if bits.device.type != "cpu":
        return torch.nonzero(bits).flatten()
    # Eight at a time: most bytes of packed bits are empty.
    packed = np.packbits(bits.numpy(), bitorder="little")
    occupied = np.flatnonzero(packed)
    bit = np.unpackbits(packed[occupied, None], axis=1, bitorder="little")
    byte, offset = np.nonzero(bit)
    return torch.from_numpy(occupied[byte] * 8 + offset)


def _chunks(entry: Entry, device: torch.device, weight: Tensor | None = None) -> Iterator[_Chunk]:
    matrix = entry.layer.as_matrix(entry.layer.weight if weight is None else weight)
    size = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    step = max(1, size // matrix.shape[1])
    for first in range(0, matrix.shape[0], step):
        yield _Chunk(matrix, entry, first, min(first + step, matrix.shape[0]), device)


def pack(bits: Tensor) -> Tensor:
    """Pack bools, lowest bit first, the last byte filled up with 0. Any shape to uint8 on the CPU, memory order."""
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), axis=None, bitorder="little"))


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """Undo `pack`. Uint8 to bool of the shape given."""
    count = torch.Size(shape).numel()
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little").view(np.bool_)).view(shape)


def _sum_counts(entries: Sequence[Entry], device: torch.device) -> Tensor:
    """Weights of every coverage sum, over all layers. Int64, shape (largest sum + 1,)."""
    if entries[0].rows is None:
        return torch.tensor([sum(entry.numel for entry in entries)], device=device)
    largest = max(int(entry.rows.max()) + int(entry.columns.max()) for entry in entries)
    counts = np.zeros(largest + 1, dtype=np.int64)
    for entry in entries:
        histogram = _sum_histogram(entry)
        counts[: len(histogram)] += histogram
    return torch.from_numpy(counts).to(device)


def _sum_histogram(entry: Entry) -> np.ndarray:
    """Histogram of rows[r] + columns[c] over all weights of a layer, without building the matrix of sums."""
    rows = entry.rows.cpu().numpy().reshape(len(entry.columns), -1)
    columns = entry.columns.cpu().numpy()
    if len(columns) > 1:  # grouped convolutions are small: add them up as they are
        sums = rows[:, :, None] + columns[:, None, :]
        return np.bincount(sums.reshape(-1))
    rows, columns = np.bincount(rows[0]), np.bincount(columns[0])
    values = np.flatnonzero(rows if np.count_nonzero(rows) < np.count_nonzero(columns) else columns)
    if len(values) <= _FEW_VALUES:
        return _shifted_sums(*(rows, columns) if len(values) == np.count_nonzero(rows) else (columns, rows))
    # Exact: the largest entry is at most rows * columns, and the error of the transform about 1e-15 of that.
    length = 1 << (len(rows) + len(columns) - 2).bit_length()
    product = np.fft.irfft(np.fft.rfft(rows, length) * np.fft.rfft(columns, length), length)
    return np.rint(product[: len(rows) + len(columns) - 1]).astype(np.int64)


def _shifted_sums(few: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Histogram of sums from two histograms, the first of which has few occupied bins."""
    histogram = np.zeros(len(few) + len(many) - 1, dtype=np.int64)
    for value in np.flatnonzero(few):
        histogram[value : value + len(many)] += few[value] * many
    return histogram
