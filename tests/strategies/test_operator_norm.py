import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from remos_hf.strategies.operator_norm import (
    OperatorNorm,
    Times,
    all_computed,
    baked,
    computed,
    go_on_from,
    kept_state,
)

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "conv1d_of_gpt2": (lambda: Conv1D(5, 7), (7,)),
    "strided": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (4, 6, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 6, 6)),
    "one_axis": (lambda: nn.Conv1d(3, 4, 5, dilation=2, padding=2), (3, 12)),
}


def bounded(make, beta=0.4, size=None, seed=0):
    torch.manual_seed(seed)
    layer = make()
    computed(layer, "weight", OperatorNorm(layer, beta, size, torch.Generator().manual_seed(seed)))
    return layer


@torch.no_grad()
def true_norm(layer, size):
    """The norm of the matrix whose columns are what the layer makes of every unit input."""
    units = torch.eye(int(torch.tensor(size).prod())).view(-1, *size)
    zero = layer(torch.zeros(1, *size))
    return torch.linalg.matrix_norm((layer(units) - zero).flatten(1), 2).item()


@pytest.mark.parametrize("name", LAYERS)
def test_the_operator_of_a_baked_layer_has_the_norm_beta_on_its_maps(name):
    make, size = LAYERS[name]
    layer = bounded(make, size=size)
    baked(layer)
    assert true_norm(layer, size) == pytest.approx(0.4, rel=1e-3)


def test_without_a_size_it_is_the_kernels_matrix_as_torch_and_the_artifact_have_it():
    make, size = LAYERS["strided"]
    layer = bounded(make, beta=1.0)
    baked(layer)
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1.0, rel=1e-3)
    assert true_norm(layer, size) > 1.05  # which is why the exact norm is there


def test_iterations_follow_a_weight_that_moves():
    layer = bounded(LAYERS["strided"][0], size=LAYERS["strided"][1])
    norm, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    with torch.no_grad():
        original[0] *= 3
        for _ in range(300):
            norm.iterate(original)
    baked(layer)
    assert true_norm(layer, LAYERS["strided"][1]) == pytest.approx(0.4, rel=1e-3)


def test_the_gradient_goes_through_the_norm_so_that_scaling_a_weight_changes_nothing():
    layer = bounded(LAYERS["linear"][0])
    layer(torch.randn(3, 7)).square().sum().backward()
    original = layer.parametrizations.weight.original
    assert original.grad.any() and abs((original.grad * original).sum().item()) < 1e-5


def test_baked_parameters_are_the_same_objects_and_compute_the_same():
    layer = bounded(LAYERS["strided"][0])
    computed(layer, "weight", Times(4.0))
    computed(layer, "bias", Times(0.5))
    before, inputs = set(map(id, layer.parameters())), torch.randn(2, 3, 7, 7)
    made = layer(inputs)
    baked(layer)
    assert torch.equal(layer(inputs), made) and set(map(id, layer.parameters())) == before
    assert type(layer) is nn.Conv2d and not all_computed(layer)
    assert list(layer.state_dict()) == ["weight", "bias"] == [name for name, _ in layer.named_parameters()]


def test_outside_it_is_an_ordinary_module():
    layer = nn.Sequential(bounded(LAYERS["strided"][0]))
    computed(layer[0], "weight", Times(2.0))
    plain = nn.Sequential(LAYERS["strided"][0]())
    assert list(plain.state_dict().keys()) == sorted(layer.state_dict(), key=list(plain.state_dict()).index)
    plain.load_state_dict(layer.state_dict())
    inputs = torch.randn(2, 3, 7, 7)
    assert torch.equal(plain(inputs), layer(inputs))
    other = nn.Sequential(bounded(LAYERS["strided"][0], seed=5))
    computed(other[0], "weight", Times(2.0))
    other.load_state_dict(plain.state_dict())
    other[0].parametrizations.weight[0].settle(other[0].parametrizations.weight.original.detach())
    assert torch.allclose(other(inputs), layer(inputs), atol=1e-5)
    assert torch.equal(copy.deepcopy(layer)(inputs), layer(inputs))


def test_what_is_kept_beside_a_state_dict_brings_back_every_bit():
    layer, other = (nn.Sequential(bounded(LAYERS["strided"][0], seed=seed)) for seed in (0, 5))
    with torch.no_grad():
        layer[0].parametrizations.weight.original.mul_(1.7)
    kept = {name: dict(one) for name, one in kept_state(layer).items()}
    go_on_from(other, kept)
    other.load_state_dict(layer.state_dict())
    for one, two in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(other(torch.ones(1, 3, 7, 7)), layer(torch.ones(1, 3, 7, 7)))
    other.load_state_dict(layer.state_dict())  # the next one is loaded as it stands
    assert torch.equal(other[0].parametrizations.weight.original, layer[0].weight)


def test_weights_of_16_bits_are_bounded_in_32_and_a_weight_of_zeros_stays():
    layer = nn.Linear(7, 5, dtype=torch.bfloat16)
    computed(layer, "weight", OperatorNorm(layer, 0.4, None, torch.Generator()))
    assert layer.weight.dtype == torch.bfloat16
    assert torch.linalg.matrix_norm(layer.weight.float(), 2).item() == pytest.approx(0.4, rel=0.01)
    empty = nn.Linear(3, 2)
    nn.init.zeros_(empty.weight)
    computed(empty, "weight", OperatorNorm(empty, 0.4, None, torch.Generator()))
    assert not empty.weight.any()
