"""How a flow is noted while a model runs.

The model runs once, and every torch function that it calls on what depends on the batch is noted, whoever calls it: a
module, a plus sign, a view. So one mechanism serves convolutional nets and transformers. What scales a whole sample
(the pattern of attention, the divisor of a norm) counts as a constant.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from remos_hf.activations import watch_calls, watch_functions
from remos_hf.adapters.base import Adapter, inputs_of
from remos_hf.adapters.flow import CASTS, Flow, Held, Operation, changed_in, filled, total_axes
from remos_hf.adapters.flow_layouts import Layout, axis, broadcast, factors_of, layout_of_input, layout_of_view, resized
from remos_hf.adapters.sequences import LABEL_KEYS
from remos_hf.adapters.sequences import Sequence as RealPositions
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.layers import Layer, adapter_parts, sliceable_layers, why_not_rankable

# What gives one number for a whole sample or position, by which others are scaled.
_FROZEN = frozenset({"softmax", "log_softmax", "rsqrt", "sqrt", "var", "std", "norm", "linalg_norm", "vector_norm"})
_RULES = {
    "weighted": ("linear", "conv1d", "conv2d", "addmm"),
    "same": (
        "batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "dropout", "dropout1d", "dropout2d",
        "detach", "neg",
    ),
    "add": ("add", "radd", "iadd", "sub", "isub", "rsub", "subtract"),
    "multiply": ("mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "divide", "true_divide"),
    "relu": ("relu",),
    "curve": (
        "gelu", "silu", "tanh", "sigmoid", "hardtanh", "relu6", "clamp", "clip", "hardswish", "hardsigmoid", "pow",
        "leaky_relu", "elu", "selu", "celu", "softplus", "mish", "exp", "square", "abs",
    ),
    "total": ("mean", "sum"),
    "average_pool": ("avg_pool2d", "adaptive_avg_pool2d"),
    "max_pool": ("max_pool2d",),
    "mixed": ("matmul", "bmm"),
    "attention": ("scaled_dot_product_attention",),
    "moved": (
        "view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "swapaxes", "squeeze",
        "unsqueeze", "getitem", "expand", "expand_as", "view_as", "chunk", "split", "unbind", "narrow", "select", "t",
        "T", "mT", "cat", "concat", "stack", "pad", "flip", "roll", "repeat", "repeat_interleave", "masked_fill",
        "where", "index_select", "tensor_split", "contiguous", "clone", *CASTS,
    ),
}  # fmt: skip
_RULE_OF = {name: rule for rule, names in _RULES.items() for name in names}
_SAME_AXES = (
    "cat", "concat", "pad", "flip", "roll", "masked_fill", "where", "repeat", "repeat_interleave", "index_select",
    "contiguous", "clone", *CASTS,
)  # fmt: skip
# What tokens are given as. Whole numbers of other kinds are pixels that were not converted.
_IDS = frozenset({torch.int64, torch.int32, torch.bool})
_IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "setitem"})


def flow_of(model: nn.Module, batch: Any, *, graph: bool = False) -> Flow:  # noqa: ANN401 - any batch
    """Run a model once and give the operations that made its logits.

    Args:
        model: The model, in eval mode.
        batch: A batch on the model's device; labels are left out.
        graph: Whether values keep their graph, for gradients of the logits.

    Raises:
        ValueError: The model is in training mode, or the batch holds no sample or is not of its dtype.
        UnsupportedModelError: An adapter is inside the model, it gives no logits, or it runs an operation that is not
            known here, or on a weight that is none of its plain parameters.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("The model is in training mode, where dropout and norms change what flows. Call model.eval().")
    _refuse_adapters(model)
    adapter = adapter_for(model, ())
    with torch.set_grad_enabled(graph), recording(adapter, batch) as recorder:
        adapter.forward(batch)
    return recorder.flow()


@contextmanager
def recording(adapter: Adapter, batch: Any) -> Iterator["Recorder"]:  # noqa: ANN401 - any batch
    """Note what the model does with a batch while the block runs it.

    Yields:
        The recorder, which gives the flow after the block.

    Raises:
        ValueError: The batch holds no sample, or is not of the model's dtype.
        UnsupportedModelError: An adapter is inside the model.
    """
    model = adapter.model
    _refuse_adapters(model)
    curves = {name: one for name, one in model.named_modules() if type(one).__module__ == "transformers.activations"}
    recorder = Recorder(adapter, batch, {type(one).__name__ for one in curves.values()})
    with watch_calls({"": model}, recorder.take_output), watch_functions(recorder.run, curves):
        yield recorder


