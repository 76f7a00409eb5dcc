"""The flow of a batch through a model: the operations that made its logits, with what each read and made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from remos_hf.adapters.flow_layouts import Layout
from remos_hf.layers import Layer

# What gives the same values in another dtype or on another device.
CASTS = ("to", "float", "half", "bfloat16", "double", "type_as")


@dataclass(frozen=True)
class Held:
    """Stands for a value of the flow among an operation's arguments."""

    number: int


@dataclass(frozen=True)
class Operation:
    """One call of a torch function.

    Attributes:
        name: What it is called, with the parameter that it reads.
        rule: Which rule it follows, by name; "" if it is not known.
        function: The function.
        args: Its arguments; `Held` stands for values of the flow.
        kwargs: Likewise.
        inputs: Numbers of the values that it reads.
        output: Number of the value that it makes.
        layer: The layer whose weight it multiplies with.
        piece: Which of several tensors that the function returns is the output; None if it returns one.
        in_place: Whether the function writes over what it reads.
    """

    name: str
    rule: str
    function: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    inputs: tuple[int, ...]
    output: int
    layer: Layer | None = None
    piece: int | None = None
    in_place: bool = False

    def run(self, values: Mapping[int, Tensor]) -> Tensor:
        """Give what the operation makes of other values, which stay as they are."""
        if self.in_place:
            values = {number: values[number].clone() for number in self.inputs}
        made = self.function(*filled(self.args, values), **filled(dict(self.kwargs), values))
        return made if self.piece is None else made[self.piece]

    def argument(self, place: int, name: str, default: Any = None) -> Any:  # noqa: ANN401 - as it was called
        """Give an argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Flow:
    """The operations between a batch and the logits, in the order they ran, and their values.

    Attributes:
        operations: Those on which the logits depend.
        values: What was given and made, by number.
        layouts: Where samples, positions and neurons lie in each.
        output: Number of the logits.
        num_samples: Samples of the batch.
        real: Bool, (samples, positions), False at padding; None if all positions are real.
        source_names: What each of `sources` is: a key of the batch ("input" of one without keys), or the
            parameter of the embedding that gave it.
    """

    operations: tuple[Operation, ...]
    values: Mapping[int, Tensor]
    layouts: Mapping[int, Layout]
    output: int
    num_samples: int
    real: Tensor | None
    source_names: Mapping[int, str] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """Shape (samples, labels), or (samples, positions, labels)."""
        return self.values[self.output]

    @cached_property
    def made_by(self) -> Mapping[int, Operation]:
        """The operation that made each value, but inputs of the batch and what embeddings gave."""
        return {operation.output: operation for operation in self.operations}

    @property
    def sources(self) -> tuple[int, ...]:
        """Numbers of the values that no operation made."""
        return tuple(number for number in self.values if number not in self.made_by)

    @cached_property
    def places(self) -> Mapping[int, int]:
        """Place of each value among those that were computed, not moved: the same in all batches of one model."""
        computed = [one for one in self.values if one not in self.made_by or self.made_by[one].rule != "moved"]
        return {number: place for place, number in enumerate(computed)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What was computed, in order."""
        return tuple(self.made_by[one].name if one in self.made_by else "input" for one in self.places)


def total_axes(operation: Operation, count: int) -> tuple[int, ...]:
    """Give the axes over which a sum or a mean runs."""
    asked = operation.argument(1, "dim", operation.kwargs.get("axis"))
    if asked is None:
        return tuple(range(count))
    return tuple(one % count for one in ([asked] if isinstance(asked, int) else asked))


def filled(value: Any, values: Mapping[int, Any]) -> Any:  # noqa: ANN401 - arguments
    """Give arguments in which values stand where `Held` did."""
    if isinstance(value, Held):
        return values[value.number]
    return changed_in(value, lambda one: filled(one, values))


def changed_in(value: Any, change: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - arguments
    """Give a tuple, list or dict with what it holds changed; anything else as it is."""
    if isinstance(value, dict):
        return {key: change(one) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(change(one) for one in value)
    return value
