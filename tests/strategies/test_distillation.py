import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.distillation import feature_distance, feature_modules, features_of, unexplained_share
from tests import tiny


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return ResNetForImageClassification(config).eval()


def test_blocks_of_transformers_and_stages_of_convolutional_nets_are_found():
    assert list(feature_modules(adapter_for(tiny.bert()))) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert len(feature_modules(adapter_for(tiny.vit()))) == 2
    assert [name.rpartition("stages")[2] for name in feature_modules(adapter_for(resnet()))] == [".0", ".1"]
    plain = feature_modules(adapter_for(tiny.ConvNet(), ("head",)))
    assert list(plain) == ["stem", "norm", "conv", "down", "depthwise", "grouped"]
    inside = feature_modules(adapter_for(ImageClassifier(tiny.ConvNet(), ("head",))))
    assert list(inside) == [f"body.{name}" for name in plain]


def test_named_layers_are_taken_and_unknown_ones_refused():
    adapter = adapter_for(tiny.ConvNet(), ("head",))
    assert list(feature_modules(adapter, ("down",))) == ["down"]
    with pytest.raises(UnsupportedModelError, match="no such modules"):
        feature_modules(adapter, ("layer1",))
    with pytest.raises(UnsupportedModelError, match=r"Name some: layers=\(\.\.\.\)"):
        feature_modules(adapter_for(nn.Sequential(nn.ReLU()), ()))


def test_features_are_the_outputs_of_the_modules_without_a_graph():
    model = tiny.bert()
    batch = tiny.text_batches(1)[0]
    found = features_of(adapter_for(model), {"one": model.bert.encoder.layer[0]}, batch)["one"]
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[1]
    assert torch.equal(found, expected) and not found.requires_grad


def test_the_distance_is_the_mean_over_all_real_elements_added_up_over_layers():
    generator = torch.Generator().manual_seed(0)
    made, wanted = ({"a": torch.randn(2, 3, 4, generator=generator), "b": torch.randn(2, 5, 2, 2, generator=generator)}
                    for _ in range(2))  # fmt: skip
    real = torch.tensor([[True, True, False], [True, False, False]])
    squares = [(made["a"][row, place, unit] - wanted["a"][row, place, unit]).item() ** 2
               for row in range(2) for place in range(3) for unit in range(4) if real[row, place]]  # fmt: skip
    expected = sum(squares) / len(squares) + (made["b"] - wanted["b"]).square().mean().item()
    assert feature_distance(made, wanted, [real]).item() == pytest.approx(expected, rel=1e-5)


def test_nothing_at_padding_reaches_the_distance_or_its_gradient():
    made, wanted = torch.ones(1, 2, 3, requires_grad=True), torch.zeros(1, 2, 3)
    broken = torch.cat([wanted[:, :1], torch.full((1, 1, 3), torch.nan)], 1)
    distance = feature_distance({"a": made}, {"a": broken}, [torch.tensor([[True, False]])])
    assert distance.item() == 1


def test_the_share_that_is_not_explained_is_0_for_the_teachers_features_and_1_for_their_mean():
    wanted = {"maps": torch.randn(3, 4, 5, 5), "tokens": torch.randn(3, 5, 4), "pooled": torch.randn(3, 4)}
    axes = {"maps": (0, 2, 3), "tokens": (0, 1), "pooled": (0,)}
    means = {name: one.mean(axes[name], keepdim=True).expand_as(one) for name, one in wanted.items()}
    for name, one in wanted.items():
        assert unexplained_share({name: one}, {name: one}, []) == 0
        assert unexplained_share({name: means[name]}, {name: one}, []).item() == pytest.approx(1)
    both = unexplained_share({**means, "maps": wanted["maps"]}, wanted, [])
    assert both.item() == pytest.approx(2 / 3)


def test_features_that_do_not_vary_in_a_batch_count_nothing():
    made = torch.ones(1, 4, requires_grad=True)
    share = unexplained_share({"pooled": made}, {"pooled": torch.zeros(1, 4)}, [])
    share.backward()
    assert share == 0 and not made.grad.any()