class Recorder:
    """Notes operations while a model runs.

    Args:
        adapter: The model's.
        batch: What it runs on.
        curves: Names of functions that work neuron by neuron, beside those that are known.
    """

    def __init__(self, adapter: Adapter, batch: Any, curves: Collection[str]) -> None:  # noqa: ANN401 - any batch
        self.model = adapter.model
        self._rules = {**_RULE_OF, **dict.fromkeys(curves, "curve")}
        self._layers = {
            id(layer.parameter): layer for layer in sliceable_layers(self.model).values() if layer.index is None
        }
        self._operations: list[Operation] = []
        self._values: dict[int, Tensor] = {}
        self._layouts: dict[int, Layout] = {}
        self._numbers: dict[int, int] = {}  # by id of a tensor that `_values` keeps alive
        self._copies: list[Tensor] = []
        self._output: Any = None
        self._given: dict[int, str] = {}
        self._embedded: dict[int, str] = {}
        self._parameters = {id(one): name for name, one in self.model.named_parameters()}
        inputs = _inputs(batch)
        self.num_samples = len(next(iter(inputs.values())))
        if not self.num_samples:
            raise ValueError("A batch holds no sample, so nothing flows. Leave it out.")
        for key, tensor in inputs.items():
            if tensor.dtype not in _IDS:
                _check_dtype(tensor, self.model)
                self._given[self._add(tensor, layout_of_input(tensor.shape))] = key
        self._real = _real(adapter.sequences(batch))

    def _add(self, tensor: Tensor, layout: Layout) -> int:
        number = len(self._values)
        self._values[number], self._layouts[number] = tensor, layout
        self._numbers[id(tensor)] = number
        return number

    def take_output(self, _: str, args: tuple, kwargs: dict, output: Any) -> None:  # noqa: ANN401 - any output
        """Take what the model returned."""
        found = output.get("logits") if isinstance(output, Mapping) else output
        self._output = found[0] if isinstance(found, (tuple, list)) else found

    def run(self, function: Callable, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401 - whatever it returns
        """Call a function for the model, and note it if it works on what flows."""
        name = _name_of(function)
        if name == "embedding":
            made = function(*args, **kwargs)
            roles = "n" + "p" * (made.dim() - 2) if made.dim() > 2 else "p"
            entries = [axis(role, size) for role, size in zip(roles, made.shape, strict=False)]
            number = self._add(made, (*entries, axis("f", made.shape[-1])))
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            self._embedded[number] = self._parameters.get(id(weight), "an embedding")
            return made
        # The pattern of attention is a constant: of its arguments the values are followed alone.
        attends = _RULE_OF.get(name) == "attention"
        followed = (args[2:3], kwargs.get("value")) if attends else (args, kwargs)
        found = [] if name in _FROZEN else _found(followed, self._numbers)
        if not found:
            return function(*args, **kwargs)
        held = {key: number for key, number in self._numbers.items() if number in found}
        kept = _held(args, held), _held(kwargs, held)
        in_place = _is_in_place(function, args, kwargs)
        if in_place:
            self._save_before(args[0])
        made = function(*args, **kwargs)
        rule = self._rules.get(name, "")
        operation = self._ruled(Operation(name, rule, function, *kept, tuple(found), -1, in_place=in_place))
        if in_place:
            self._note_written(operation, args[0], made)
        if operation.layer is not None and torch.is_grad_enabled():
            # What is written over the copy leaves the value whose gradient will be asked for as it is.
            self._note(operation, made)
            self._copies.append(made.clone())
            self._numbers[id(self._copies[-1])] = self._numbers[id(made)]
            return self._copies[-1]
        several = isinstance(made, (tuple, list))
        for piece, tensor in enumerate(made if several else [made]):
            # What is complex comes back as real numbers: without it a way to the logits would be missing unseen.
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                self._note(replace(operation, piece=piece if several else None), tensor)
        return made

    def _save_before(self, target: Tensor) -> None:
        """Keep the value that is about to be overwritten; what other views of it hold is followed no further."""
        for other, value in list(self._values.items()):
            if value.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
                self._values[other] = value.clone()
                if value is not target:
                    stale = self._add(value, self._layouts[other])
                    name = "a view of what was overwritten in place"
                    self._operations.append(Operation(name, "", torch.clone, (), {}, (), stale))

    def _note_written(self, operation: Operation, target: Tensor, made: Any) -> None:  # noqa: ANN401 - as it returned
        """Note what holds the result beside what the function returned: else a way to the logits would go unseen."""
        written = [] if made is target else [target]  # an assignment to a part returns nothing
        written += [] if target._base is None or id(target._base) in self._numbers else [target._base]
        for tensor in written:
            self._note(replace(operation, rule=""), tensor)

    def _note(self, operation: Operation, made: Tensor) -> None:
        layout = _layout(operation, self._values, self._layouts, made) if operation.rule else None
        if layout is None:
            operation, layout = replace(operation, rule=""), layout_of_input(made.shape)
        self._operations.append(replace(operation, output=self._add(made, layout)))

    def _ruled(self, operation: Operation) -> Operation:
        """Give the operation with the layer that it multiplies with, and without a rule that does not fit it."""
        name, rule = operation.name, operation.rule
        if rule == "weighted":
            return self._weighted(operation)
        one = len(set(operation.inputs)) == 1
        fits = {
            "multiply": not ("div" in name and _found(operation.args[1:], {})),
            "mixed": not _found(operation.args[:1], {}),
            "add": True,
            "moved": True,
        }
        return operation if fits.get(rule, one) else replace(operation, rule="")

    def _weighted(self, operation: Operation) -> Operation:
        turned = operation.name == "addmm"
        names = ("mat1", "mat2") if turned else ("input", "weight")
        given, weight = (operation.argument(place, name) for place, name in enumerate(names, int(turned)))
        layer = self._layers.get(id(weight))
        if layer is None or layer.inputs_first != turned or not isinstance(given, Held) or len(operation.inputs) > 1:
            return replace(operation, rule="", name=f"{operation.name} with a weight that is no plain parameter")
        samples, *others = self._values[given.number].shape
        if layer.neuron_axis == 1 and len(others) == 2 and given.number in self._given:
            self._layouts[given.number] = (axis("n", samples), axis("f", others[0]), axis("p", others[1]))
        return replace(operation, layer=layer, name=f"{operation.name} {layer.parameter_name}")

    def flow(self) -> Flow:
        """Give what led to the logits.

        Raises:
            UnsupportedModelError: There are no logits that were followed, or an operation on the way is not known.
        """
        output = self._numbers.get(id(self._output))
        made_by = {operation.output: operation for operation in self._operations}
        if output is None or output not in made_by:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gave {type(self._output).__name__} that no operation we follow made from "
                "the batch. A flow ends at logits: give a model with a head, and let it end before its softmax."
            )
        wanted, stack = set(), [output]
        while stack:
            number = stack.pop()
            if number in wanted:
                continue
            wanted.add(number)
            stack += made_by[number].inputs if number in made_by else ()
        for operation in self._operations:
            if operation.output in wanted:
                _check_known(operation)
        new = {number: place for place, number in enumerate(sorted(wanted))}
        sources = {**self._given, **self._embedded}
        return Flow(
            tuple(_renumbered(one, new) for one in self._operations if one.output in wanted),
            {place: self._values[number] for number, place in new.items()},
            {place: self._layouts[number] for number, place in new.items()},
            new[output],
            self.num_samples,
            self._real,
            {new[number]: name for number, name in sources.items() if number in new},
        )


