import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from remos_hf.errors import LayerMismatchError, NonFiniteError, UnsupportedModelError
from remos_hf.layers import largest_magnitude, rankable_layers, sliceable_layers, weights_hash
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


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm]
)
def test_a_weight_that_is_computed_from_others_is_no_layer(wrap):
    assert list(sliceable_layers(nn.Sequential(wrap(nn.Linear(3, 3)), nn.Linear(3, 3)))) == ["1"]


class Experts(nn.Module):
    """Two stacks of experts, as transformers 5 holds them."""

    def __init__(self, first, second, **said):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(first))
        self.down_proj = nn.Parameter(torch.randn(second))
        vars(self).update(said)


@pytest.mark.parametrize(
    ("experts", "neurons"),
    [
        (Experts((3, 10, 4), (3, 4, 5)), (4, 10)),
        (Experts((3, 4, 10), (3, 5, 4)), (4, 10)),
        (Experts((3, 8, 4), (3, 4, 4)), (4, 8)),
        (Experts((3, 4, 8), (3, 4, 4)), (4, 8)),
        (Experts((3, 4, 10), (3, 5, 4), is_transposed=True, is_concatenated=False), (4, 10)),
    ],
)
def test_every_expert_of_a_stack_is_a_layer_and_a_view(experts, neurons):
    layers = sliceable_layers(nn.ModuleDict({"mlp": experts}))
    assert list(layers) == [f"mlp.{stack}[{i}]" for stack in ("gate_up_proj", "down_proj") for i in range(3)]
    up, down = layers["mlp.gate_up_proj[1]"], layers["mlp.down_proj[2]"]
    assert (up.in_neurons, up.out_neurons) == neurons
    assert (down.in_neurons, down.out_neurons) == (neurons[1] // 2, 4)
    assert (up.key, up.parameter_name) == ("mlp.gate_up_proj[1]", "mlp.gate_up_proj")
    up.weight.zero_()
    assert [bool(one.any()) for one in experts.gate_up_proj] == [True, False, True]


def test_gates_that_are_interleaved_with_what_they_open_are_told_apart():
    experts = Experts((1, 4, 6), (1, 3, 4), is_transposed=True, is_concatenated=False)
    layer = sliceable_layers(experts)["gate_up_proj[0]"]
    output = torch.arange(6.0)[None]
    gate, up = layer.split_parts(output)
    assert torch.equal(gate, output[:, ::2])
    assert torch.equal(up, output[:, 1::2])
    assert torch.equal(layer.join_parts((gate, up)), output)


def test_stacks_that_fit_no_known_experts_are_left_alone():
    assert not sliceable_layers(Experts((3, 10, 4), (3, 7, 5)))


def test_packed_attention_is_three_tensors_and_its_output_a_layer_of_its_own():
    layers = sliceable_layers(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}))
    assert list(layers) == ["a.in_proj_weight", "a.out_proj"]
    assert [part.shape[-1] for part in layers["a.in_proj_weight"].split_parts(torch.zeros(1, 12))] == [4, 4, 4]
    assert [layer.key for layer in layers.values()] == ["a.in_proj_weight", "a.out_proj.weight"]


def test_attention_over_other_widths_holds_three_weights():
    attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=8)
    attention.in_proj_bias.data = torch.arange(12.0)
    layers = sliceable_layers(attention)
    assert [(layer.in_neurons, layer.out_neurons) for layer in layers.values()] == [(4, 4), (6, 4), (8, 4), (4, 4)]
    assert layers["k_proj_weight"].bias.tolist() == [4, 5, 6, 7]


def test_a_layer_knows_the_bias_that_goes_with_it():
    experts = Experts((2, 6, 4), (2, 4, 3))
    experts.gate_up_proj_bias = nn.Parameter(torch.arange(12.0).view(2, 6))
    layers = sliceable_layers(nn.ModuleDict({"e": experts, "l": nn.Linear(2, 2), "bare": nn.Linear(2, 2, bias=False)}))
    assert layers["e.gate_up_proj[1]"].bias.tolist() == [6, 7, 8, 9, 10, 11]
    assert torch.equal(layers["l"].bias, layers["l"].module.bias)
    assert layers["e.down_proj[0]"].bias is layers["bare"].bias is None


def test_weights_that_an_adapter_brought_are_no_layers():
    lora = nn.ModuleDict(
        {"base_layer": nn.Linear(4, 4), "lora_A": nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})}
    )
    lora.adapter_layer_names = ("lora_A", "lora_B")
    assert list(sliceable_layers(nn.ModuleDict({"query": lora}))) == ["query.base_layer"]


def test_weights_that_are_tied_to_the_head_are_no_layers():
    model = nn.ModuleDict({"words": nn.Embedding(5, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["words"].weight
    assert list(sliceable_layers(model, exclude=["head"], embeddings=["words"])) == ["body"]


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
        rankable_layers(sliceable_layers(model))


def test_a_sharded_weight_is_refused_before_wrapping_is_too_late():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.ds_id = 0  # what ZeRO-3 puts on its parameters
    with pytest.raises(UnsupportedModelError, match="Slice before the model is wrapped"):
        rankable_layers(sliceable_layers(model))


def test_a_model_without_layers_is_refused():
    with pytest.raises(LayerMismatchError, match="no weight that can be sliced"):
        rankable_layers(sliceable_layers(nn.Sequential(nn.ReLU())))


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
