"""All that may be said of an explanation, in sentences as data."""

from collections.abc import Sequence
from dataclasses import dataclass

from remos_hf.judging.tables import Table
from remos_hf.judging.words import count_told, listed, name_told
from remos_hf.slicing.explanation import Explanation, LayerFlow, NeuronFlow

_MOST_NAMED = 3  # tokens for, and as many against
_ROUNDING = 1e-5
_EVEN = 0.1  # of a layer's contributions: less than this left over is no direction
_KINDS = {
    "global": "the mean",
    "class": "the mean of what the model says the same of",
    "position": "the mean by position",
}


@dataclass(frozen=True)
class Explained:
    """What an explanation comes to.

    Attributes:
        answer: In a sentence or two.
        limits: What the numbers mean, and what they do not say.
        can_be_said: Whether anything flows to the label that was asked about.
        glance: The one table of it, a line a layer, in the order in which they run.
    """

    answer: str
    limits: list[str]
    can_be_said: bool
    glance: Table


def explained(explanation: Explanation, *, tokens: Sequence[tuple[str, int]] = (), source: str = "") -> Explained:
    """Say what an explanation comes to.

    Args:
        explanation: As `explain` gives it.
        tokens: Of a text, each with its contribution.
        source: Of the samples that the reference is the mean of, for the sentence; "" if they have no name.
    """
    weights = sum(one.weights for one in explanation.layers)
    in_slice = sum(one.in_slice for one in explanation.layers)
    flows = in_slice > 0 and not _is_the_reference(explanation)
    answer = [_says(explanation)]
    if flows:
        answer.append(f"Of {weights:,} weights, {100 * in_slice / weights:.1f}\N{NO-BREAK SPACE}% contribute to it.")
    else:
        answer.append("There is nothing to trace: to the logit this input is what it is compared with.")
    if tokens and flows:
        answer.append(_of_tokens(tokens))
    return Explained(" ".join(answer), _limits(explanation, source), flows, _glance(explanation))


def _is_the_reference(explanation: Explanation) -> bool:
    """Whether the logit lies where the reference puts it, to within rounding: then so do the signs of all effects."""
    found = explanation.relative_logit
    return found is not None and abs(found) <= _ROUNDING * max(1, abs(explanation.logits[explanation.label]))


def class_told(explanation: Explanation, label: int) -> str:
    """Name a label: by its name, or by its number."""
    return f"“{name_told(explanation.labels[label])}”" if label < len(explanation.labels) else f"label {label}"


def neuron_told(one: NeuronFlow) -> str:
    """Write a neuron with what flows through it, above and below 0."""
    parts = [signed_told(value) for value in (one.positive, one.negative) if value]
    return f"{one.neuron}: {' '.join(parts)}"


def signed_told(value: int) -> str:
    """Write a contribution with its sign."""
    return f"{value:+,}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _says(explanation: Explanation) -> str:
    logits, label = explanation.logits, explanation.label
    order = sorted(range(len(logits)), key=lambda one: -logits[one])
    asked = class_told(explanation, label)
    if len(logits) == 1:
        said = f"The model's one logit is {_logit(logits[0])}"
    elif order[0] == label:
        said = f"The model says {asked}: its logit is {_logit(logits[label])}, "
        said += f"the next one, of {class_told(explanation, order[1])}, {_logit(logits[order[1]])}"
    else:
        said = f"Asked about is {asked}, with the logit {_logit(logits[label])}; the model says "
        said += f"{class_told(explanation, order[0])}, with {_logit(logits[order[0]])}"
    if explanation.relative_logit is None:
        return f"{said}."
    side = "above" if explanation.relative_logit >= 0 else "below"
    return (
        f"{said}. The logit asked about lies {abs(explanation.relative_logit):.2f} {side} what the head makes of the "
        "reference."
    )


def _logit(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _of_tokens(tokens: Sequence[tuple[str, int]]) -> str:
    first = sorted(tokens, key=lambda one: -abs(one[1]))
    parts = []
    for word, sign in (("Most of it from", 1), ("Most against it from", -1)):
        named = [f"“{name_told(token)}” ({signed_told(value)})" for token, value in first if sign * value > 0]
        if named:
            parts.append(f"{word} {listed(named[:_MOST_NAMED])}.")
    return " ".join(parts) or "None of it comes from the tokens."


def _limits(explanation: Explanation, source: str) -> list[str]:
    went = "the way it went from the reference"
    if explanation.relative_logit is not None:
        went = "up, as it went" if explanation.relative_logit >= 0 else "down, as it went"
    if explanation.reference == "zero":
        compared = (
            "Everything is compared with zero, since no data was given for a reference: what all inputs have in common "
            "counts too. Give data of the task (`--data`) to compare with what the model usually reads."
        )
    else:
        of = f"{count_told(explanation.reference_samples, 'sample')}{f' of {name_told(source)}' if source else ''}"
        compared = f"Everything is compared with {_KINDS[explanation.reference]}, over {of}."
    return [
        f"A positive contribution helped to move the logit {went}; a negative one worked against it.",
        compared,
        "A contribution counts signs of effects, one for each sum in which an effect is kept, and not their sizes. "
        "Layers are compared by their shares, not by their sums.",
        *_cancelling(explanation),
        f"Of every sum, the smallest effects that together stay under {100 * explanation.theta:g} % of it are left out "
        "(theta).",
        "What attention looks at and what norms divide by are taken as given, so queries and keys contribute nothing.",
        "This says what the numbers flowed through. That the model would say something else without a strong token or "
        "pixel does not follow.",
    ]


def _cancelling(explanation: Explanation) -> list[str]:
    """Say in how many layers the signs tell next to nothing."""
    total = [one for one in explanation.layers if one.positive - one.negative]
    even = [one for one in total if abs(one.positive + one.negative) < _EVEN * (one.positive - one.negative)]
    if not even:
        return []
    return [
        f"In {len(even)} of {count_told(len(total), 'layer')}, positive and negative contributions cancel to within "
        f"{100 * _EVEN:g} %: through many layers signs are mixed, and there the sign of one neuron, pixel or token "
        "says little."
    ]


def _glance(explanation: Explanation) -> Table:
    header = ("layer", "positive", "negative", "neurons reached", "weights in slice", "strongest neurons")
    return Table(
        "What flows through each layer, from the input on",
        header,
        [_line(one) for one in explanation.layers],
    )


def _line(one: LayerFlow) -> list[str]:
    return [
        one.name.removesuffix(".weight"),
        signed_told(one.positive),
        signed_told(one.negative),
        f"{one.reached:,} of {one.neurons:,}",
        f"{100 * one.in_slice / one.weights:.1f} %",
        "; ".join(neuron_told(neuron) for neuron in one.strongest[:_MOST_NAMED]) or "-",
    ]
