import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
)

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.adversarial_training import AdversarialTraining
from remos_hf.strategies.last_units import check_order, last_units
from remos_hf.strategies.neft import Neft
from tests import tiny
from tests.strategies.residual_nets import Net, Post, Pre

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
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
    model = MPNetForSequenceClassification(MPNetConfig(vocab_size=99, intermediate_size=32, **SIZES))
    assert units(model) == (("mpnet.encoder.layer.0",), ("mpnet.encoder.layer.1",), ("classifier",))


def opt():
    config = OPTConfig(vocab_size=60, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32, **SIZES)
    return OPTForSequenceClassification(config)


def deberta():
    table = {"relative_attention": True, "norm_rel_ebd": "layer_norm", "position_buckets": 8, "pos_att_type": ["p2c"]}
    return DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=60, **SIZES, **table))


@pytest.mark.parametrize(
    ("make", "taken", "blocks", "behind"),
    [
        (opt, "layers.1, score", "model.decoder.layers", ("model.decoder.final_layer_norm", "score")),
        (deberta, "LayerNorm, pooler .*", "deberta.encoder.layer", ("pooler", "classifier")),
    ],
)
def test_units_that_do_not_run_in_the_order_of_the_module_are_refused_with_those_to_name(make, taken, blocks, behind):
    model, batch, named = make().train(), tiny.text_batches(1)[0], (f"{blocks}.0", f"{blocks}.1", *behind)
    adapter = adapter_for(model)
    with pytest.raises(UnsupportedModelError, match=rf"taken to be .*{taken}, but .* units={re.escape(str(named))}"):
        check_order(adapter, last_units(adapter, 2), batch)
    assert model.training
    check_order(adapter, last_units(adapter, 1), batch)  # the head is the last in any case
    for strategy in (AdversarialTraining(k=2), Neft(2)):
        with pytest.raises(UnsupportedModelError, match="Name all units as they run"):
            strategy.prepare(model, tiny.student_data())
        replace(strategy, units=named).prepare(model, tiny.student_data())


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.vit, tiny.llama], ids=lambda make: make.__name__)
def test_units_that_run_in_the_order_of_the_module_are_not(make):
    adapter = adapter_for(make())
    batch = {"pixel_values": torch.zeros(1, 3, 8, 8)} if make is tiny.vit else tiny.text_batches(1, size=1)[0]
    for k in (1, 2, 3):
        check_order(adapter, last_units(adapter, k), batch)


def test_a_stage_that_holds_more_than_its_blocks_is_one_unit():
    sizes = {"hidden_sizes": [4, 8], "depths": [1, 2], "num_stages": 2, "patch_size": 1}
    found = units(ConvNextForImageClassification(ConvNextConfig(**sizes)))
    stages = (("convnext.encoder.stages.0",), ("convnext.encoder.stages.1",))
    assert found == (*stages, ("convnext.layernorm",), ("classifier",))


def test_named_units_go_before_those_found():
    assert units(tiny.ConvNet(), ("head",), ("down", "grouped", "head")) == (("down",), ("grouped",), ("head",))
    with pytest.raises(UnsupportedModelError, match=r"'dwn'.*Did you mean 'down'\?"):
        units(tiny.ConvNet(), ("head",), ("dwn", "head"))


@pytest.mark.parametrize("make", [tiny.ConvNet, tiny.bart], ids=lambda make: make.__name__)
def test_a_model_without_one_list_of_blocks_asks_for_names(make):
    with pytest.raises(UnsupportedModelError, match="Name its units"):
        units(make(), ("head",) if make is tiny.ConvNet else None)


@pytest.mark.parametrize("k", [0, 6])
def test_a_number_of_units_that_there_are_not_is_refused_with_those_there_are(k):
    with pytest.raises(ValueError, match=r"from 1 to 5 of Net \(layer1.0, .*, head\), but got"):
        units(Net(), ("head",), k=k)
