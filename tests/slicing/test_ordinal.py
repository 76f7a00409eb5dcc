import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from remos_hf.errors import NonFiniteError
from remos_hf.layers import sliceable_layers
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing import ordinal
from tests import reference, tiny

LAYER_KINDS = [
    lambda: nn.Linear(5, 3),
    lambda: nn.Conv2d(4, 6, 3, groups=2),
    lambda: nn.Conv2d(6, 6, 3, groups=6),
    lambda: nn.Conv1d(3, 4, 2),
    lambda: tiny.gpt2().transformer.h[0].mlp.c_fc,
    lambda: nn.Linear(1, 1),
]


def random_profile(layers, most, generator):
    def counts(size):
        return torch.randint(0, most + 1, (size,), generator=generator)

    return CoverageProfile(
        {name: counts(layer.in_neurons) for name, layer in layers.items()},
        {name: counts(layer.out_neurons) for name, layer in layers.items()},
        most,
    )


def model_of(kinds, seed, distinct, dtype):
    """A model whose weights take few distinct values, so that most of them tie, or all values they like."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleList([LAYER_KINDS[kind]() for kind in kinds])
    for layer in sliceable_layers(model).values():
        values = torch.randn(layer.weight.shape, generator=generator)
        if distinct:
            values = (values * distinct).round() / 4
        layer.weight.copy_(values)
    return model.to(dtype)


def bits_of(selection, layers):
    flat = [
        ordinal.unpack(bits, layer.weight.shape).flatten() for bits, layer in zip(selection.bits, layers, strict=True)
    ]
    return torch.cat(flat).tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.integers(0, len(LAYER_KINDS) - 1), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    distinct=st.sampled_from([0, 0, 1, 3]),
    most=st.sampled_from([0, 1, 4, 1000]),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_kept_weights_are_those_of_the_slow_reference(kinds, seed, distinct, most, share, dtype):
    layers = sliceable_layers(model_of(kinds, seed, distinct, dtype))
    profile = random_profile(layers, most, torch.Generator().manual_seed(seed))
    ordered = list(layers.values())
    total = sum(layer.weight.numel() for layer in ordered)
    wanted = round(total * share)
    selection = ordinal.select(ordinal.entries_of(ordered, profile), total - wanted)
    kept = bits_of(selection, ordered)
    assert selection.num_kept == sum(kept)
    assert kept in reference.best_threshold_sets(reference.ordinal_scores(ordered, profile), wanted)


def midranks(values):
    """Doubled mean ranks by a full sort."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (2 * (counts.cumsum(0) - counts) + counts - 1)[inverse]


