"""Counts covered neurons: the observer behind a coverage profile."""

import warnings
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.layers import Layer, weights_hash
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.criteria import ActivationStatistics, Criterion, MedianCoverage
from remos_hf.profiling.observers import Activation, Observer, Slot

# Above this share of weights with no covered neuron at either end, coverage says too little. NC leaves 47 % of
# all-MiniLM-L6-v2's so, the median of none of five teachers 1 % (benchmarks/results/criteria.md).
_DEGENERATE_SHARE = 1 / 3


class CoverageCounts(Observer):
    """For every neuron, the samples that cover it.

    Three reductions are made of each activation while it is there: extremes by position and the mean of each neuron.

    Args:
        criterion: When a neuron counts as covered.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.layers: Mapping[str, Layer] = {}
        # (layer, end) to int64 counts and, as the last number, how many batches held NaN or infinity.
        self._counts: dict[tuple[str, str], Tensor] = {}
        self._batches = 0
        self.drop_batch()

    def start(self, layers: Mapping[str, Layer]) -> None:
        """Get to know the layers."""
        self.layers = layers

    def see(self, slot: Slot, activation: Activation) -> None:
        """Reduce an activation, once."""
        slots = self._seen.get(id(activation))
        if slots is None:
            _, _ = activation.extremes, activation.mean
            slots = self._seen[id(activation)] = (activation, [])
        slots[1].append(slot)

    def see_tokens(self, slot: Slot, tokens: Tensor, real: Tensor) -> None:
        """Cover the tokens that stand at real positions."""
        seen = self._tokens.get(slot.name)
        if seen is None:
            size = self.layers[slot.name].in_neurons
            seen = torch.zeros(len(tokens), size, dtype=torch.bool, device=tokens.device)
            self._tokens[slot.name] = seen
        samples = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        seen[samples[real], tokens[real]] = True

    def drop_batch(self) -> None:
        """Forget the batch."""
        self._seen: dict[int, tuple[Activation, list[Slot]]] = {}
        self._tokens: dict[str, Tensor] = {}

    def close_batch(self) -> None:
        """Decide who is covered, for all activations of equal width at once, and count."""
        groups: dict[tuple, list[tuple[Activation, list[Slot]]]] = defaultdict(list)
        for one in self._seen.values():
            activation = one[0]
            low, mean = activation.extremes[0], activation.mean
            groups[mean.shape[1], low.shape[1], mean.device, id(activation.padding)].append(one)
        covered: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
        broken: dict[tuple[str, str], Tensor] = {}
        for group in groups.values():
            statistics = _stack([activation for activation, _ in group])
            finite = (statistics.minimum.isfinite() & statistics.maximum.isfinite()) | (
                statistics.minimum > statistics.maximum  # a sample of padding alone: no position, no value
            )
            for (_, slots), rows, sound in zip(group, self.criterion(statistics), finite.all(dim=1), strict=True):
                for name, end, part in slots:
                    parts = covered[name, end]
                    parts[part] = parts[part] | rows if part in parts else rows  # a module called twice covers once
                    broken[name, end] = broken[name, end] | ~sound if (name, end) in broken else ~sound
        for key, parts in covered.items():
            in_order = [parts[part] for part in sorted(parts)]
            rows = in_order[0] if len(parts) == 1 else self.layers[key[0]].join_parts(in_order)
            self._add(key, rows, broken[key])
        for name, rows in self._tokens.items():
            self._add((name, "input"), rows, torch.zeros((), dtype=torch.bool, device=rows.device))
        self.drop_batch()
        self._batches += 1
        if self._batches == 1:  # fail now rather than after hours; later ones are looked at once, at the end
            self.check_finite()

    def _add(self, key: tuple[str, str], covered: Tensor, broken: Tensor) -> None:
        counts = torch.cat([covered.sum(dim=0), broken.long()[None]])
        known = self._counts.get(key)
        self._counts[key] = counts if known is None else known.add_(counts)

    def state(self) -> dict[str, Tensor]:
        """Give the counts by end and layer."""
        return {f"{end}:{name}": counts for (name, end), counts in self._counts.items()}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the counts of all processes."""
        self._counts = {tuple(key.split(":", 1)[::-1]): counts for key, counts in state.items()}

    def check_finite(self) -> None:
        """Name the first layer that held a value which is not finite.

        Raises:
            NonFiniteError: There is one.
        """
        broken = {key: counts[-1] for key, counts in self._counts.items()}
        if not broken or not any(torch.stack([one.cpu() for one in broken.values()]).tolist()):
            return
        name, end = next(key for key, one in broken.items() if one)
        raise NonFiniteError(
            f"The {end} of '{name}' (weight '{self.layers[name].key}') held NaN or infinity on this data, so coverage "
            "is undefined. Check the data, or run the teacher in float32: float16 overflows above 65504."
        )

    def profile(self, source: str, num_samples: int, capped: bool, fingerprint: int) -> CoverageProfile:
        """Make the profile of what was counted.

        Raises:
            NonFiniteError: An activation was not finite.
            UnsupportedModelError: No layer ran on samples.
        """
        self.check_finite()
        counted = {name for name, _ in self._counts}
        seen = {name: layer for name, layer in self.layers.items() if name in counted}
        unseen = [name for name in self.layers if name not in counted]
        if not seen:
            raise UnsupportedModelError(
                f"No sliceable layer ran on samples in the forward pass; the first that did not is '{unseen[0]}'."
            )
        if unseen:
            warnings.warn(
                f"{len(unseen)} of {len(self.layers)} layers never ran on samples in the forward pass and are left out "
                f"of the profile and of every slice made from it: {', '.join(unseen[:5])}"
                f"{' ...' if len(unseen) > 5 else ''}.",
                stacklevel=4,
            )
        ends: dict[str, dict[str, Tensor]] = {"input": {}, "output": {}}
        for name, layer in seen.items():
            for end, size in (("input", layer.in_neurons), ("output", layer.out_neurons)):
                counts = self._counts.get((name, end))
                ends[end][name] = torch.zeros(size, dtype=torch.int64) if counts is None else counts[:-1].cpu()
        return CoverageProfile(
            ends["input"],
            ends["output"],
            num_samples,
            self.criterion.to_dict(),
            source,
            weights_hash(seen),
            format(fingerprint, "x"),
            capped,
        )


