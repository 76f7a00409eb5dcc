"""How CONTRIB of what an operation makes becomes CONTRIB of what it reads: one rule an operation.

An effect is what the deviation of one input from its reference adds to the output's: w * dx in a weighted sum, and the
effects of all inputs add up to the relative output. An input whose effect goes where the output went inherits the sign
of the output's CONTRIB, one that goes against it the opposite, and one whose effect is dropped nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from remos_hf.adapters.flow import CASTS, Flow, Operation, changed_in, total_axes
from remos_hf.adapters.flow_layouts import factors_of
from remos_hf.errors import UnsupportedModelError
from remos_hf.layers import Layer
from remos_hf.profiling.reference import Reference
from remos_hf.slicing.contributions_kept import kept_signs, spread

# Bytes that CONTRIB of one layer's weights may take at once, sample by sample.
_BLOCK = 2**26

# Chooses effects, as `kept_signs` does: takes them, (rows, inputs), which it may overwrite, and theta.
Keep = Callable[[Tensor, float], Tensor]

# Takes a layer, the number of the first sample, and CONTRIB of its weights for some samples in a row: int32,
# (samples, groups, outputs of a group, columns).
TakeWeights = Callable[[Layer, int, Tensor], None]


@dataclass(frozen=True)
class Analysis:
    """What the rules look at.

    Attributes:
        flow: What ran.
        reference: What it deviates from.
        theta: Share of a relative output that dropped effects may add up to.
        take: Is given CONTRIB of the weights.
        keep: Chooses the effects that CONTRIB is handed down to.
    """

    flow: Flow
    reference: Reference
    theta: float
    take: TakeWeights
    keep: Keep = kept_signs

    def value(self, number: int) -> Tensor:
        """Give a value in float32."""
        return self.flow.values[number].detach().float()

    def deviation(self, number: int) -> Tensor:
        """Give how a value deviates from its reference, in float32."""
        return self.value(number) - self.reference.of(self.flow, number)


Parts = Iterator[tuple[int, Tensor]]


def _in_float32(value: Any) -> Any:  # noqa: ANN401 - arguments
    """Give arguments with the weights of half precision among them in float32, as the values are."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return changed_in(value, _in_float32)


def relative_output(operation: Operation, analysis: Analysis) -> Tensor:
    """Give what an operation makes of its inputs less what it makes of their references, in float32."""
    operation = replace(operation, **{of: _in_float32(getattr(operation, of)) for of in ("args", "kwargs")})
    now = {number: analysis.value(number) for number in operation.inputs}
    usual = {number: analysis.reference.of(analysis.flow, number) for number in operation.inputs}
    return operation.run(now) - operation.run(usual)


