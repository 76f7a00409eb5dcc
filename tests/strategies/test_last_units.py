import pytest
from torch import nn
from transformers import MPNetConfig, MPNetForSequenceClassification

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.last_units import last_units
from tests import tiny
from tests.strategies.residual_nets import Net, Post, Pre

BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1")


def units(model, head=None, named=None, k=1):
    found = last_units(adapter_for(model, head), k, named)
    return (*found.before, *found.last)


def test_units_of_a_convolutional_net_are_residual_blocks_final_norm_and_head():
    assert units(Net(Post), ("head",)) == (*((one,) for one in BLOCKS), ("head",))
    assert units(Net(Pre), ("head",)) == (*((one,) for one in BLOCKS), ("norm",), ("head",))


def test_units_of_a_transformer_are_layers_final_norm_and_the_whole_head():
    assert units(tiny.gpt2()) == (("transformer.h.0",), ("transformer.h.1",), ("transformer.ln_f",), ("score",))
    found = last_units(adapter_for(tiny.bert()), 2)
    assert found.before == (("bert.encoder.layer.0",),) and found.last[0] == ("bert.encoder.layer.1",)
    assert set(found.last[1]) >= {"classifier", "bert.pooler"}
    assert found.holds("bert.pooler.dense.weight") and not found.holds("bert.encoder.layer.0.output.dense")
    assert not found.holds("bert.embeddings")


def test_a_norm_that_holds_its_activation_is_no_block():
    net = Net(Post)
    net.layer1.add_module("2", nn.BatchNorm2d(6))
    net.layer1[2].drop, net.layer1[2].act = nn.Identity(), nn.ReLU()
    assert units(net, ("head",)) == (*((one,) for one in BLOCKS), ("head",))


def test_a_table_of_relative_positions_is_no_unit_wherever_it_was_made():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = MPNetForSequenceClassification(MPNetConfig(hidden_size=16, vocab_size=99, **sizes))
    assert units(model) == (("mpnet.encoder.layer.0",), ("mpnet.encoder.layer.1",), ("classifier",))


def test_named_units_go_before_those_found():
    assert units(tiny.ConvNet(), ("head",), ("down", "grouped", "head")) == (("down",), ("grouped",), ("head",))
    with pytest.raises(UnsupportedModelError, match="'dwn'"):
        units(tiny.ConvNet(), ("head",), ("dwn", "head"))


@pytest.mark.parametrize("make", [tiny.ConvNet, tiny.bart], ids=lambda make: make.__name__)
def test_a_model_without_one_list_of_blocks_asks_for_names(make):
    with pytest.raises(UnsupportedModelError, match="Name its units"):
        units(make(), ("head",) if make is tiny.ConvNet else None)


@pytest.mark.parametrize("k", [0, 6])
def test_a_number_of_units_that_there_are_not_is_refused_with_those_there_are(k):
    with pytest.raises(ValueError, match=r"from 1 to 5 of Net \(layer1.0, .*, head\), but got"):
        units(Net(), ("head",), k=k)
