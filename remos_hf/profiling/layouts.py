"""Where samples and positions lie in each activation: proved on a few samples, never guessed from sizes that fit.

Two samples run alone and beside each other. The axis that grows with them is the samples'; what each gives alone must
be found there again. Then each sequence of the batch is cut, and the axis that shrinks holds its positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from remos_hf.adapters.base import Adapter
from remos_hf.adapters.sequences import Sequence, with_positions
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.batches import take

# Name it was called by, "input" or "output", and which of its calls within one forward pass.
Place = tuple[str, str, int]
See = Callable[[Place, Tensor, int], None]
# How far means may differ, as a share of the activation's spread: the order of sums in float32, and in half precision.
_TOLERANCE, _HALF_TOLERANCE = 0.02, 0.2
# Samples that have to have as many rows as the first two where rows are folded and are no positions of a sequence.
_SAMPLES_TO_COMPARE = 6


@dataclass(frozen=True)
class Layout:
    """Where the samples of one activation lie.

    Attributes:
        axis: The samples' axis; None if the activation is not of samples (a table of positions).
        rows: Entries a sample has along that axis: more than 1 where positions, windows or frames are folded into it.
        samples_inside: Whether, of folded axes, the sample is the inner one.
        sequence: Name of the sequence whose positions it holds, if any.
        position: The axis of those positions; the samples' own if they are folded into it.
        unclear: Depends on a sequence whose padding cannot be found in it.
    """

    axis: int | None
    rows: int = 1
    samples_inside: bool = False
    sequence: str | None = None
    position: int | None = None
    unclear: bool = False

    @property
    def folded(self) -> bool:
        """Whether the samples' axis holds something else too."""
        return self.rows != 1 or self.position == self.axis is not None


# All of an activation belongs to the one sample that runs.
WHOLE = Layout(None, rows=0)


class Unproved(Exception):  # noqa: N818 - caught within the room, never seen outside
    """An activation does not lie as was proved; the batch has to be proved itself."""


@dataclass
class Proof:
    """What is known of a model's activations.

    Attributes:
        layouts: By place.
        alone: Places whose rows cannot be matched with samples, as those of routed experts. If there are any, samples
            run one at a time.
    """

    layouts: dict[Place, Layout] = field(default_factory=dict)
    alone: tuple[Place, ...] = ()


@dataclass
class _Seen:
    shape: torch.Size
    mean: Tensor  # of each neuron over everything else
    spread: Tensor  # largest value minus smallest
    layout: Layout | None = None


def prove(adapter: Adapter, batch: Any, samples: int, run: Callable[[Any, See], None]) -> Proof:  # noqa: ANN401
    """Find where samples and positions lie in the activations of a model.

    Costs about six samples' forward passes, and six more where windows or frames are folded into the samples' axis.

    Args:
        adapter: The model's adapter.
        batch: A batch on the model's device.
        samples: How many samples it holds.
        run: Runs the model on a batch and shows each activation with its place and the axis of its neurons.

    Raises:
        UnsupportedModelError: A sample gives other values beside another one than alone, so the first axis of the
            batch is not the sample, or the model mixes samples.
    """
    few = _two_samples(adapter, batch, samples)
    first, second = (_trace(run, take(few, torch.tensor([row]), 2)) for row in (0, 1))
    pair: dict[Place, _Seen] = {}
    unmatched: dict[Place, None] = dict.fromkeys(first.keys() ^ second.keys())

    def see(place: Place, values: Tensor, axis: int) -> None:
        seen = pair[place] = _look(values, axis)
        if place not in first or place not in second:
            unmatched[place] = None
            return
        seen.layout = _samples_axis(place, values, axis, first[place], second[place])
        if seen.layout is None:
            unmatched[place] = None

    run(few, see)
    unmatched |= dict.fromkeys(place for place in first if place not in pair)
    layouts = {place: seen.layout for place, seen in pair.items() if seen.layout is not None}
    for name, sequence in adapter.sequences(few).items():
        _find_positions(layouts, pair, name, sequence, _shorter_traces(run, few, name, sequence))
    unmatched |= dict.fromkeys(_folded_by_chance(layouts, first, batch, samples, run))
    return Proof(layouts, tuple(unmatched))


def _folded_by_chance(
    layouts: dict[Place, Layout],
    first: dict[Place, _Seen],
    batch: Any,  # noqa: ANN401 - any batch
    samples: int,
    run: Callable[[Any, See], None],
) -> list[Place]:
    """Find places where two samples have as many rows, but rows are no positions and others have more or fewer.

    Routed experts may see as many tokens of two samples by chance.
    """
    folded = {place for place, layout in layouts.items() if layout.rows > 1 and layout.position != layout.axis}
    wrong = {place for place in folded if layouts[place].unclear and layouts[place].position is None}
    if not folded - wrong:
        return list(wrong)
    for row in range(min(samples, _SAMPLES_TO_COMPARE)):
        alone = _trace(run, take(batch, torch.tensor([row]), samples))
        wrong |= {
            place
            for place in folded
            if place not in alone or alone[place].shape[layouts[place].axis] != first[place].shape[layouts[place].axis]
        }
    return list(wrong)


