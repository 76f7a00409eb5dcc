import pytest
import torch

from remos_hf.layers import sliceable_layers
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing import ordinal, rules
from tests import reference, tiny


@pytest.fixture
def layers():
    return list(sliceable_layers(tiny.ConvNet()).values())


def kept(selection, layers):
    return [
        bool(bit)
        for bits, layer in zip(selection.bits, layers, strict=True)
        for bit in ordinal.unpack(bits, (layer.weight.numel(),))
    ]


def share_without(layers, num_reset):
    return 1 - num_reset / sum(layer.numel for layer in layers)


def magnitudes(layers):
    return [value for layer in layers for value in layer.weight.abs().flatten().tolist()]


@pytest.mark.parametrize("num_reset", [0, 1, 100, 700])
def test_top_magnitude_resets_the_largest_weights(layers, num_reset):
    values = magnitudes(layers)
    largest = set(sorted(range(len(values)), key=lambda place: values[place])[len(values) - num_reset :])
    selection = rules.top_magnitude(layers, None, share_without(layers, num_reset), 0)
    assert kept(selection, layers) == [place not in largest for place in range(len(values))]


@pytest.mark.parametrize("num_reset", [0, 1, 100, 700])
def test_mag_prune_resets_the_smallest_weights(layers, num_reset):
    values = magnitudes(layers)
    smallest = set(sorted(range(len(values)), key=lambda place: values[place])[:num_reset])
    selection = rules.mag_prune(layers, None, share_without(layers, num_reset), 0)
    assert kept(selection, layers) == [place not in smallest for place in range(len(values))]
    assert selection.num_kept == len(values) - num_reset


def test_bits_behind_the_last_weight_are_zero():
    layers = list(sliceable_layers(tiny.mlp()).values())  # 35, 42 and 18 weights: no multiple of 8
    for rule in rules.RULES.values():
        if rule is rules.remos:
            continue
        for bits, layer in zip(rule(layers, None, share_without(layers, 30), 0).bits, layers, strict=True):
            assert int(bits[-1]) >> (layer.weight.numel() % 8 or 8) == 0


def test_random_resets_the_asked_number_the_same_share_of_every_layer(layers):
    total = sum(layer.weight.numel() for layer in layers)
    selection = rules.random(layers, None, share_without(layers, total // 3), 4)
    assert total - sum(kept(selection, layers)) == total // 3
    for bits, layer in zip(selection.bits, layers, strict=True):
        gone = layer.weight.numel() - int(ordinal.unpack(bits, layer.weight.shape).sum())
        assert abs(gone - layer.weight.numel() / 3) <= 1


def test_random_depends_on_its_seed_alone(layers):
    def choose(seed):
        return kept(rules.random(layers, None, share_without(layers, 500), seed), layers)

    state = torch.random.get_rng_state()
    assert choose(1) == choose(1)
    assert choose(1) != choose(2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_remos_without_differences_in_coverage_is_top_magnitude(layers):
    flat = CoverageProfile(
        {layer.name: torch.ones(layer.in_neurons, dtype=torch.int64) for layer in layers},
        {layer.name: torch.ones(layer.out_neurons, dtype=torch.int64) for layer in layers},
        1,
    )
    ours = rules.remos(layers, flat, share_without(layers, 300), 0)
    theirs = rules.top_magnitude(layers, None, share_without(layers, 300), 0)
    assert kept(ours, layers) == kept(theirs, layers)
    assert kept(ours, layers) in reference.best_threshold_sets(
        [-rank for rank in reference.mean_ranks(magnitudes(layers))], len(magnitudes(layers)) - 300
    )


@pytest.mark.parametrize("prune_ratio", [0.005, 0.01, 0.03, 0.05, 0.07, 0.1, 0.2, 0.29, 0.3, 0.57])
@pytest.mark.parametrize("slice_ratio_of", [lambda prune: 1 - prune, lambda prune: round(1 - prune, 3)])
def test_the_artifacts_threshold_stands_where_its_own_ratio_puts_it(prune_ratio, slice_ratio_of):
    torch.manual_seed(0)
    layers = list(sliceable_layers(torch.nn.Linear(25, 40)).values())
    flat = CoverageProfile({"": torch.zeros(25, dtype=torch.int64)}, {"": torch.zeros(40, dtype=torch.int64)}, 1)
    selection = rules.remos(layers, flat, slice_ratio_of(prune_ratio), 0, ties="artifact")
    assert kept(selection, layers) == reference.artifact_kept(layers, flat, prune_ratio)


def test_selection_packs_what_a_rule_keeps(layers):
    keep = [torch.rand(layer.shape) < 0.5 for layer in layers]
    selection = ordinal.Selection.of(keep)
    assert kept(selection, layers) == [bool(bit) for one in keep for bit in one.flatten()]
    assert selection.num_kept == sum(kept(selection, layers))


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.01])
def test_the_highest_scores_are_kept_and_equal_ones_go_together(layers, share):
    generator = torch.Generator().manual_seed(2)
    scores = [torch.rand(layer.shape, generator=generator) for layer in layers]
    flat = torch.cat([score.flatten() for score in scores])
    found = rules.keep_highest(scores, layers, share)
    kept = torch.cat([ordinal.unpack(bits, one.shape).flatten() for bits, one in zip(found.bits, layers, strict=True)])
    assert found.num_kept == round(share * len(flat)) and found.tie_group == 1
    assert not bool((flat[kept][:, None] < flat[~kept]).any())
    tied = [score.round() for score in scores]  # halves of 0 and 1
    ones = int(flat.round().sum())
    found = rules.keep_highest(tied, layers, share)
    nearer = min((len(flat), ones, 0), key=lambda count: abs(count - round(share * len(flat))))
    assert found.num_kept == nearer