def _weighted(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    number, layer = operation.inputs[0], operation.layer
    _check_samples_first(operation, analysis)
    samples = analysis.flow.num_samples
    given = analysis.deviation(number)
    convolves = layer.neuron_axis == 1
    # A sample's rows follow one another, also where its positions lie on the same axis.
    given = given if convolves else given.reshape(samples, -1, layer.in_neurons)
    sums = contrib.flatten(2).transpose(1, 2) if convolves else contrib.reshape(samples, -1, layer.out_neurons)
    weights = layer.by_output(layer.weight.float()).flatten(0, 1)
    block = max(1, _BLOCK // (4 * weights.numel()))
    made = []
    for start in range(0, samples, block):
        part, some = given[start : start + block], sums[start : start + block]
        rows = patches_of(part, operation, layer) if convolves else part.flatten(0, 1)
        sample, place, neuron = some.nonzero().unbind(1)
        column = (sample * some.shape[1] + place) * layer.groups + neuron // (layer.out_neurons // layer.groups)
        into = weights.new_zeros(len(some) * len(weights), weights.shape[1])
        taken = into, sample * len(weights) + neuron
        signs = some[sample, place, neuron].float()
        found = spread(weights, rows, (neuron, column, signs), analysis.theta, taken, analysis.keep)
        analysis.take(layer, start, into.view(len(some), layer.groups, -1, weights.shape[1]).int())
        made.append((_folded(found, part, operation, layer) if convolves else found.view(part.shape)).int())
    yield number, torch.cat(made).view(analysis.flow.values[number].shape)


def _check_samples_first(operation: Operation, analysis: Analysis) -> None:
    samples = analysis.flow.num_samples
    if factors_of(analysis.flow.layouts[operation.inputs[0]])[:1] != [("n", samples)] and samples > 1:
        raise UnsupportedModelError(
            f"In what '{operation.name}' reads, samples do not lie on the first axis, so they cannot be told apart. "
            "Give batches of one sample."
        )


def _window(operation: Operation, kernel: tuple[int, ...], place: int) -> dict[str, tuple[int, int]]:
    """Give what unfold needs: kernel, stride, padding and dilation, all of two axes."""
    stride = operation.argument(place, "stride", 1 if place == 3 else None)  # a pool steps by its kernel
    padding = operation.argument(place + 1, "padding", 0)
    dilation = operation.argument(place + 2, "dilation", 1) if place == 3 or operation.rule == "max_pool" else 1
    stride = kernel if stride in (None, (), []) else stride
    if isinstance(padding, str):
        total = [size - 1 if padding == "same" else 0 for size in kernel]
        if any(one % 2 for one in total) or dilation not in (1, (1, 1), (1,)):
            raise UnsupportedModelError(f"'{operation.name}' pads by {padding!r} to unequal sides. Give numbers.")
        padding = tuple(one // 2 for one in total)
    padded = (1,) * (2 - len(kernel))
    both = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    spread_out = {key: (one,) * len(kernel) if isinstance(one, int) else tuple(one) for key, one in both.items()}
    return {key: ((0,) if key == "padding" else (1,))[: len(padded)] + one for key, one in spread_out.items()}


def patches_of(maps: Tensor, operation: Operation, layer: Layer) -> Tensor:
    """Lay a convolution's inputs out, one row a position and group. Shape (samples * positions * groups, columns)."""
    images = maps if maps.dim() == 4 else maps.unsqueeze(2)
    found = functional.unfold(images, **_window(operation, tuple(layer.shape[2:]), 3))
    return found.unflatten(1, (layer.groups, -1)).permute(0, 3, 1, 2).reshape(-1, found.shape[1] // layer.groups)


def _folded(rows: Tensor, maps: Tensor, operation: Operation, layer: Layer) -> Tensor:
    """Undo `patches_of`: add up what belongs to one input."""
    images = maps if maps.dim() == 4 else maps.unsqueeze(2)
    columns = rows.view(len(maps), -1, layer.groups * rows.shape[1]).transpose(1, 2)
    return functional.fold(columns, images.shape[2:], **_window(operation, tuple(layer.shape[2:]), 3)).view(maps.shape)


def _same(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    """Hand CONTRIB down where each output is one input, shifted or scaled by constants that have no sign."""
    number = operation.inputs[0]
    yield number, contrib.sum_to_size(analysis.flow.values[number].shape).int()


def _add(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    if len(operation.inputs) == 1:
        yield from _same(operation, contrib, analysis)
        return
    first, second = (analysis.deviation(number) for number in operation.inputs)
    scale = operation.kwargs.get("alpha", 1) * (-1 if "sub" in operation.name else 1)
    first, second = (scale * first, second) if operation.name == "rsub" else (first, scale * second)
    yield from _of_two(operation, contrib, analysis, first, second)


def _multiply(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    """Split a product exactly: (a - a0)(b + b0)/2 + (b - b0)(a + a0)/2 = ab - a0 b0."""
    if len(operation.inputs) == 1:
        factor = next((one for one in operation.args if isinstance(one, Tensor)), None)
        alive = contrib if factor is None or "div" in operation.name else contrib * (factor != 0)
        yield from _same(operation, alive, analysis)
        return
    first, second = ((analysis.value(one), analysis.reference.of(analysis.flow, one)) for one in operation.inputs)
    left = (first[0] - first[1]) * (second[0] + second[1]) / 2
    right = (second[0] - second[1]) * (first[0] + first[1]) / 2
    yield from _of_two(operation, contrib, analysis, left, right)


def _of_two(operation: Operation, contrib: Tensor, analysis: Analysis, left: Tensor, right: Tensor) -> Parts:
    effects = torch.stack([left.expand(contrib.shape), right.expand(contrib.shape)], -1).flatten(0, -2)
    signs = analysis.keep(effects, analysis.theta).int() * contrib.sign().flatten()[:, None]
    for number, one in zip(operation.inputs, signs.unbind(1), strict=True):
        yield number, one.view(contrib.shape).sum_to_size(analysis.flow.values[number].shape).int()


def _relu(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    number = operation.inputs[0]
    yield number, contrib * (analysis.flow.values[number] > 0)


def _curve(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    """Hand CONTRIB down where a neuron goes where its input went, turned around where it goes against it."""
    number = operation.inputs[0]
    went = relative_output(operation, analysis).sign() * analysis.deviation(number).sign()
    yield number, contrib * went.int()


def _total(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    number = operation.inputs[0]
    given = analysis.deviation(number)
    axes = total_axes(operation, given.dim())
    stay = [place for place in range(given.dim()) if place not in axes]
    order = (*stay, *axes)
    turned = given.permute(order)
    rows = turned.reshape(contrib.numel(), -1)
    made = _from_rows(rows, contrib.flatten(), analysis).view(turned.shape)
    yield number, made.permute([order.index(place) for place in range(given.dim())])


def _from_rows(rows: Tensor, contrib: Tensor, analysis: Analysis) -> Tensor:
    """Hand CONTRIB of sums down to the inputs of each, where all weights are one."""
    made = torch.zeros_like(rows, dtype=torch.int32)
    alive = contrib.nonzero()[:, 0]
    made[alive] = analysis.keep(rows[alive], analysis.theta).int() * contrib[alive].sign()[:, None]
    return made


def _average_pool(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    number = operation.inputs[0]
    given = analysis.deviation(number)
    window = _pooled(operation, given, contrib)
    planes = given.reshape(-1, 1, *given.shape[-2:])
    patches = functional.unfold(planes, **window)
    rows = patches.transpose(1, 2).reshape(contrib.numel(), -1)
    made = _from_rows(rows, contrib.flatten(), analysis).float()
    made = made.view(len(planes), -1, rows.shape[1]).transpose(1, 2)
    yield number, functional.fold(made, given.shape[-2:], **window).view(given.shape).int()


def _pooled(operation: Operation, given: Tensor, contrib: Tensor) -> dict[str, tuple[int, int]]:
    if operation.name == "adaptive_avg_pool2d":
        if any(size % out for size, out in zip(given.shape[-2:], contrib.shape[-2:], strict=True)):
            raise UnsupportedModelError(
                f"'{operation.name}' from {tuple(given.shape[-2:])} to {tuple(contrib.shape[-2:])} has windows of "
                "unequal size, for which there is no rule. Give inputs of another size."
            )
        kernel = tuple(size // out for size, out in zip(given.shape[-2:], contrib.shape[-2:], strict=True))
        return {"kernel_size": kernel, "stride": kernel, "padding": (0, 0), "dilation": (1, 1)}
    asked = operation.argument(1, "kernel_size")
    window = _window(operation, (asked, asked) if isinstance(asked, int) else tuple(asked), 2)
    positions = functional.unfold(given[:1, :1], **window).shape[-1]
    if positions != contrib.shape[-2:].numel():
        raise UnsupportedModelError(f"'{operation.name}' with ceil_mode has no rule. Pool without it.")
    return window


def _max_pool(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    """Hand CONTRIB down to all that are the largest of their window."""
    number = operation.inputs[0]
    value = analysis.value(number)
    window = _pooled(operation, value, contrib)
    high, wide = window["padding"]
    padded = functional.pad(value.reshape(-1, 1, *value.shape[-2:]), (wide, wide, high, high), value=-math.inf)
    window = {**window, "padding": (0, 0)}
    patches = functional.unfold(padded, **window)
    largest = patches == patches.amax(1, keepdim=True)
    made = functional.fold(largest * contrib.reshape(len(padded), 1, -1).float(), padded.shape[-2:], **window)
    made = made[..., high : made.shape[-2] - high, wide : made.shape[-1] - wide]
    yield number, made.reshape(value.shape).int()


def _mixed(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    """Treat a product with a constant matrix on the left, as the pattern of attention, as a weighted sum."""
    number = operation.inputs[0]
    yield number, _through(operation.args[0].float(), analysis.deviation(number), contrib, analysis)


def _through(pattern: Tensor, given: Tensor, contrib: Tensor, analysis: Analysis) -> Tensor:
    """Hand CONTRIB of pattern @ given down to `given`. Shapes (..., t, s), (..., s, d) and (..., t, d)."""
    many, width = given.shape[:-2].numel(), given.shape[-1]
    pattern = pattern.detach().expand(*given.shape[:-2], *pattern.shape[-2:])
    place, column, target = contrib.reshape(many, -1, width).transpose(1, 2).nonzero().unbind(1)
    sums = (place * contrib.shape[-2] + target, place * width + column)
    signs = contrib.reshape(many, -1, width)[place, target, column].float()
    turned = given.transpose(-1, -2)
    rows = turned.reshape(-1, turned.shape[-1])
    columns = pattern.reshape(-1, pattern.shape[-1])
    made = spread(columns, rows, (*sums, signs), analysis.theta, None, analysis.keep)
    return made.view(turned.shape).transpose(-1, -2).int()


def _attention(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    """Freeze the pattern of attention and hand CONTRIB down to the values."""
    number = operation.inputs[0]
    given = analysis.deviation(number)
    identity = torch.eye(given.shape[-2], dtype=analysis.flow.values[number].dtype, device=given.device)
    pattern = operation.run({number: identity.expand(*given.shape[:-1], -1)}).float()
    shared = pattern.shape[-3] // given.shape[-3]  # queries that share a value
    made = _through(pattern, given.repeat_interleave(shared, -3), contrib, analysis)
    yield number, made.unflatten(-3, (-1, shared)).sum(-3, dtype=torch.int32)


def _moved(operation: Operation, contrib: Tensor, analysis: Analysis) -> Parts:
    """Hand CONTRIB back to where each output was copied from."""
    numbers = list(dict.fromkeys(operation.inputs))
    if operation.name in CASTS:  # not by a gradient, which would be rounded to the other dtype
        yield numbers[0], contrib.to(analysis.flow.values[numbers[0]].device)
        return
    with torch.enable_grad():
        given = {one: analysis.flow.values[one].detach().double().requires_grad_() for one in numbers}
        found = torch.autograd.grad(operation.run(given), list(given.values()), contrib.double(), allow_unused=True)
    for number, one in zip(numbers, found, strict=True):
        if one is not None:  # its shape or dtype alone was looked at
            yield number, one.int()


RULES: Mapping[str, Callable[[Operation, Tensor, Analysis], Parts]] = {
    "weighted": _weighted,
    "same": _same,
    "add": _add,
    "multiply": _multiply,
    "relu": _relu,
    "curve": _curve,
    "total": _total,
    "average_pool": _average_pool,
    "max_pool": _max_pool,
    "mixed": _mixed,
    "attention": _attention,
    "moved": _moved,
}
