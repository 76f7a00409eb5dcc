"""What a student is made of, as a small JSON summary: what was kept, what was reset, and how far its weights moved.

Numbers only, so that pictures can be drawn later and elsewhere, where the models are gone.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import LayerMismatchError, NonFiniteError
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing.relevant_slice import RelevantSlice

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
LAYER_QUANTILES = (0.25, 0.5, 0.75)
FREQUENCY_BINS = 20
POINTS = 200  # of a curve; longer ones are averaged

_PART = 1 << 22  # weights looked at together
_COSTS = ("runtime", "_per_second", "_time", "_mem")  # what Trainer logs beside metrics

Weights = nn.Module | Mapping[str, Tensor]

# What `check_anatomy` wants: a type; [each entry]; {name: value}, or {str: value} for any names; (either, or).
_BY_GROUP = {str: {"num_weights": int, "quantiles": [Real]}}
_NEURONS = {"num_neurons": int, "num_never": int, "histogram": [int]}
_FORM = {
    "slice": (None, {"rule": str, "scope": str, "slice_ratio": Real, "num_kept": int, "num_weights": int}),
    "layers": [{"name": str, "num_weights": int, "num_kept": (None, int), "magnitude": _BY_GROUP}],
    "change": {str: {"num_weights": int, "quantiles": {str: Real}, "reach": Real, "histogram": [int]}},
    "coverage": (
        None,
        {"num_samples": int, "criterion": dict, "layers": [{"name": str, "input": _NEURONS, "output": _NEURONS}]},
    ),
    "history": {str: {"num_logged": int, "steps": [Real], "values": [Real]}},
}


def anatomy(
    before: Mapping[str, Tensor],
    student: nn.Module,
    *,
    relevant: RelevantSlice | None = None,
    profile: CoverageProfile | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    head: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Summarise one trained student beside the teacher that it was started from.

    Weights are read layer by layer and not held together. Counts are exact; other numbers have 3 digits. A quantile is
    the value of the weight at the place floor(level * (num_weights - 1)) in ascending order.

    Args:
        before: The teacher's weights by parameter name, on the CPU, as they were before the reset. More may be in it.
        student: The student after training.
        relevant: Its slice: kept and reset weights are told apart. Without it, "all" weights outside the head count.
        profile: The coverage that the slice was chosen by.
        history: `trainer.state.log_history`, or `fit(...).history`.
        head: Without a slice, the modules that are left out; found if None.

    Returns:
        JSON values. "levels": of the quantiles by layer. "slice": rule, scope, ratio and counts, or None. "layers", in
        the student's order: "name", "num_weights", "num_kept" (or None), and by "kept" and "reset", or "all", the
        "magnitude" of the teacher's weights and the "change" student - teacher, each with "num_weights" and
        "quantiles". "change": the same over all layers, by `change_of_weights`. "coverage": by `coverage_of`, or None.
        "history": by `curves_of`.

    Raises:
        LayerMismatchError: A weight is missing or has another shape.
        NonFiniteError: A weight, its change, or a logged value is NaN or infinite; names the layer, or the step.
        ValueError: The profile counted nothing.

    Source:
        ReMoS (ICSE 2022), Fig. 8 to 10: share and magnitude of the reset weights, changes, convergence.
        Differs: kept and reset weights stand apart.
    """
    after = weights_of(student, body_names(student, relevant, head), relevant)
    old = weights_of(before, list(after), relevant)
    change = change_of_weights(old, after, relevant)
    for found in change.values():
        found |= {"reach": _rounded(found["reach"]), "quantiles": _all_rounded(found["quantiles"])}
    return {
        "levels": list(LAYER_QUANTILES),
        "slice": None if relevant is None else slice_facts(relevant),
        "layers": layers_of(old, relevant, after=after),
        "change": change,
        "coverage": None if profile is None else coverage_of(profile),
        "history": curves_of(history),
    }


def check_anatomy(found: Any) -> None:  # noqa: ANN401 - whatever a file holds
    """Refuse what `anatomy` did not give: a report may come from anyone.

    Raises:
        ValueError: Something is missing or of another type; says where.
    """
    _check_form(found, _FORM, "anatomy")
    levels = {f"{level:g}" for level in QUANTILES}
    for group, change in found["change"].items():
        if change["num_weights"] and not levels <= set(change["quantiles"]):
            missing = ", ".join(sorted(levels - set(change["quantiles"])))
            raise ValueError(f"anatomy.change.{group}.quantiles lacks {missing}")


def slice_facts(relevant: RelevantSlice) -> dict[str, Any]:
    """Give the rule of a slice and how much it keeps, as JSON values."""
    named = {name: getattr(relevant, name) for name in ("rule", "scope", "slice_ratio", "num_kept")}
    return {**named, "num_weights": relevant.num_weights}


