"""Slow, obvious versions of what the package does fast. Plain Python over every sample and every weight."""

import math

import numpy as np
import torch


def scaled_means(sample, neuron_axis, real=None):
    """Scale one sample's activation to [0, 1] and average each neuron over its real positions; None if constant.

    `sample` has no batch axis: (positions..., neurons), or (neurons, positions...) if neuron_axis is 0.
    """
    values = np.moveaxis(np.asarray(sample, dtype=np.float64), neuron_axis, -1)
    values = values.reshape(-1, values.shape[-1])
    if real is not None and len(values) == len(real):
        values = values[np.asarray(real, dtype=bool)]
    if values.size == 0 or values.max() == values.min():
        return None
    return ((values - values.min()) / (values.max() - values.min())).mean(axis=0)


def covered(means, kind, parameter):
    """Which neurons one sample covers."""
    if means is None:
        return None
    if kind == "median":
        return means > sorted(means)[(len(means) - 1) // 2]
    if kind == "nc":
        return means > parameter
    if kind == "tknc":
        order = sorted(range(len(means)), key=lambda neuron: (-means[neuron], neuron))[:parameter]
        return np.array([neuron in order for neuron in range(len(means))])
    high, low = means.max(), means.min()
    return means > high - (high - low) / parameter


def brute_force_profile(model, layers, batches, kind="median", parameter=None):
    """Count coverage from copies of every activation, sample by sample."""
    counts = {(name, end): 0 for name in layers for end in ("input", "output")}
    for batch in batches:
        mapping = isinstance(batch, dict)
        inputs = {k: v for k, v in batch.items() if k != "labels"} if mapping else batch[0]
        mask = batch.get("attention_mask") if mapping else None
        kept, handles = {}, []
        for name, layer in layers.items():

            def keep(module, given, made, name=name, kept=kept):
                kept[name, "input"], kept[name, "output"] = given[0].clone(), made.clone()

            handles.append(layer.module.register_forward_hook(keep))
        with torch.no_grad():
            model(**inputs) if mapping else model(inputs)
        for handle in handles:
            handle.remove()
        for (name, end), activation in kept.items():
            axis = 0 if layers[name].neuron_axis == 1 else -1
            parts = layers[name].split_parts(activation) if end == "output" else (activation,)
            for sample in range(len(activation)):
                real = None if mask is None else mask[sample].numpy()
                rows = []
                for part in parts:
                    row = covered(scaled_means(part[sample].numpy(), axis, real), kind, parameter)
                    width = part.shape[1] if axis == 0 else part.shape[-1]
                    rows.append(torch.zeros(width, dtype=torch.bool) if row is None else torch.from_numpy(row))
                row = layers[name].join_parts([r[None] for r in rows])[0] if end == "output" else rows[0]
                counts[name, end] = counts[name, end] + row.long()
    return counts


def mean_ranks(values):
    """Mean rank of each value among all, from 0; equal values share it."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            ranks[place] = (start + stop - 1) / 2
        start = stop
    return ranks


def weight_coverage(layer, input_counts, output_counts):
    """Coverage sum of every weight of a layer, in memory order."""
    shape = tuple(layer.weight.shape)
    sums = []
    for place in np.ndindex(*shape):
        if layer.inputs_first:
            neuron_in, neuron_out = place[0], place[1]
        else:
            per_group = shape[0] // layer.groups
            neuron_out, neuron_in = place[0], place[1] + (place[0] // per_group) * shape[1]
        sums.append(int(input_counts[neuron_in]) + int(output_counts[neuron_out]))
    return sums


def ordinal_scores(layers, profile):
    """Rank of coverage minus rank of magnitude for all weights, in the order of the layers."""
    coverage, magnitudes = [], []
    for layer in layers:
        coverage += weight_coverage(layer, profile.input_counts[layer.name], profile.output_counts[layer.name])
        magnitudes += layer.weight.abs().double().flatten().tolist()
    return [c - m for c, m in zip(mean_ranks(coverage), mean_ranks(magnitudes), strict=True)]


def best_threshold_sets(scores, wanted):
    """Every set of kept weights that the rule allows: ties with the wanted-th best score go together, nearest count."""
    if wanted == len(scores):
        return [[True] * len(scores)]
    threshold = sorted(scores)[len(scores) - wanted - 1]
    without, with_ties = [s > threshold for s in scores], [s >= threshold for s in scores]
    misses = abs(sum(without) - wanted), abs(sum(with_ties) - wanted)
    return [kept for kept, miss in zip((without, with_ties), misses, strict=True) if miss == min(misses)]


def artifact_kept(layers, profile, prune_ratio):
    """The artifact's rule as style.md states it, pair by pair and weight by weight."""
    pairs = []
    for number, layer in enumerate(layers):
        shape = tuple(layer.weight.shape)
        kernel = math.prod(shape[2:])
        ins, outs = (shape[0], shape[1]) if layer.inputs_first else (shape[1], shape[0])
        for i in range(ins):
            for o in range(outs):
                total = int(profile.input_counts[layer.name][i]) + int(profile.output_counts[layer.name][o])
                pairs.append((total, number, i, o, kernel))
    rank_of, before = {}, 0
    for _, number, i, o, kernel in sorted(pairs, key=lambda pair: pair[0]):  # sorted() is stable
        rank_of[number, i, o] = before
        before += kernel
    weights = []
    for number, layer in enumerate(layers):
        for place in np.ndindex(*layer.weight.shape):
            i, o = (place[0], place[1]) if layer.inputs_first else (place[1], place[0])
            weights.append((abs(float(layer.weight[place])), rank_of[number, i, o]))
    magnitude_rank = {
        place: rank for rank, place in enumerate(sorted(range(len(weights)), key=lambda p: weights[p][0]))
    }
    scores = [rank - magnitude_rank[place] for place, (_, rank) in enumerate(weights)]
    threshold = sorted(scores)[min(int(len(scores) * prune_ratio), len(scores) - 1)]
    return [score > threshold for score in scores]