def _two_samples(adapter: Adapter, batch: Any, samples: int) -> Any:  # noqa: ANN401 - any batch
    """Take the fullest sample and another, without the positions that both pad, with two positions at least."""
    fullest = 0
    for sequence in adapter.sequences(batch).values():
        if sequence.real is not None:
            fullest = int(sequence.real.flatten(1).sum(1).argmax())
    rows = torch.tensor([fullest, (fullest + 1) % samples])
    few = take(batch, rows, samples) if samples > 1 else _doubled(batch)
    for name, sequence in adapter.sequences(few).items():
        kept = torch.arange(sequence.shape[-1])
        if sequence.real is not None and bool(sequence.real.any()):
            kept = sequence.real.flatten(0, -2).any(0).cpu().nonzero()[:, 0]
        few = with_positions(few, name, sequence.shape, kept if len(kept) > 1 else kept.repeat(2))
    return few


def _doubled(batch: Any) -> Any:  # noqa: ANN401 - any batch
    """Put a batch of one sample beside itself, with every image or frame that it holds."""

    def twice(value: Any) -> Any:  # noqa: ANN401 - whatever a batch holds
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value

    if isinstance(batch, (tuple, list)):
        return type(batch)([twice(value) for value in batch])
    return {key: twice(value) for key, value in batch.items()} if hasattr(batch, "items") else twice(batch)


def _trace(run: Callable[[Any, See], None], batch: Any) -> dict[Place, _Seen]:  # noqa: ANN401 - any batch
    seen: dict[Place, _Seen] = {}

    def see(place: Place, values: Tensor, axis: int) -> None:
        seen[place] = _look(values, axis)

    run(batch, see)
    return seen