def layers_of(
    before: Mapping[str, Tensor] | None, relevant: RelevantSlice | None, *, after: Mapping[str, Tensor] | None = None
) -> list[dict[str, Any]]:
    """Measure layer by layer: weights kept, magnitudes of the teacher's weights, change by training.

    Args:
        before: The teacher's weights by parameter name, in the order wanted; None leaves both distributions out.
        relevant: The slice; None counts all weights together.
        after: The student's weights; None leaves the change out.

    Returns:
        "layers" of `anatomy`.

    Raises:
        LayerMismatchError: A weight has another shape in the student.
        NonFiniteError: A weight or its change is NaN or infinite; names the layer.
    """
    names = list(before) if before is not None else in_order(relevant.kept)
    layers = []
    for name in names:
        kept = None if relevant is None else relevant.kept[name].flatten()
        shape = before[name].shape if before is not None else relevant.kept.shapes[name]
        found: dict[str, Any] = {"name": name, "num_weights": shape.numel()}
        found["num_kept"] = None if kept is None else int(kept.sum())
        if before is not None:
            magnitude = before[name].detach().float().abs().flatten().cpu()
            if not torch.isfinite(magnitude).all():
                raise NonFiniteError(f"'{name}' holds NaN or infinity: the teacher's checkpoint is broken.")
            found["magnitude"] = _quantiles_by_group(magnitude, kept)
        if after is not None:
            parts = _change_in_parts(name, before[name], after[name])
            found["change"] = _quantiles_by_group(torch.cat(list(parts)), kept)
        layers.append(found)
    return layers


def change_of_weights(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], relevant: RelevantSlice | None = None
) -> dict[str, dict[str, Any]]:
    """Measure student - teacher over all layers. Weights are read layer by layer, twice, and not held together.

    Args:
        before: The teacher's weights by parameter name.
        after: The student's, by the same names.
        relevant: The slice, which tells kept from reset weights.

    Returns:
        By "kept" and "reset", or "all": "num_weights"; "share_unchanged", of those, the share whose difference is
        exactly 0 (None of no weights); "quantiles", exact differences as float32, by their level as text; "histogram",
        the weights in 101 bars of equal width from -"reach" to "reach". Weights further out are in no bar.

    Raises:
        LayerMismatchError: A weight has another shape in the student.
        NonFiniteError: A difference is NaN or infinite; names the layer.
    """

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name in before:
            kept = None if relevant is None else relevant.kept[name].flatten()
            for number, change in enumerate(_change_in_parts(name, before[name], after[name])):
                if kept is None:
                    yield "all", change
                else:
                    chosen = kept[number * _PART : number * _PART + len(change)]
                    yield "kept", change[chosen]
                    yield "reset", change[~chosen]

    groups = ("all",) if relevant is None else ("kept", "reset")
    found = _Distribution(changes, groups)
    return {
        group: {
            "num_weights": (number := found.num_weights[group]),
            "share_unchanged": found.unchanged[group] / number if number else None,
            "quantiles": found.quantiles[group],
            "reach": found.reach[group],
            "histogram": found.histogram[group].tolist(),
        }
        for group in groups
    }


