import numpy as np
import pytest
import torch
from torch import nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError
from remos_hf.layers import sliceable_layers
from remos_hf.profiling.data_pass import observe
from remos_hf.strategies.relevance import MeanActivations, Relevance, activation_rule, gradient_rule
from remos_hf.strategies.student_data import StudentData
from tests import tiny


def mean_ranks(values):
    """Slow and obvious: smaller values, and half of the other equal ones."""
    return np.array([(values < one).sum() + ((values == one).sum() - 1) / 2 for one in values])


def kept_slowly(relevance, magnitude, num_reset):
    scores = mean_ranks(relevance) - mean_ranks(magnitude)
    threshold = np.sort(scores)[num_reset - 1]
    less, equal = (scores < threshold).sum(), (scores == threshold).sum()
    return scores >= threshold if num_reset - less < equal - (num_reset - less) else scores > threshold


def unpacked(selection, layers):
    return np.concatenate(
        [
            np.unpackbits(bits.numpy(), count=layer.numel, bitorder="little")
            for bits, layer in zip(selection.bits, layers, strict=True)
        ]
    ).astype(bool)


@pytest.mark.parametrize("ties", [False, True])
def test_the_gradient_rule_keeps_what_a_slow_reference_keeps(ties):
    layers = list(sliceable_layers(tiny.mlp()).values())
    generator = torch.Generator().manual_seed(3)
    gradients = {layer.name: torch.rand(layer.shape, generator=generator) for layer in layers}
    if ties:
        gradients = {name: (4 * one).round() for name, one in gradients.items()}
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(8).round_()
    found = gradient_rule(gradients)(layers, None, 0.7, 0)
    flat = np.concatenate([gradients[layer.name].flatten().numpy() for layer in layers])
    magnitude = np.concatenate([layer.weight.abs().flatten().numpy() for layer in layers])
    expected = kept_slowly(flat, magnitude, len(flat) - round(0.7 * len(flat)))
    assert np.array_equal(unpacked(found, layers), expected) and found.num_kept == expected.sum()


def test_the_activation_rule_keeps_what_a_slow_reference_keeps():
    model = tiny.ConvNet()
    layers = list(sliceable_layers(model, exclude=("head",)).values())
    generator = torch.Generator().manual_seed(3)
    # Multiples of 2^-4 below a largest of 1 are exact in the rule's own units.
    means = {}
    for layer in layers:
        ends = torch.randint(0, 16, (layer.in_neurons + layer.out_neurons,), generator=generator).double() / 16
        ends[0] = 1
        means[layer.name] = ends[: layer.in_neurons], ends[layer.in_neurons :]
    found = activation_rule(means)(layers, None, 0.6, 0)
    relevance = []
    for layer in layers:
        inputs, outputs = means[layer.name]
        per_group = layer.out_neurons // layer.groups
        for output in range(layer.out_neurons):
            first = output // per_group * layer.shape[1]
            for one in range(layer.shape[1]):
                relevance += [float(outputs[output] + inputs[first + one])] * layer.shape[2:].numel()
    magnitude = np.concatenate([layer.weight.abs().flatten().numpy() for layer in layers])
    expected = kept_slowly(np.array(relevance), magnitude, len(magnitude) - round(0.6 * len(magnitude)))
    assert np.array_equal(unpacked(found, layers), expected)


def means_of(model, batches):
    seen = MeanActivations()
    observe(model, batches, [seen], head=(), progress=False)
    return seen


def test_activations_are_means_of_absolute_values_over_real_positions():
    model, batches = tiny.bert(), tiny.text_batches(2)
    name = "bert.encoder.layer.1.intermediate.dense"
    read, made = [], []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, output: read.append(args[0].detach()) or made.append(output.detach())
    )
    for batch in batches:
        model(**batch)
    hook.remove()
    real = [batch["attention_mask"].bool() for batch in batches]
    for found, values in zip(means_of(model, batches).means()[name], (read, made), strict=True):
        rows = torch.cat([one[mask] for one, mask in zip(values, real, strict=True)]).double()
        assert torch.allclose(found, rows.abs().mean(0), atol=1e-5)


def test_padding_never_counts():
    model, (batch,) = tiny.bert(), tiny.text_batches(1)
    padded = {key: nn.functional.pad(value, (0, 3)) if value.dim() == 2 else value for key, value in batch.items()}
    padded["input_ids"][:, -3:] = 7
    one, other = means_of(model, [batch]).means(), means_of(model, [padded]).means()
    assert one.keys() == other.keys()
    assert all(torch.allclose(a, b, atol=1e-5) for key in one for a, b in zip(one[key], other[key], strict=True))


def test_sums_add_exactly_over_batches():
    batches = tiny.text_batches(4)
    whole = means_of(tiny.bert(), batches).state()
    parts = [means_of(tiny.bert(), batches[start::2]).state() for start in (0, 1)]
    assert all(torch.equal(whole[key], parts[0][key] + parts[1][key]) for key in whole)


def test_fused_outputs_are_put_together():
    layers = adapter_for(tiny.bloom()).layers()
    found = means_of(tiny.bloom(), tiny.text_batches(1)).means()
    assert all(found[name][1].shape == (layer.out_neurons,) for name, layer in layers.items())


def test_what_is_not_finite_is_named():
    batches = tiny.text_batches(1)
    model = tiny.bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0] = torch.inf
    with pytest.raises(NonFiniteError, match="bert.encoder.layer.1.output.dense"):
        means_of(model, batches)


@pytest.mark.parametrize("score", ["activation", "gradient"])
def test_it_slices_layer_by_layer_and_leaves_the_head_as_it_is(score):
    student, teacher = tiny.bert(), tiny.bert()
    done = Relevance(0.8, score=score, head_steps=3).prepare(student, tiny.student_data())
    assert done.relevant_slice.rule == score and done.relevant_slice.scope == "layer"
    assert all(abs(share - 0.8) < 0.03 for share in done.relevant_slice.share_by_parameter().values())
    assert done.details["relevance"]["samples"] == 12 and done.details["relevance"]["score"] == score
    assert done.seconds["profile"] > 0
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)


def test_the_gradient_is_of_the_students_own_loss():
    batches = tiny.text_batches()
    swapped = [{**batch, "labels": torch.zeros_like(batch["labels"])} for batch in batches]
    slices = [
        Relevance(0.5, score="gradient", head_steps=3).prepare(tiny.bert(), StudentData(lambda _, one=one: one))
        for one in (batches, swapped)
    ]
    assert slices[0].relevant_slice != slices[1].relevant_slice


@pytest.mark.parametrize(
    ("options", "words"),
    [({"score": "coverage"}, "score is"), ({"embeddings": True}, "no embedding rows"), ({"head_steps": -1}, "head_st")],
)
def test_values_that_no_run_could_use_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Relevance(0.8, **options)