def _look(values: Tensor, axis: int) -> _Seen:
    rows = values.detach().float().movedim(axis, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    if not rows.numel():
        return _Seen(values.shape, rows.new_zeros(rows.shape[-1]), rows.new_zeros(()))
    rows = rows.nan_to_num(0.0, 0.0, 0.0)  # what is not finite is found, and named, where it is counted
    return _Seen(values.shape, rows.mean(0), rows.max() - rows.min())


def _samples_axis(place: Place, values: Tensor, neurons: int, one: _Seen, other: _Seen) -> Layout | None:
    if one.shape != other.shape or len(one.shape) != values.dim():
        return None
    grown = [axis for axis, (alone, both) in enumerate(zip(one.shape, values.shape, strict=True)) if alone != both]
    if not grown:
        return Layout(None) if _is_table(_look(values, neurons), one, other) else None
    axis, rows = grown[0], one.shape[grown[0]]
    if len(grown) > 1 or axis == neurons % values.dim() or values.shape[axis] != 2 * rows:
        return None
    candidates = [Layout(axis, rows), Layout(axis, rows, samples_inside=True)][: 1 if rows == 1 else 2]
    errors = [_error(values, neurons, layout, one, other) for layout in candidates]
    best = min(errors)
    if best <= (_HALF_TOLERANCE if values.dtype in (torch.bfloat16, torch.float16) else _TOLERANCE):
        return candidates[errors.index(best)]
    crossed = _error(values, neurons, candidates[0], other, one)
    if rows > 1 or crossed < best:  # entries in another order: tokens that were routed here
        return None
    raise UnsupportedModelError(
        f"The {place[1]} of '{place[0]}' holds other values for a sample beside another one than for the sample alone, "
        "so samples cannot be told apart. The first axis of every batch must be the sample, and the model must not mix "
        "samples."
    )


def _is_table(both: _Seen, one: _Seen, other: _Seen) -> bool:
    """Whether an activation that does not grow is the same whichever samples run, as a table of positions is.

    What holds nothing shows nothing: an expert may get tokens of other samples.
    """
    if not both.shape.numel():
        return False
    largest = max(float((seen.mean - both.mean).abs().max()) for seen in (one, other))
    return largest <= _TOLERANCE * max(float(both.spread), torch.finfo(torch.float32).tiny)


def _error(values: Tensor, neurons: int, layout: Layout, one: _Seen, other: _Seen) -> float:
    parts, axis = by_sample(values, layout, 2, neurons)
    errors = []
    for part, alone in zip(parts.unbind(0), (one, other), strict=True):
        difference = (_look(part, axis - 1).mean - alone.mean).abs().max()
        errors.append(difference / alone.spread.clamp(min=torch.finfo(torch.float32).tiny))
    return float(torch.stack(errors).max())


def by_sample(
    values: Tensor, layout: Layout, samples: int, neurons: int, sequences: Mapping[str, Sequence] | None = None
) -> tuple[Tensor, int]:
    """View an activation with its samples on the first axis; what was folded into theirs becomes the second.

    Args:
        values: The activation.
        layout: Where its samples lie.
        samples: How many there are.
        neurons: Axis of the neurons.
        sequences: The batch's, which say how many positions there have to be; None in a proof.

    Returns:
        The view, and the axis of the neurons in it.

    Raises:
        Unproved: There are more or fewer entries than the samples should have.
    """
    rows = layout.rows
    if sequences is not None and layout.position == layout.axis and layout.sequence in sequences:
        rows = math.prod(sequences[layout.sequence].shape[1:])
    if values.dim() <= layout.axis or values.shape[layout.axis] != samples * rows:
        raise Unproved(f"an activation of shape {tuple(values.shape)} does not hold {rows} entries for each sample")
    axis = _moved(neurons % values.dim(), layout)
    values = values.movedim(layout.axis, 0)
    if not layout.folded:
        return values, axis
    if layout.samples_inside:
        return values.unflatten(0, (rows, samples)).transpose(0, 1), axis
    return values.unflatten(0, (samples, rows)), axis


def _moved(axis: int, layout: Layout) -> int:
    return axis + (axis < layout.axis) + layout.folded


def real_positions(real: Tensor, layout: Layout, others: tuple[int, ...], neurons: int) -> Tensor | None:
    """Lay the mask of a sequence over an activation that `by_sample` has viewed.

    Args:
        real: Bool, shape (samples, positions) or (samples, choices, positions).
        layout: Of the activation.
        others: Sizes of the axes of the view that are neither samples nor neurons.
        neurons: Axis of the neurons in the activation itself, from 0.

    Returns:
        Bool, shape (samples, all others folded); None if the mask does not fit.
    """
    choices, positions = real.shape[1:-1], real.shape[-1]
    if layout.position == layout.axis:
        place, others = len(choices), (*real.shape[1:], *others[1:])
    else:
        place = _moved(layout.position, layout) - 1
        place -= place >= _moved(neurons, layout) - 1
    if others[place] != positions:
        return None
    before = others[:place]
    if math.prod(choices) > 1 and before != choices:
        return None
    shape = (*(before if math.prod(choices) > 1 else [1] * place), positions, *[1] * (len(others) - place - 1))
    return real.reshape(len(real), *shape).expand(len(real), *others).reshape(len(real), -1)


def _shorter_traces(run: Callable, batch: Any, name: str, sequence: Sequence) -> tuple[int, dict] | None:  # noqa: ANN401
    positions = sequence.shape[-1]
    for left in sorted({max(1, positions // 2), positions - 1}):
        try:
            cut = with_positions(batch, name, sequence.shape, torch.arange(left))
            return left, _trace(run, cut)
        except (RuntimeError, ValueError, IndexError, TypeError):  # places for images are gone, sound is too short
            continue
    return None


def _find_positions(
    layouts: dict[Place, Layout],
    pair: dict[Place, _Seen],
    name: str,
    sequence: Sequence,
    shorter: tuple[int, dict[Place, _Seen]] | None,
) -> None:
    for place, layout in layouts.items():
        if layout.axis is None or layout.sequence is not None:
            continue
        full = pair[place]
        if shorter is None or place not in shorter[1]:
            layouts[place] = replace(layout, unclear=True)
            continue
        left, cut = shorter[0], shorter[1][place]
        position = _shrunk_axis(layout, full.shape, cut.shape, sequence.shape, left)
        if position is not None:
            layouts[place] = replace(layout, sequence=name, position=position, unclear=False)
        elif full.shape != cut.shape or (
            not torch.equal(full.mean, cut.mean) and full.shape.numel() > 2 * full.mean.numel()
        ):
            layouts[place] = replace(layout, unclear=True)


def _shrunk_axis(layout: Layout, full: torch.Size, cut: torch.Size, sequence: torch.Size, left: int) -> int | None:
    if len(full) != len(cut):
        return None
    changed = [axis for axis, (before, after) in enumerate(zip(full, cut, strict=True)) if before != after]
    if len(changed) != 1:
        return None
    axis, choices = changed[0], math.prod(sequence[1:-1])
    times = 2 * choices if axis == layout.axis else 1
    return axis if full[axis] == times * sequence[-1] and cut[axis] == times * left else None
