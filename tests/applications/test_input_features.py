import numpy as np
import pytest
import torch

from remos_hf.adapters.flow_recording import flow_of
from remos_hf.applications.input_features import InputFeatures, Observed, last_layers
from remos_hf.errors import LayerMismatchError, NonFiniteError, UnsupportedModelError
from remos_hf.profiling.reference import Reference, profile_reference
from remos_hf.slicing.contributions import contributions
from remos_hf.slicing.effective_path import effective_path
from tests import tiny

BATCHES = [batch for batch, _ in tiny.image_batches(2)]
LAYERS = ("grouped.weight", "down.weight")


def model_and_reference():
    model = tiny.ConvNet().eval()
    return model, profile_reference(model, BATCHES)


def test_a_slice_is_what_each_sample_contributes_to_each_weight():
    model, reference = model_and_reference()
    seen = InputFeatures("slice", LAYERS, reference).of(model, BATCHES)
    each = contributions(model, BATCHES, reference, each_sample=LAYERS).each_sample
    assert np.array_equal(seen.features, torch.cat([each[name].flatten(1) for name in LAYERS], 1).numpy())
    assert seen.features.dtype == np.int8 and seen.features.any()
    assert seen.predicted.tolist() == model(torch.cat(BATCHES)).argmax(1).tolist()


def test_theta_is_handed_on():
    model, reference = model_and_reference()
    less, more = (InputFeatures("slice", LAYERS, reference, theta).of(model, BATCHES) for theta in (0.0, 0.7))
    assert (less.features != 0).sum() > (more.features != 0).sum()


def test_a_path_is_that_of_the_largest_positive_effects():
    model, _ = model_and_reference()
    seen = InputFeatures("effective_path", LAYERS).of(model, BATCHES)
    each = effective_path(model, BATCHES, each_sample=LAYERS).each_sample
    assert np.array_equal(seen.features, torch.cat([each[name].flatten(1) for name in LAYERS], 1).numpy())


def test_a_feature_map_is_what_a_layer_gives():
    model, _ = model_and_reference()
    seen = InputFeatures("feature_map", ("grouped.weight",)).of(model, BATCHES)
    flow = flow_of(model, torch.cat(BATCHES))
    (made,) = (flow.values[one.output] for one in flow.operations if "grouped" in one.name)
    assert np.allclose(seen.features, made.flatten(1), atol=1e-6)
    logits = InputFeatures("logits").of(model, BATCHES).features
    assert np.allclose(logits, model(torch.cat(BATCHES)).detach(), atol=1e-5)


def test_the_last_layers_are_those_before_the_one_that_makes_the_logits():
    model, _ = model_and_reference()
    assert last_layers(model, BATCHES[0]) == ("grouped.weight",)
    assert last_layers(model, BATCHES[0], 3) == ("grouped.weight", "depthwise.weight", "down.weight")
    assert last_layers(tiny.bert(), tiny.text_batches(1)[0])[0] == "bert.pooler.dense.weight"
    for count in (0, 9):
        with pytest.raises(ValueError, match="but"):
            last_layers(model, BATCHES[0], count)


def test_a_slice_of_the_layer_that_makes_the_logits_tells_the_label_alone():
    model, reference = model_and_reference()
    seen = InputFeatures("slice", ("head.weight",), reference).of(model, BATCHES)
    rows = seen.features.reshape(len(seen), 4, 6).any(2)
    assert np.array_equal(rows.argmax(1), seen.predicted) and (rows.sum(1) == 1).all()


def test_samples_can_be_chosen_and_put_together():
    seen = Observed(np.arange(6).reshape(3, 2), np.array([0, 1, 2]))
    some = seen[np.array([2, 0])] + seen[:1]
    assert some.features[:, 0].tolist() == [4, 0, 0] and some.predicted.tolist() == [2, 0, 0] and len(some) == 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kind": "path", "layers": LAYERS}, "kind is"),
        ({"kind": "feature_map"}, "last_layers"),
        ({"kind": "logits", "layers": LAYERS}, "no layers"),
        ({"kind": "slice", "layers": LAYERS}, "profile_reference"),
        ({"kind": "feature_map", "layers": LAYERS, "reference": Reference()}, "no reference"),
    ],
)
def test_what_looks_at_nothing_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        InputFeatures(**given)


def test_inputs_that_cannot_be_looked_at_are_refused():
    model, _ = model_and_reference()
    with pytest.raises(LayerMismatchError, match="'conv1.weight'"):
        InputFeatures("feature_map", ("conv1.weight",)).of(model, BATCHES)
    with pytest.raises(ValueError, match="no input"):
        InputFeatures("logits").of(model, [])
    with pytest.raises(UnsupportedModelError, match="one label"):
        InputFeatures("logits").of(tiny.llama(), tiny.text_batches(1))
    for kind, layers in (("logits", ()), ("feature_map", LAYERS)):
        with pytest.raises(NonFiniteError):
            InputFeatures(kind, layers).of(model, [torch.full((2, 3, 8, 8), float("nan"))])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_model_is_refused_by_what_it_runs():
    model = torch.ao.quantization.quantize_dynamic(tiny.mlp().eval(), {torch.nn.Linear}, dtype=torch.qint8).eval()
    with pytest.raises(UnsupportedModelError, match="'linear_dynamic'"):
        InputFeatures("logits").of(model, [torch.randn(2, 5)])