def on_device_of(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - any batch
    """Put a batch on the model's device; a model without parameters, as a quantised one, gets it as it is."""
    parameter = next(model.parameters(), None)
    return batch if parameter is None else send_to_device(batch, parameter.device)


def _refuse_adapters(model: nn.Module) -> None:
    found = adapter_parts(model)
    if found:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds adapters ({found[0]}, ...), and a flow needs the weights that run. Merge "
            "them first: model.merge_and_unload()."
        )


def _check_known(operation: Operation) -> None:
    if operation.rule and not (operation.layer and why_not_rankable(operation.layer)):
        return
    if operation.rule:
        raise UnsupportedModelError(
            f"'{operation.layer.parameter_name}' is no plain weight: {why_not_rankable(operation.layer)}"
        )
    raise UnsupportedModelError(
        f"The model runs '{operation.name}' on its way to the logits, and no rule says how what it reads contributes "
        f"there. Known are {', '.join(sorted(_RULE_OF))}."
    )


def _renumbered(operation: Operation, new: Mapping[int, int]) -> Operation:
    inputs = tuple(new[number] for number in operation.inputs)
    swapped = {number: Held(new[number]) for number in operation.inputs}
    return replace(
        operation,
        inputs=inputs,
        output=new[operation.output],
        args=filled(operation.args, swapped),
        kwargs=filled(dict(operation.kwargs), swapped),
    )


def _inputs(batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 - any batch
    named = batch if isinstance(batch, Mapping) else {"input": inputs_of(batch)}
    hidden = {key for key in named if key in LABEL_KEYS or str(key).endswith("mask")}
    found = {
        str(key): value
        for key, value in named.items()
        if isinstance(value, Tensor) and value.dim() and key not in hidden
    }
    if not found:
        raise ValueError(f"A batch holds tensors of samples, but this one holds {list(named) or 'nothing'}.")
    return found


def _check_dtype(tensor: Tensor, model: nn.Module) -> None:
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), tensor.dtype)
    if tensor.dtype != dtype:
        raise ValueError(f"The samples are {tensor.dtype}, but the model is {dtype}. Convert them: batch.to({dtype}).")


