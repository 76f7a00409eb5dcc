"""ReMoS with another relevance in place of coverage: how strongly neurons act, or how much the loss asks of weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError
from remos_hf.layers import Layer
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.data_pass import observe
from remos_hf.profiling.observers import Activation, Observer, Slot
from remos_hf.slicing.ordinal import Entry, Selection, select
from remos_hf.slicing.rules import Rule, keep_highest, num_to_reset
from remos_hf.strategies.short_runs import Samples, check_counts, mean_gradient, part_of, with_trained_head
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData

# Sums of |activation| are held in whole numbers of this, so that they add exactly over batches and processes.
_UNIT = 2.0**-20
# The neuron that acts most counts as many "covered samples" as this, and the others in proportion: exact ranks need
# whole numbers, and a table of so many.
_LEVELS = 2**16


@dataclass(frozen=True)
class Relevance(SliceAndReset):
    """ReMoS whose coverage is replaced: does what the data says matter, beyond magnitude?

    "activation": a weight's relevance is the mean |activation| of its input neuron plus that of its output neuron,
    over samples and real positions, where ReMoS has counts. "gradient": the mean over batches of |dL/dw| of the
    student's own loss, under a head that was trained on the frozen teacher before (the student keeps its fresh one).
    Either way the weights of lowest rank(relevance) - rank(magnitude) are reset, ties sharing their mean rank.

    Uses poisoned data or an attack's success: no.

    Attributes:
        score: "activation" or "gradient".
        scope: "layer": each layer is ranked and cut by itself. "model": all weights compete, which for "gradient"
            sorts them all at once.
        head_steps: Steps of 32 samples that the head is trained before gradients are taken; 0 takes it as it is.

    Source:
        ReMoS, ICSE 2022, section 4.2.
        Differs: the relevance, and layer scope by default. Embedding rows do not compete.
    """

    score: Literal["activation", "gradient"] = "activation"
    scope: Literal["model", "layer"] = "layer"
    head_steps: int = 100

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        super().__post_init__()
        if self.score not in ("activation", "gradient"):
            raise ValueError(f"score is 'activation' or 'gradient', but got {self.score!r}.")
        if self.embeddings:
            raise ValueError("Relevance scores no embedding rows. Leave embeddings=True out, or take Remos.")
        check_counts(self, head_steps=0)

    def _decided_by(self, student: nn.Module, data: StudentData) -> tuple[Rule, Mapping[str, Any]]:
        """Score the weights on the student's data."""
        if self.score == "gradient":
            gradients, told = self._gradients(student, data)
            return gradient_rule(gradients), {"relevance": {"score": self.score, **told}}
        seen = MeanActivations()
        batches = data.batches(data.max_samples)
        passed = observe(student, batches, [seen], head=self.head, max_samples="all", across_processes=True)
        return activation_rule(seen.means()), {"relevance": {"score": self.score, "samples": passed.num_samples}}

    def _gradients(self, student: nn.Module, data: StudentData) -> tuple[dict[str, Tensor], dict[str, int]]:
        first = next(student.parameters())
        samples = Samples(data, first.device, data.seed if self.seed is None else self.seed)
        asked, steps = with_trained_head(student, samples, steps=self.head_steps, head=self.head)
        layers = adapter_for(asked, self.head).layers()
        found, count = mean_gradient(
            asked, samples, {one.parameter_name: one.parameter for one in layers.values()}, absolute=True
        )
        by_layer = {name: part_of(layer, found[layer.parameter_name]) for name, layer in layers.items()}
        return by_layer, {"samples": count, "head_steps": steps}