def coverage_of(profile: CoverageProfile) -> dict[str, Any]:
    """Count how often neurons are covered, layer by layer.

    Args:
        profile: The profile.

    Returns:
        JSON values: "num_samples", "criterion", and "layers", each with "name" and, of its "input" and "output"
        neurons, "num_neurons", "num_never" (covered by no sample) and "histogram": the neurons in 20 bins of coverage
        frequency, [0, 0.05), [0.05, 0.1), ... and [0.95, 1]. Those never covered are in the first bin too.

    Raises:
        ValueError: The profile counted no sample or no layer.
    """
    if not profile.num_samples or not profile.input_counts:
        raise ValueError(
            f"A profile to draw counts samples on layers, but this one has {profile.num_samples} samples on "
            f"{len(profile.input_counts)} layers. Profile some data first."
        )

    def counted(counts: Tensor) -> dict[str, Any]:
        # Whole numbers: 3 of 20 samples are 15 %, which floats put on either side of an edge.
        bins = (counts.flatten() * FREQUENCY_BINS // profile.num_samples).clamp(max=FREQUENCY_BINS - 1)
        histogram = torch.bincount(bins.long(), minlength=FREQUENCY_BINS).tolist()
        return {"num_neurons": counts.numel(), "num_never": int((counts == 0).sum()), "histogram": histogram}

    layers = [
        {"name": name, "input": counted(profile.input_counts[name]), "output": counted(profile.output_counts[name])}
        for name in in_order(profile.input_counts)
    ]
    return {"num_samples": profile.num_samples, "criterion": dict(profile.criterion), "layers": layers}


def curves_of(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Give the curves of a training, each with at most 200 points.

    Args:
        history: `trainer.state.log_history`, or `fit(...).history`. Entries with "step" count: their "loss", and
            their metrics, under "eval_<metric>" or in "evaluation".

    Returns:
        By "loss" and "eval_<metric>", in the order they were first logged: "num_logged", "steps" and "values". Of
        longer curves, neighbours are averaged.

    Raises:
        NonFiniteError: A value is NaN or infinite; names it and its step.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        if "step" not in entry:
            continue
        for name, value in _logged(entry):
            if isinstance(value, bool) or not isinstance(value, Real):
                continue
            if not np.isfinite(value):
                raise NonFiniteError(
                    f"The training logged {name} = {value} at step {entry['step']}: it diverged. Lower the learning "
                    "rate, or give the history without what is broken."
                )
            curves.setdefault(name, []).append((entry["step"], float(value)))
    return {name: _thinned(curve) for name, curve in curves.items()}


def body_names(model: Weights, relevant: RelevantSlice | None, head: tuple[str, ...] | None) -> list[str]:
    """Name the weights that a slice holds, or without one those outside a model's head.

    Raises:
        ValueError: The model is a state dict and there is no slice.
    """
    if relevant is not None:
        return list(relevant.kept)
    if not isinstance(model, nn.Module):
        raise ValueError(
            "Which weights of a state dict are the body's is said by a slice: pass relevant=, or the teacher as a "
            "module."
        )
    return [layer.key for layer in adapter_for(model, head).layers().values()]


def weights_of(
    model: Weights, names: Sequence[str], relevant: RelevantSlice | None, *, is_teacher: bool = False
) -> dict[str, Tensor]:
    """Give weights by name, detached, of a module (in its own order) or a state dict.

    Args:
        model: Module or state dict.
        names: Of the weights wanted.
        relevant: A slice whose shapes they must have.
        is_teacher: Whether a module must be the one that the slice was made from.

    Raises:
        LayerMismatchError: A weight is missing or has another shape.
        TeacherMismatchError: The module is not the slice's teacher.
    """
    is_module = isinstance(model, nn.Module)
    if is_module:
        if relevant is not None and is_teacher:
            relevant.check_matches(adapter_for(model, ()).layers(embeddings=True))
        model = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in names:
        stack, index = _place_of(name)
        if stack not in model:
            raise LayerMismatchError(f"'{name}' is wanted, but the model has no such weight. Is it of another kind?")
        found[name] = model[stack].detach() if index is None else model[stack].detach()[index]
        if relevant is not None and found[name].shape != relevant.kept.shapes[name]:
            raise LayerMismatchError(
                f"The slice holds '{name}' of shape {tuple(relevant.kept.shapes[name])}, but the model's has "
                f"{tuple(found[name].shape)}."
            )
    if not is_module:
        return found
    made = {name: number for number, name in enumerate(model)}  # a module knows in which order its layers were made
    return dict(sorted(found.items(), key=lambda item: (made[_place_of(item[0])[0]], _place_of(item[0])[1] or 0)))


def _place_of(key: str) -> tuple[str, int | None]:
    """Give the parameter that a slice's key names, and which expert of it."""
    stack, bracket, index = key.removesuffix("]").partition("[")
    return (stack, int(index)) if bracket else (key, None)


def in_order(names: Iterable[str]) -> list[str]:
    """Give names in the order of the layers: a slice that was saved has them sorted as text, 10 before 2."""
    given = list(names)
    if given != sorted(given):
        return given
    return sorted(
        given,
        key=lambda name: [
            (not one.isdigit(), int(one) if one.isdigit() else one) for one in re.split(r"[.\[\]]", name)
        ],
    )


def _change_in_parts(name: str, before: Tensor, after: Tensor) -> Iterator[Tensor]:
    if before.shape != after.shape:
        raise LayerMismatchError(
            f"'{name}' has shape {tuple(before.shape)} in the teacher and {tuple(after.shape)} in the student."
        )
    for old, new in zip(before.flatten().split(_PART), after.flatten().split(_PART), strict=True):
        change = new.float().cpu() - old.float().cpu()
        if not torch.isfinite(change).all():
            raise NonFiniteError(f"student - teacher is NaN or infinite in '{name}': one of them is broken.")
        yield change


def _quantiles_by_group(values: Tensor, kept: Tensor | None) -> dict[str, dict[str, Any]]:
    groups = {"all": values} if kept is None else {"kept": values[kept], "reset": values[~kept]}
    return {
        group: {"num_weights": part.numel(), "quantiles": [_rounded(one) for one in _quantiles(part.numpy())]}
        for group, part in groups.items()
    }


def _quantiles(values: np.ndarray) -> list[float]:
    if not values.size:
        return []
    places = [int(level * (values.size - 1)) for level in LAYER_QUANTILES]
    return np.partition(values, places)[places].tolist()


def _check_form(found: Any, form: Any, where: str) -> None:  # noqa: ANN401 - JSON, and one of the forms above
    if isinstance(form, tuple):
        if found is not None:
            _check_form(found, form[1], where)
        return
    kind = form if isinstance(form, type) else type(form)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f"{where} is {type(found).__name__}, not {kind.__name__}")
    if isinstance(form, list):
        for number, one in enumerate(found):
            _check_form(one, form[0], f"{where}[{number}]")
    elif isinstance(form, dict):
        wanted = dict.fromkeys(found, form[str]) if str in form else form
        for name, inner in wanted.items():
            if name not in found:
                raise ValueError(f"{where} lacks {name}")
            _check_form(found[name], inner, f"{where}.{name}")


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _all_rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _rounded(value) for name, value in values.items()}