def large(dtype, scale=1.0, seed=5):
    """Enough weights that the bracket comes from a sample and bins hold several values."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(700, 500), nn.Conv2d(40, 60, 5), nn.Linear(300, 400))
    with torch.no_grad():
        for number, layer in enumerate(model):
            layer.weight.mul_(scale * 3.0**number)
    return sliceable_layers(model.to(dtype))


def sorted_reference(layers, profile, num_reset):
    magnitudes = torch.cat([layer.weight.float().abs().flatten() for layer in layers])
    scores = -midranks(magnitudes)
    if profile is not None:
        coverage = []
        for entry in ordinal.entries_of(layers, profile):
            coverage.append((entry.rows.view(len(entry.columns), -1, 1) + entry.columns[:, None]).flatten())
        scores = scores + midranks(torch.cat(coverage))
    threshold = scores.kthvalue(num_reset).values
    without, with_ties = scores > threshold, scores >= threshold
    kept_wanted = len(scores) - num_reset
    nearer = kept_wanted - without.sum() > with_ties.sum() - kept_wanted
    return with_ties if nearer else without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("most", "share"), [(0, 0.1), (0, 0.97), (3, 0.001), (3, 0.5), (20000, 0.1), (20000, 0.97)])
def test_large_models_are_cut_exactly_where_a_full_sort_cuts(dtype, most, share):
    layers = large(dtype)
    profile = random_profile(layers, most, torch.Generator().manual_seed(1))
    ordered = list(layers.values())
    total = sum(layer.weight.numel() for layer in ordered)
    selection = ordinal.select(ordinal.entries_of(ordered, profile), round(total * share))
    expected = sorted_reference(ordered, profile, round(total * share))
    assert bits_of(selection, ordered) == expected.tolist()


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e30])
def test_tiny_subnormal_and_huge_weights_are_ranked_exactly(scale):
    layers = list(large(torch.float32, scale).values())
    num_reset = 100_000
    selection = ordinal.select([ordinal.Entry(layer) for layer in layers], num_reset)
    assert bits_of(selection, layers) == sorted_reference(layers, None, num_reset).tolist()


def test_many_zero_weights_tie_and_go_together():
    layers = large(torch.float32)
    ordered = list(layers.values())
    for layer in ordered:
        layer.weight.masked_fill_(torch.rand(layer.weight.shape) < 0.5, 0)
    profile = random_profile(layers, 3, torch.Generator().manual_seed(1))
    for num_reset in (1000, 200_000, 400_000):
        selection = ordinal.select(ordinal.entries_of(ordered, profile), num_reset)
        assert bits_of(selection, ordered) == sorted_reference(ordered, profile, num_reset).tolist()


def test_a_misleading_sample_costs_time_but_no_exactness(monkeypatch):
    layers = list(large(torch.float32).values())
    entries = [ordinal.Entry(layer) for layer in layers]
    sampled = ordinal._Search._sampled_scores
    monkeypatch.setattr(ordinal._Search, "_sampled_scores", lambda self, entry: sampled(self, entry) + 10**6)
    assert bits_of(ordinal.select(entries, 50_000), layers) == sorted_reference(layers, None, 50_000).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["mean", "artifact"])
def test_a_bracket_beside_the_threshold_is_noticed(monkeypatch, ties, dtype):
    # Bins of many weights reach from a bracket to a threshold outside it: the count alone would not show it.
    layers = large(dtype)
    profile = random_profile(layers, 3, torch.Generator().manual_seed(1))
    ordered, num_reset = list(layers.values()), 53_001
    entries = ordinal.entries_of(ordered, profile)
    monkeypatch.setattr(ordinal, "_WIDENINGS", ())
    monkeypatch.setattr(ordinal.np, "log2", lambda _: 6)  # coarse bins
    exact = ordinal.select(entries, num_reset, ties=ties)
    if ties == "mean":
        assert bits_of(exact, ordered) == sorted_reference(ordered, profile, num_reset).tolist()
    search = ordinal._Search(entries, ties, False)
    _, threshold = search._settle(search._decide(None, None), num_reset - 1)
    noticed = 0
    for shift in (-4000, -500, -60, 60, 500, 4000):
        monkeypatch.setattr(search, "_bracket", lambda *_, s=shift: (threshold + s - 50, threshold + s + 50))
        selection = search.run(num_reset, 4.0)
        noticed += selection is None
        assert selection is None or bits_of(selection, ordered) == bits_of(exact, ordered)
    assert noticed
    monkeypatch.setattr(search, "_bracket", lambda *_: (threshold, threshold))
    assert bits_of(search.run(num_reset, 4.0), ordered) == bits_of(exact, ordered)


def test_small_chunks_give_the_same_bits(monkeypatch):
    layers = large(torch.float32)
    profile = random_profile(layers, 50, torch.Generator().manual_seed(1))
    ordered = list(layers.values())
    whole = ordinal.select(ordinal.entries_of(ordered, profile), 60_000)
    monkeypatch.setattr(ordinal, "_CPU_CHUNK", 1000)
    parts = ordinal.select(ordinal.entries_of(ordered, profile), 60_000)
    assert all(torch.equal(a, b) for a, b in zip(whole.bits, parts.bits, strict=True))


@pytest.mark.parametrize("most", [2**25, 2**31, 2**40])
def test_counts_beyond_the_tables_are_refused_and_never_wrap_around(most):
    layers = sliceable_layers(nn.Linear(3, 2))
    profile = CoverageProfile({"": torch.tensor([0, 1, most])}, {"": torch.tensor([1, 2])}, most)
    with pytest.raises(ValueError, match=f"covered by {most:,} samples.*profile fewer"):
        ordinal.entries_of(list(layers.values()), profile)


def test_the_histogram_of_coverage_sums_counts_every_weight():
    for kind in LAYER_KINDS:
        layers = sliceable_layers(nn.Sequential(kind()))
        profile = random_profile(layers, 6, torch.Generator().manual_seed(2))
        (entry,) = ordinal.entries_of(list(layers.values()), profile)
        name, layer = next(iter(layers.items()))
        sums = reference.weight_coverage(layer, profile.input_counts[name], profile.output_counts[name])
        histogram = ordinal._sum_histogram(entry)
        assert histogram.tolist() == np.bincount(sums, minlength=len(histogram)).tolist()


@pytest.mark.parametrize("distinct", [0, 1, 3])
@pytest.mark.parametrize("most", [0, 2, 1000])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.5, 0.95])
def test_artifact_ties_follow_the_artifacts_rule(distinct, most, ratio):
    kinds = [0, 3, 4]
    layers = sliceable_layers(model_of(kinds, 7, distinct, torch.float32))
    layers |= {
        f"conv{n}": layer for n, layer in enumerate(sliceable_layers(nn.Sequential(nn.Conv2d(3, 4, 3))).values())
    }
    ordered = [layer if name == layer.name else type(layer)(name, layer.module) for name, layer in layers.items()]
    profile = random_profile({layer.name: layer for layer in ordered}, most, torch.Generator().manual_seed(3))
    selection = select_by_artifact(ordered, profile, ratio)
    assert bits_of(selection, ordered) == reference.artifact_kept(ordered, profile, ratio)


def select_by_artifact(layers, profile, prune_ratio):
    total = sum(layer.weight.numel() for layer in layers)
    place = min(int(total * prune_ratio), total - 1)
    return ordinal.select(ordinal.entries_of(layers, profile), place + 1, ties="artifact")


def sorted_artifact(layers, profile, prune_ratio):
    """The artifact's rule by two stable sorts over everything."""
    magnitudes = torch.cat([layer.weight.float().abs().flatten() for layer in layers])
    rank = torch.empty(len(magnitudes), dtype=torch.int64)
    rank[magnitudes.sort(stable=True).indices] = torch.arange(len(magnitudes))
    sums, kernels = [], []
    for layer in layers:
        ins, outs = profile.input_counts[layer.name], profile.output_counts[layer.name]
        sums.append((ins[:, None] + outs).flatten())
        kernels.append(torch.full_like(sums[-1], layer.weight[0, 0].numel()))
    order, kernel = torch.cat(sums).sort(stable=True).indices, torch.cat(kernels)
    pair_rank = torch.empty_like(kernel)
    pair_rank[order] = kernel[order].cumsum(0) - kernel[order]
    pieces = pair_rank.split([len(part) for part in sums])
    coverage = [
        piece.view(layer.in_neurons, layer.out_neurons).T.flatten().repeat_interleave(layer.weight[0, 0].numel())
        for piece, layer in zip(pieces, layers, strict=True)
    ]
    scores = torch.cat(coverage) - rank
    return scores > scores.sort().values[min(int(len(scores) * prune_ratio), len(scores) - 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [0, 3, 20000])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.7])
def test_artifact_ties_are_exact_on_large_models(dtype, most, ratio):
    layers = large(dtype)
    profile = random_profile(layers, most, torch.Generator().manual_seed(1))
    ordered = list(layers.values())
    expected = sorted_artifact(ordered, profile, ratio)
    assert bits_of(select_by_artifact(ordered, profile, ratio), ordered) == expected.tolist()


def test_packing_is_undone_by_unpacking_for_every_length():
    for length in (1, 7, 8, 9, 64, 65):
        bits = torch.rand(length) < 0.5
        assert torch.equal(ordinal.unpack(ordinal.pack(bits), (length,)), bits)
        assert ordinal.pack(bits).numel() == -(-length // 8)


def test_weights_that_are_not_finite_are_refused_even_if_all_are_kept():
    model = tiny.mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    entries = [ordinal.Entry(layer) for layer in sliceable_layers(model).values()]
    for num_reset in (0, 5):
        with pytest.raises(NonFiniteError, match=r"2\.weight"):
            ordinal.select(entries, num_reset)