class MeanActivations(Observer):
    """Adds up |activation| at both ends of every layer over samples and real positions, in exact whole numbers."""

    def __init__(self) -> None:
        self.layers: Mapping[str, Layer] = {}
        self._sums: dict[str, Tensor] = {}  # (neurons + 1,): int64; the last is how many vectors they are of
        self.drop_batch()

    def start(self, layers: Mapping[str, Layer]) -> None:
        """Get to know the layers."""
        self.layers = layers

    def see(self, slot: Slot, activation: Activation) -> None:
        """Add up one activation.

        Raises:
            NonFiniteError: It holds NaN or infinity at a real position.
        """
        rows = activation.rows()
        sums = rows.abs().sum(0, dtype=torch.float64)
        if not bool(sums.isfinite().all()):
            raise NonFiniteError(
                f"The {slot.end} of '{slot.name}' holds NaN or infinity on this data. Check the data, or run the "
                "teacher in float32."
            )
        whole = (sums / _UNIT).round().long()
        self._seen.append((slot, torch.cat([whole, whole.new_tensor([len(rows)])]).cpu()))

    def drop_batch(self) -> None:
        """Forget the batch."""
        self._seen: list[tuple[Slot, Tensor]] = []

    def close_batch(self) -> None:
        """Add up the batch."""
        for slot, sums in self._seen:
            key = _key(slot)
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        self.drop_batch()

    def state(self) -> dict[str, Tensor]:
        """Give the sums by layer, end and part."""
        return self._sums

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the sums of all processes."""
        self._sums = dict(state)

    def means(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Give the mean |activation| of every neuron of a layer's inputs and of its outputs, by `Layer.name`.

        Float64, shapes (in,) and (out,), on the CPU. Layers that never ran are not there.
        """
        found = {}
        for name, layer in self.layers.items():
            ends = []
            for end, parts in (("input", 1), ("output", len(layer.part_sizes) or 1)):
                sums = [self._sums.get(_key(Slot(name, end, part))) for part in range(parts)]
                if all(one is not None for one in sums):
                    means = [one[:-1].double() * _UNIT / int(one[-1]) for one in sums]
                    ends.append(layer.join_parts(mean[None] for mean in means)[0] if end == "output" else means[0])
            if len(ends) == 2:
                found[name] = ends[0], ends[1]
        return found


def _key(slot: Slot) -> str:
    return f"{slot.name}\n{slot.end}\n{slot.part}"


def activation_rule(means: Mapping[str, tuple[Tensor, Tensor]]) -> Rule:
    """Make the rule that ranks mean |activation| where ReMoS ranks coverage; `means` by `Layer.name`."""

    def activation(layers: Sequence[Layer], statistics: CoverageProfile | None, share: float, seed: int) -> Selection:
        largest = max(float(end.max()) for layer in layers for end in means[layer.name]) or 1.0
        entries, device = [], layers[0].device
        for layer in layers:
            counts = [(end / largest * _LEVELS).round().to(torch.int32) for end in means[layer.name]]
            rows, columns = layer.axis_counts(*counts)
            entries.append(Entry(layer, rows.contiguous().to(device), columns.contiguous().to(device)))
        return select(entries, num_to_reset(layers, share))

    return activation


def gradient_rule(gradients: Mapping[str, Tensor]) -> Rule:
    """Make the rule that ranks |gradient| where ReMoS ranks coverage; `gradients` by `Layer.name`."""

    def gradient(layers: Sequence[Layer], statistics: CoverageProfile | None, share: float, seed: int) -> Selection:
        device = layers[0].device
        relevance = torch.cat([gradients[layer.name].to(device).flatten() for layer in layers])
        magnitude = torch.cat([layer.weight.to(device).float().abs().flatten() for layer in layers])
        scores = (_doubled_ranks(relevance) - _doubled_ranks(magnitude)).split([layer.numel for layer in layers])
        return keep_highest(
            [score.view(layer.shape) for score, layer in zip(scores, layers, strict=True)], layers, share
        )

    return gradient


def _doubled_ranks(values: Tensor) -> Tensor:
    """Twice the mean rank of every value, so that it is a whole number. Int64, shape (values,)."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (2 * counts.cumsum(0) - counts - 1)[places]