def _logged(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "loss", entry.get("loss")
    evaluated = [(name, value) for name, value in entry.items() if name.startswith("eval_")]
    for name, value in chain(evaluated, (entry.get("evaluation") or {}).items()):
        if not name.endswith(_COSTS):
            yield f"eval_{name.removeprefix('eval_')}", value


def _thinned(curve: Sequence[tuple[int, float]]) -> dict[str, Any]:
    parts = np.array_split(np.array(curve, dtype=np.float64), min(POINTS, len(curve)))
    steps, values = np.array([part.mean(0) for part in parts]).T.tolist()
    return {
        "num_logged": len(curve),
        "steps": [round(step, 1) for step in steps],
        "values": [_rounded(value) for value in values],
    }


class _Distribution:
    """Histogram and exact quantiles of float32 values that are read twice, part by part, and never held together.

    The bits of a float32, read as a whole number, order as the values do. The first pass counts by their upper half,
    which tells the upper half of each quantile; the second counts the lower half of those, and the bars.
    """

    def __init__(
        self, parts: Callable[[], Iterable[tuple[str, Tensor]]], groups: Sequence[str], num_bars: int = 101
    ) -> None:
        upper = {group: torch.zeros(1 << 16, dtype=torch.int64) for group in groups}
        self.unchanged = dict.fromkeys(groups, 0)
        for group, values in parts():
            upper[group] += torch.bincount(_ordered_bits(values) >> 16, minlength=1 << 16)
            self.unchanged[group] += int((values == 0).sum())
        self.num_weights = {group: int(counts.sum()) for group, counts in upper.items()}
        places = {
            group: {level: _place_in(upper[group], int(level * (number - 1))) for level in QUANTILES if number}
            for group, number in self.num_weights.items()
        }
        lower = {
            group: {half: torch.zeros(1 << 16, dtype=torch.int64) for half, _ in of.values()}
            for group, of in places.items()
        }
        self.reach = reach = {group: _reach_of_bars(of) for group, of in places.items()}
        # An odd number of bars has one for what did not move.
        self.histogram = {group: np.zeros(num_bars, dtype=np.int64) for group in groups}
        for group, values in parts():
            self.histogram[group] += np.histogram(values.double().numpy(), num_bars, (-reach[group], reach[group]))[0]
            bits = _ordered_bits(values)
            for half, counts in lower[group].items():
                counts += torch.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=1 << 16)
        self.quantiles = {
            group: {
                f"{level:g}": _value_of((half << 16) + _place_in(lower[group][half], rest)[0])
                for level, (half, rest) in of.items()
            }
            for group, of in places.items()
        }


def _reach_of_bars(places: Mapping[float, tuple[int, int]]) -> float:
    """Give twice what holds 98 % of the values: a few far ones would leave the others in one bar."""

    def furthest(*levels: float) -> float:
        found = max(abs(_value_of((places[level][0] << 16) + 0x8000)) for level in levels) if places else 0.0
        return found if found > 1e-30 else 0.0  # 0 has more neighbours than its upper half tells

    return 2 * furthest(0.01, 0.99) or furthest(0.0, 1.0) or 1.0


def _ordered_bits(values: Tensor) -> Tensor:
    """Give whole numbers from 0 to 2^32 - 1 in the order of float32 values. Shape as given."""
    bits = (values + 0.0).contiguous().view(torch.int32)  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) + (1 << 31)


def _value_of(bits: int) -> float:
    signed = torch.tensor(bits - (1 << 31), dtype=torch.int32)
    return float((signed ^ 0x7FFFFFFF if signed < 0 else signed).view(torch.float32))


def _place_in(counts: Tensor, place: int) -> tuple[int, int]:
    """Give the bin that holds the place-th value, counted from 0, and its place among those of the bin."""
    summed = counts.cumsum(0)
    found = int(torch.searchsorted(summed, place, right=True))
    return found, place - int(summed[found - 1] if found else 0)
