"""Rank the weights of a model by what they do for some samples, or by the rivals that look at no sample."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import LayerMismatchError, NonFiniteError
from remos_hf.layers import Layer, largest_magnitude, rankable_layers, weights_hash
from remos_hf.profiling.reference import Reference
from remos_hf.slicing.contributions import Outputs, contributions
from remos_hf.slicing.effective_path import effective_path
from remos_hf.slicing.gradient_contributions import gradient_contributions
from remos_hf.slicing.refill import parameter_generator
from remos_hf.slicing.relevant_slice import RelevantSlice

Method = Literal["contributions", "gradient", "effective_path", "magnitude", "random"]
Granularity = Literal["weight", "channel"]

_METHODS = ("contributions", "gradient", "effective_path", "magnitude", "random")
_WITH_SAMPLES = ("contributions", "gradient", "effective_path")


def weight_scores(
    model: nn.Module,
    method: Method,
    batches: Iterable | None = None,
    *,
    reference: Reference | None = None,
    outputs: Outputs = None,
    theta: float = 0.2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every weight by one of five methods; what scores highest matters most.

    Args:
        model: The model, in eval mode.
        method: "contributions": the sum over samples of |contribution| (NNSlicer). "gradient": the same to first order,
            in one pass back. "effective_path": how many paths lead through it. "magnitude": its absolute value.
            "random": drawn, all different.
        batches: Samples of the classes that the weights are to matter for, in batches, for the first three.
        reference: What samples are compared with, for the first two: `profile_reference(model, batches)`.
        outputs: Which output neurons are asked about, as in `contributions`.
        theta: Of "contributions", likewise.
        seed: Of "random".

    Returns:
        By parameter name, float64, shape of the weight, on the CPU. Of the first three, weights that did not run on
        these samples are not there.

    Raises:
        ValueError: The method is none of these, or lacks what it looks at; or as `contributions`.
        NonFiniteError: A weight is NaN or infinite.
        UnsupportedModelError: As `contributions`.
    """
    if method not in _METHODS:
        raise ValueError(f"method is one of {', '.join(map(repr, _METHODS))}, but got {method!r}.")
    if method not in _WITH_SAMPLES:
        layers = rankable_layers(adapter_for(model, ()).layers())
        largest_magnitude(layers)
        draw = _drawn if method == "random" else _magnitudes
        return {layer.key: draw(layer, seed) for layer in layers.values()}
    if batches is None:
        raise ValueError(f"method={method!r} looks at samples: pass batches of the classes that are meant.")
    if method == "effective_path":
        return _as_scores(effective_path(model, batches, outputs=outputs).weights)
    if reference is None:
        raise ValueError(
            f"method={method!r} compares samples with a reference: pass reference=profile_reference(model, batches) of "
            "all classes."
        )
    if method == "gradient":
        return _as_scores(gradient_contributions(model, batches, reference, outputs=outputs))
    return _as_scores(contributions(model, batches, reference, outputs=outputs, theta=theta).absolute)


def _as_scores(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.double() for name, one in found.items()}


def _magnitudes(layer: Layer, _: int) -> Tensor:
    return layer.weight.double().abs().cpu()


def _drawn(layer: Layer, seed: int) -> Tensor:
    order = torch.randperm(layer.numel, generator=parameter_generator(seed, layer.key))
    return order.double().view(layer.shape)


def highest_scoring(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    share: float,
    *,
    granularity: Granularity = "weight",
    head: tuple[str, ...] | None = None,
    rule: str = "scores",
) -> RelevantSlice:
    """Take the same share of the highest scores of every layer; of equal ones the largest weights.

    Args:
        model: The model.
        scores: As `weight_scores` gives them; layers that are not there are left out.
        share: Share of each layer's weights or channels to take, in (0, 1].
        granularity: "weight": each weight for itself. "channel": all weights that make one output neuron together, by
            the mean of their scores; at least one channel of each layer.
        head: The modules that are left out; found if None, as in `choose_slice`. () leaves none out.
        rule: What the slice is called.

    Returns:
        The slice, in which True is what was taken.

    Raises:
        ValueError: The share or the granularity is none of these.
        NonFiniteError: A score is NaN or infinite.
        LayerMismatchError: The scores are of another model.
        UnsupportedModelError: The weights cannot be ranked.
    """
    if isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"share is the part of every layer to take, in (0, 1], but got {share}.")
    if granularity not in ("weight", "channel"):
        raise ValueError(f"granularity is 'weight' or 'channel', but got {granularity!r}.")
    layers = {
        name: layer for name, layer in adapter_for(model, head).layers().items() if layer.key in scores
    }  # others did not run
    if not layers:
        raise LayerMismatchError("The scores are of none of the layers that compete. Score this model, or spare less.")
    kept = {}
    for layer in rankable_layers(layers).values():
        score = scores[layer.key]
        if score.shape != layer.shape:
            raise LayerMismatchError(
                f"The scores of '{layer.key}' have the shape {tuple(score.shape)}, but its weight has "
                f"{tuple(layer.shape)}. Score this model."
            )
        if not bool(score.isfinite().all()):
            raise NonFiniteError(f"The scores of '{layer.key}' hold NaN or infinity, which have no place in an order.")
        kept[layer.key] = _taken(layer, score.double(), share, granularity)
    return RelevantSlice(kept, share, rule, "layer", teacher_hash=weights_hash(layers))


def _taken(layer: Layer, score: Tensor, share: float, granularity: str) -> Tensor:
    magnitude = layer.weight.double().abs().cpu()
    if granularity == "weight":
        return _highest(score.flatten(), magnitude.flatten(), round(share * layer.numel)).view(layer.shape)
    rows = layer.by_output(score)
    by_channel = rows.mean(-1).flatten(), layer.by_output(magnitude).mean(-1).flatten()
    taken = _highest(*by_channel, max(1, round(share * layer.out_neurons)))
    return layer.from_output(taken.view(*rows.shape[:2], 1).expand(rows.shape))


def _highest(score: Tensor, magnitude: Tensor, count: int) -> Tensor:
    order = magnitude.argsort(stable=True, descending=True)
    order = order[score[order].argsort(stable=True, descending=True)]
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, order[:count], True)
