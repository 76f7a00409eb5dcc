"""Contributions one neuron at a time, written from the rules of the paper: for tests, and for the speed benchmark.

It takes from the package which operations ran, and nothing else: effects, theta, signs and sums are its own.
"""

import itertools
import math

import numpy as np
import torch


def kept(effects, theta):
    """The inputs that stay after the maximum number of smallest effects is dropped; equal effects stay together."""
    total = math.fsum(effects)
    order = sorted(range(len(effects)), key=lambda place: abs(effects[place]))
    dropped, running = 0, 0.0
    for count, place in enumerate(order, start=1):
        running += effects[place]
        alone = count == len(order) or abs(effects[order[count]]) != abs(effects[place])
        if alone and abs(running) < theta * abs(total):
            dropped = count
    return order[dropped:], total


def signs_of(effects, theta, contrib):
    places, total = kept(effects, theta)
    return [(place, int(np.sign(effects[place]) * np.sign(total) * np.sign(contrib))) for place in places]


def slow_contributions(flow, reference, seeds, theta):
    """Weights' contributions by parameter name, summed over samples, and those of every value."""
    values = {number: value.detach().numpy() for number, value in flow.values.items()}
    usual = {}
    contribs = {flow.output: seeds.numpy().astype(np.int64)}
    weights = {}
    for operation in reversed(flow.operations):
        made = contribs.pop(operation.output, None)
        if made is None:
            continue
        for number in set(operation.inputs):
            if operation.rule not in ("moved", "same", "relu", "max_pool"):
                usual[number] = values[number] - reference.of(flow, number).numpy()
        for number, part in RULES[operation.rule](operation, made, values, usual, theta, weights):
            contribs[number] = contribs.get(number, 0) + part
    return weights, contribs


def _linear(operation, made, values, deviations, theta, weights):
    number = operation.inputs[0]
    given, parameter = deviations[number], operation.layer.parameter.detach().numpy()
    matrix = parameter.T if operation.layer.inputs_first else parameter
    down, total = np.zeros(given.shape, np.int64), np.zeros(matrix.shape, np.int64)
    for where in np.argwhere(made):
        *row, neuron = where
        effects = [float(one) for one in matrix[neuron] * given[tuple(row)]]
        for place, sign in signs_of(effects, theta, made[tuple(where)]):
            down[(*row, place)] += sign
            total[neuron, place] += sign
    _add(weights, operation, total.T if operation.layer.inputs_first else total)
    yield number, down


def _conv(operation, made, values, deviations, theta, weights):
    number, module = operation.inputs[0], operation.layer.module
    given, parameter = deviations[number], operation.layer.parameter.detach().numpy()
    down, total = np.zeros(given.shape, np.int64), np.zeros(parameter.shape, np.int64)
    outputs, inputs = parameter.shape[0] // module.groups, parameter.shape[1]
    for sample, neuron, top, left in np.argwhere(made):
        first = neuron // outputs * inputs
        places, effects = [], []
        for channel, down_by, right_by in itertools.product(*map(range, parameter.shape[1:])):
            high = top * module.stride[0] + down_by * module.dilation[0] - module.padding[0]
            wide = left * module.stride[1] + right_by * module.dilation[1] - module.padding[1]
            if 0 <= high < given.shape[2] and 0 <= wide < given.shape[3]:
                places.append(((channel, down_by, right_by), (sample, first + channel, high, wide)))
                effects.append(float(parameter[neuron, channel, down_by, right_by] * given[places[-1][1]]))
        for place, sign in signs_of(effects, theta, made[sample, neuron, top, left]):
            total[(neuron, *places[place][0])] += sign
            down[places[place][1]] += sign
    _add(weights, operation, total)
    yield number, down


def _weighted(operation, *others):
    return (_conv if operation.layer.neuron_axis == 1 else _linear)(operation, *others)


def _add(weights, operation, total):
    name = operation.layer.parameter_name
    weights[name] = weights.get(name, 0) + total


def _same(operation, made, values, *_):
    yield operation.inputs[0], made


def _relu(operation, made, values, *_):
    yield operation.inputs[0], made * (values[operation.inputs[0]] > 0)


def _residual(operation, made, values, deviations, theta, weights):
    if len(operation.inputs) == 1:
        yield operation.inputs[0], made
        return
    parts = [np.zeros(made.shape, np.int64) for _ in operation.inputs]
    for where in map(tuple, np.argwhere(made)):
        effects = [float(np.broadcast_to(deviations[number], made.shape)[where]) for number in operation.inputs]
        for place, sign in signs_of(effects, theta, made[where]):
            parts[place][where] += sign
    for number, part in zip(operation.inputs, parts, strict=True):
        shape = values[number].shape
        gone = tuple(axis for axis, size in enumerate(shape) if size != part.shape[axis])
        yield number, part.sum(gone, keepdims=True)


def _windows(operation, shape, out):
    kernel, stride, padding = operation.argument(1, "kernel_size"), operation.argument(2, "stride"), 0
    if operation.name == "adaptive_avg_pool2d":
        kernel = stride = shape[2] // out[2]
    else:
        padding = operation.argument(3, "padding", 0)
    stride = kernel if stride is None else stride
    for where in itertools.product(*map(range, out)):
        sample, channel, top, left = where
        yield (
            where,
            [
                (sample, channel, high, wide)
                for high in range(top * stride - padding, top * stride - padding + kernel)
                for wide in range(left * stride - padding, left * stride - padding + kernel)
                if 0 <= high < shape[2] and 0 <= wide < shape[3]
            ],
        )


def _average_pool(operation, made, values, deviations, theta, weights):
    number = operation.inputs[0]
    down = np.zeros(values[number].shape, np.int64)
    for where, places in _windows(operation, down.shape, made.shape):
        if made[where]:
            for place, sign in signs_of([float(deviations[number][one]) for one in places], theta, made[where]):
                down[places[place]] += sign
    yield number, down


def _max_pool(operation, made, values, deviations, theta, weights):
    number = operation.inputs[0]
    down = np.zeros(values[number].shape, np.int64)
    for where, places in _windows(operation, down.shape, made.shape):
        largest = max(values[number][one] for one in places)
        for one in places:
            down[one] += made[where] * (values[number][one] == largest)
    yield number, down


def _mean_of_maps(operation, made, values, deviations, theta, weights):
    number = operation.inputs[0]
    down = np.zeros(values[number].shape, np.int64)
    for sample, channel in np.argwhere(made.reshape(made.shape[:2])):
        effects = [float(one) for one in deviations[number][sample, channel].flatten()]
        for place, sign in signs_of(effects, theta, made.reshape(made.shape[:2])[sample, channel]):
            down[sample, channel].reshape(-1)[place] += sign
    yield number, down


def _moved(operation, made, values, *_):
    number = operation.inputs[0]
    places = torch.arange(values[number].size).view(values[number].shape)
    down = np.zeros(values[number].size + 1, np.int64)
    came_from = operation.run({number: places + 1}).numpy()  # what was padded came from nowhere: 0
    np.add.at(down, came_from.flatten(), made.flatten())
    yield number, down[1:].reshape(values[number].shape)


RULES = {
    "weighted": _weighted, "same": _same, "relu": _relu, "add": _residual, "average_pool": _average_pool,
    "max_pool": _max_pool, "total": _mean_of_maps, "moved": _moved,
}  # fmt: skip