def _stack(group: list[Activation]) -> ActivationStatistics:
    low = torch.stack([one.extremes[0] for one in group])
    high = torch.stack([one.extremes[1] for one in group])
    mean = torch.stack([one.mean for one in group])
    padding = group[0].padding
    if padding is not None:
        low, high = low.masked_fill(~padding.real, float("inf")), high.masked_fill(~padding.real, float("-inf"))
        mean = mean / padding.lengths
    return ActivationStatistics(low.amin(-1), high.amax(-1), mean)


def warn_of_degenerate(profile: CoverageProfile, layers: Mapping[str, Layer]) -> None:
    """Warn where coverage says nothing of many weights, because no sample covers a neuron at either end.

    Args:
        profile: A profile of some or all of the layers.
        layers: By `Layer.name`.
    """
    profiled = [layers[name] for name in profile.input_counts]
    unseen = sum(_never_covered(layer, profile) for layer in profiled) / sum(layer.numel for layer in profiled)
    if unseen <= _DEGENERATE_SHARE:
        return
    is_default = profile.criterion == MedianCoverage().to_dict()
    warnings.warn(
        f"The neurons at both ends of {unseen:.0%} of the weights were never covered by {profile.num_samples:,} "
        f"samples (criterion {profile.criterion['name']}), so magnitude alone decides among these. "
        f"{'Give more samples' if is_default else 'Leave criterion= at its default, the median'}, or compare with "
        "TopMagnitude.",
        stacklevel=3,
    )


def _never_covered(layer: Layer, profile: CoverageProfile) -> int:
    """Count the weights with no covered neuron at either end."""
    ends = profile.input_counts[layer.name], profile.output_counts[layer.name]
    rows, columns = layer.axis_counts(*((counts == 0).long() for counts in ends))
    return int((rows.view(len(columns), -1).sum(1) * columns.sum(1)).sum())