def _real(found: Mapping[str, RealPositions]) -> Tensor | None:
    masks = [one.real for one in found.values() if one.real is not None]
    if len(found) > 1 and masks:
        raise UnsupportedModelError("The model reads several sequences with padding, which cannot be told apart here.")
    return masks[0] if masks and not bool(masks[0].all()) else None


def _name_of(function: Callable) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":  # of an attribute, such as .real
        name = function.__self__.__name__
    return name.strip("_")


@lru_cache(maxsize=256)
def _signature(function: Callable) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):  # written in C, where what works in place has a name of its own
        return None


def _is_in_place(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        return True
    signature = _signature(function)
    if signature is None or "inplace" not in signature.parameters:
        return bool(kwargs.get("inplace"))
    return bool(signature.bind(*args, **kwargs).arguments.get("inplace"))


def _found(value: Any, numbers: Mapping[int, int]) -> list[int]:  # noqa: ANN401 - arguments
    """Give the numbers of the values among some arguments, each as often as it is there."""
    if isinstance(value, Held):
        return [value.number]
    if isinstance(value, Tensor):
        return [numbers[id(value)]] if id(value) in numbers else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [number for one in value for number in _found(one, numbers)]


def _held(value: Any, numbers: Mapping[int, int]) -> Any:  # noqa: ANN401 - arguments
    if isinstance(value, Tensor):
        return Held(numbers[id(value)]) if id(value) in numbers else value
    return changed_in(value, lambda one: _held(one, numbers))


def _layout(
    operation: Operation, values: Mapping[int, Tensor], layouts: Mapping[int, Layout], made: Tensor
) -> Layout | None:
    """Give the layout of what an operation made; None if it cannot be told."""
    first = layouts[operation.inputs[0]]
    if operation.layer is not None:
        return _layout_of_weighted(first, operation.layer, made)
    if operation.rule == "total":
        return _layout_of_total(operation, first, made)
    if operation.rule in ("average_pool", "max_pool"):
        return (*first[:-2], *(axis("p", size) for size in made.shape[-2:]))
    if operation.rule in ("attention", "mixed"):
        lead = (resized(entry, size) for entry, size in zip(first[:-2], made.shape[:-2], strict=True))
        return (*lead, axis("p", made.shape[-2]), first[-1])
    if operation.rule == "moved":
        shapes = {number: values[number].shape for number in operation.inputs}
        return _layout_of_moved(operation, first, shapes, made)
    return broadcast([layouts[number] for number in operation.inputs], made.shape)


def _layout_of_weighted(first: Layout, layer: Layer, made: Tensor) -> Layout:
    if layer.neuron_axis == -1:
        return (*first[:-1], axis("f", made.shape[-1]))
    return (first[0], axis("f", made.shape[1]), *(axis("p", size) for size in made.shape[2:]))


def _layout_of_total(operation: Operation, first: Layout, made: Tensor) -> Layout | None:
    gone = total_axes(operation, len(first))
    if made.dim() == len(first):
        return tuple(() if place in gone else entry for place, entry in enumerate(first))
    return tuple(entry for place, entry in enumerate(first) if place not in gone)


def _layout_of_moved(
    operation: Operation, first: Layout, shapes: Mapping[int, Sequence[int]], made: Tensor
) -> Layout | None:
    if operation.name in _SAME_AXES and len(first) == made.dim():
        return tuple(resized(entry, size) for entry, size in zip(first, made.shape, strict=True))
    if _picks(operation):  # one row of each sample, as the last token of each text
        fits = factors_of(first)[:1] == [("n", len(made))] or len(made) == 1
        return (first[0], *first[len(first) - made.dim() + 1 :]) if fits and made.dim() < len(first) else None
    if operation.name in (*_SAME_AXES, "stack"):
        return None
    number = operation.inputs[0]
    # Beside what is moved, it may read a tensor whose shape it takes.
    others = {one: torch.empty(tuple(shape), device="meta") for one, shape in shapes.items() if one != number}
    return layout_of_view(first, shapes[number], lambda given: operation.run({number: given, **others}))


def _picks(operation: Operation) -> bool:
    index = operation.argument(1, "index")
    return operation.name == "getitem" and any(
        isinstance(one, (Tensor, list)) for one in (index if isinstance(index, tuple) else (index,))
    )
