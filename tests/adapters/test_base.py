import logging

import pytest
import torch
from torch import nn

from remos_hf.adapters.base import Adapter
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from tests import tiny


def test_a_plain_module_has_no_head_unless_named_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="remos_hf"):
        assert list(Adapter(tiny.mlp()).layers()) == ["0", "2", "4"]
    assert "names no head" in caplog.text
    assert list(Adapter(tiny.mlp(), ("4",)).layers()) == ["0", "2"]


def test_a_head_that_is_not_there_is_refused_with_the_names_that_are():
    with pytest.raises(ValueError, match=r"\['fc'\] are not in ConvNet.*'head'"):
        Adapter(tiny.ConvNet(), ("fc",))
    with pytest.raises(ValueError, match=r"Did you mean 'head'\?"):
        Adapter(tiny.ConvNet(), ("haed",))


@pytest.mark.parametrize("batch", [torch.ones(2, 5), (torch.ones(2, 5), torch.zeros(2)), [torch.ones(2, 5)]])
def test_tensors_and_tuples_are_run_on_their_inputs(batch):
    assert Adapter(tiny.mlp(), ()).forward(batch).shape == (2, 3)


def test_labels_of_a_mapping_are_left_out():
    assert Adapter(tiny.ConvNet(), ()).forward({"pixel_values": torch.ones(2, 3, 8, 8), "labels": 1}).shape == (2, 4)


@pytest.mark.parametrize("kind", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_wrapped_models_are_refused(kind):
    model = object.__new__(kind)
    nn.Module.__init__(model)
    with pytest.raises(UnsupportedModelError, match="before it is wrapped"):
        adapter_for(model)


def test_a_compiled_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="compiled"):
        adapter_for(torch.compile(tiny.mlp()))


def test_something_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="got str"):
        adapter_for("bert-base-uncased")


def test_fresh_weights_are_spread_like_pytorch_starts_them():
    adapter = Adapter(tiny.ConvNet(), ())
    layer = adapter.layers()["conv"]
    fresh = adapter.fresh_weight(layer, torch.Generator().manual_seed(0))
    bound = 1 / (8 * 9) ** 0.5
    assert fresh.shape == layer.weight.shape
    assert 0.9 * bound < fresh.abs().max() <= bound
    assert layer.weight.abs().max() <= bound  # nn.Conv2d itself


def test_hidden_states_of_a_plain_module_are_refused():
    with pytest.raises(UnsupportedModelError, match="source='hooks'"):
        Adapter(tiny.mlp(), ()).blocks()


def test_the_feature_layer_of_a_plain_module_is_the_last_linear_of_the_head_that_is_named():
    assert Adapter(tiny.mlp(), ("2", "4")).feature_layer() == "4"
    assert Adapter(tiny.mlp(), ("2",)).feature_layer() == "2"
    assert Adapter(nn.Sequential(tiny.mlp(), nn.ReLU()), ("0",)).feature_layer() == "0.4"
    with pytest.raises(UnsupportedModelError, match="Sequential has no classifier.*it has no head"):
        Adapter(tiny.mlp(), ()).feature_layer()
    with pytest.raises(UnsupportedModelError, match=r"its head \['grouped'\] holds no Linear"):
        Adapter(tiny.ConvNet(), ("grouped",)).feature_layer()
