import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from remos_hf.errors import LayerMismatchError, NonFiniteError, UnsupportedModelError
from remos_hf.layers import check_rankable, largest_magnitude, sliceable_layers, weights_hash
from tests import reference, tiny


def only(module, **options):
    return next(iter(sliceable_layers(nn.Sequential(module), **options).values()))


@pytest.mark.parametrize(
    ("module", "neurons"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (Conv1D(5, 3), (3, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 6)),
        (nn.Conv2d(4, 6, (1, 3)), (4, 6)),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 4)),
    ],
)
def test_coverage_counts_reach_every_weight_from_both_of_its_ends(module, neurons):
    layer = only(module)
    assert (layer.in_neurons, layer.out_neurons) == neurons
    ins, outs = torch.randint(0, 9, (neurons[0],)), torch.randint(0, 9, (neurons[1],))
    rows, columns = layer.axis_counts(ins, outs)
    matrix = layer.as_matrix(layer.weight)
    per_group = len(matrix) // len(columns)
    sums = [int(rows[r] + columns[r // per_group, c]) for r in range(len(matrix)) for c in range(matrix.shape[1])]
    assert sums == reference.weight_coverage(layer, ins, outs)


def test_a_tied_weight_counts_once_and_knows_its_other_names():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["c"].weight = model["a"].weight
    layers = sliceable_layers(model)
    assert list(layers) == ["a", "b"]
    assert layers["a"].aliases == ("c",)


def test_embeddings_are_left_alone_unless_named():
    model = nn.ModuleDict({"words": nn.Embedding(7, 3), "out": nn.Linear(3, 2)})
    assert list(sliceable_layers(model)) == ["out"]
    layers = sliceable_layers(model, embeddings=["words"])
    assert (layers["words"].in_neurons, layers["words"].out_neurons) == (7, 3)


def test_excluded_modules_hide_everything_below_them_but_no_namesakes():
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(2, 2)), "header": nn.Linear(2, 2)})
    assert list(sliceable_layers(model, exclude=["head"])) == ["header"]


def test_fused_qkv_is_cut_into_its_three_tensors():
    layer = next(layer for name, layer in sliceable_layers(tiny.gpt2()).items() if name.endswith("c_attn"))
    output = torch.arange(2 * 5 * 48.0).view(2, 5, 48)
    assert [part.shape[-1] for part in layer.split_parts(output)] == [16, 16, 16]
    assert torch.equal(layer.join_parts(layer.split_parts(output)), output)


def test_qkv_interleaved_by_head_is_cut_by_head_and_joined_again():
    layers = sliceable_layers(tiny.bloom(), num_heads=4)
    layer = next(layer for name, layer in layers.items() if name.endswith("query_key_value"))
    output = torch.arange(48.0)[None]
    query, key, value = layer.split_parts(output)
    # BLOOM views its fused output as (heads, 3, head_dim): 4 heads of 4.
    assert torch.equal(query, output.view(1, 4, 3, 4)[:, :, 0].flatten(1))
    assert torch.equal(layer.join_parts((query, key, value)), output)


def test_a_parametrized_weight_is_refused():
    with pytest.raises(UnsupportedModelError, match="'0' is computed"):
        sliceable_layers(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.empty(2, 2, device="meta"), "meta device"),
        (torch.zeros(2, 2, dtype=torch.int8), "torch.int8"),
        (torch.zeros(2, 2, dtype=torch.float64), "torch.float64"),
        (torch.zeros(0, 2), "empty here"),
    ],
)
def test_weights_without_a_magnitude_are_refused_by_name(weight, words):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=f"'0.weight' cannot be ranked: .*{words}"):
        check_rankable(sliceable_layers(model))


def test_a_sharded_weight_is_refused_before_wrapping_is_too_late():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.ds_id = 0  # what ZeRO-3 puts on its parameters
    with pytest.raises(UnsupportedModelError, match="Slice before the model is wrapped"):
        check_rankable(sliceable_layers(model))


def test_a_model_without_layers_is_refused():
    with pytest.raises(LayerMismatchError, match="no weight that can be sliced"):
        check_rankable(sliceable_layers(nn.Sequential(nn.ReLU())))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = tiny.mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = bad
    with pytest.raises(NonFiniteError, match="'2.weight' holds NaN or infinity"):
        largest_magnitude(sliceable_layers(model))


def test_the_hash_sees_values_dtypes_and_names_and_nothing_else():
    model = tiny.mlp()
    same, other, half = copy.deepcopy(model), tiny.mlp(seed=1), copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        same[0].bias.add_(1)  # not sliceable, so not the teacher's identity
    hashes = [weights_hash(sliceable_layers(m)) for m in (model, same, other, half)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_says_what_its_weight_is_like_without_reading_it(dtype):
    for model in (tiny.gpt2(), tiny.ConvNet()):
        for layer in sliceable_layers(model.to(dtype)).values():
            weight = layer.weight
            assert (layer.shape, layer.numel, layer.dtype) == (weight.shape, weight.numel(), dtype)
            assert layer.device == weight.device
    with torch.device("meta"):
        meta = sliceable_layers(tiny.ConvNet())
    assert {layer.device.type for layer in meta.values()} == {"meta"}
