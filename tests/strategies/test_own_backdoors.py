import copy
import dataclasses

import pytest
import torch
from torch import nn

from remos_hf.layers import sliceable_layers
from remos_hf.scanning.own_triggers import OwnTokens, count_flips
from remos_hf.slicing.ordinal import unpack
from remos_hf.strategies.own_backdoors import OwnBackdoors, rule_of_scores, scores_of, teach
from remos_hf.strategies.short_runs import Samples, free_copy
from remos_hf.strategies.slice_and_reset import Random, SliceAndReset
from tests import tiny


def data(seed=0):
    batches = [tiny.pad(tiny.dataset()[at : at + 8]) for at in range(0, 24, 8)]
    return tiny.student_data(lambda: batches, seed=seed)


def kept_by(rule, layers, share):
    selection = rule(layers, None, share, 0)
    return [unpack(bits, layer.shape) for bits, layer in zip(selection.bits, layers, strict=True)]


def test_channels_score_by_the_size_of_what_backdoors_change_and_by_how_far_they_agree():
    one = {"a": torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([[1.0]])}
    other = {"a": torch.tensor([[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0]]), "b": torch.tensor([[0.0]])}
    root = 2**0.5
    unit = (5 / root + 1 / root + 1 / root + 0.5) / 4
    found = scores_of([one, other], 3.0)
    assert torch.allclose(found["a"], torch.tensor([5, 1, 1]) / root / unit + torch.tensor([3.0, 0, 0]))
    assert torch.allclose(found["b"], torch.tensor([0.5 / unit]))
    with_it, without = (scores_of([one, one, other], weight)["a"] for weight in (3.0, 0.0))
    assert torch.allclose(with_it - without, torch.tensor([3.0, 1.0, 1.0]))


def test_the_rows_of_the_highest_score_go_and_just_as_many_weights_as_asked_for():
    net = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(4, 6, 1, groups=2))
    layers = list(sliceable_layers(net).values())
    scores = {"0": torch.tensor([0.1, 0.9, 0.2]), "1": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.8, 0.0])}
    linear, grouped = kept_by(rule_of_scores(scores), layers, 1 - 7 / 24)
    assert (~linear).nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [1, 3], [2, 0]]  # the last row in part
    assert (~grouped).nonzero()[:, 0].tolist() == [4, 4]


def test_rows_of_a_weight_whose_inputs_come_first_are_its_columns():
    layer = next(layer for name, layer in sliceable_layers(tiny.gpt2()).items() if name.endswith("mlp.c_fc"))
    (kept,) = kept_by(rule_of_scores({layer.name: torch.arange(64.0)}), [layer], 1 - 16 / layer.numel)
    assert (~kept).nonzero()[:, 1].unique().tolist() == [63]


@pytest.mark.parametrize("attention", [False, True])
def test_attention_goes_last_unless_it_competes(attention):
    layers = list(sliceable_layers(tiny.bert()).values())
    scores = {layer.name: torch.full((layer.out_neurons,), float("query" in layer.name)) for layer in layers}
    kept = kept_by(rule_of_scores(scores, attention=attention), layers, 0.9)
    touched = {layer.name for layer, bits in zip(layers, kept, strict=True) if not bits.all()}
    assert any("query" in name for name in touched) is attention
    assert any("attention" not in name for name in touched) is not attention


def test_a_taught_trigger_turns_samples_and_an_untaught_one_does_not():
    trigger, student = OwnTokens(1, (0, 1, 2), seed=4, longest=64, unseen=True), tiny.bert(layers=1)
    samples = Samples(data(), student.device, 0)
    run = {"steps": 20, "batch_size": 16, "learning_rate": 3e-2, "seed": 0}
    taught, clean = teach(free_copy(student), samples, (trigger,), **run), teach(free_copy(student), samples, **run)
    flipped, hosts = count_flips(taught, samples.batches, trigger)
    untaught, others = count_flips(clean, samples.batches, trigger)
    assert flipped >= 0.9 * hosts > 5 and untaught <= 0.5 * others


def test_runs_of_one_seed_are_the_same_and_leave_the_random_state_and_embeddings_alone():
    models = [free_copy(tiny.bert(layers=1)) for _ in range(3)]
    samples, state = Samples(data(), torch.device("cpu"), 0), torch.random.get_rng_state()
    run = {"steps": 2, "batch_size": 8, "learning_rate": 1e-2, "seed": 1, "embeddings": False}
    one, other = (teach(model, samples, **run).state_dict() for model in models[:2])
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)
    changed = {name for name, value in models[2].state_dict().items() if not torch.equal(value, one[name])}
    assert changed and not any("embeddings.weight" in name for name in changed)


def test_the_slice_is_as_large_as_any_rules_and_the_rest_of_the_student_is_left_alone():
    student, teacher = tiny.bert(), tiny.bert()
    done = OwnBackdoors(0.8, num=2).prepare(student, data())
    other = Random(0.8).prepare(tiny.bert(), data())
    assert done.relevant_slice.num_kept == other.relevant_slice.num_kept
    assert done.relevant_slice.rule == "own_backdoors"
    for (name, weight), was in zip(student.named_parameters(), teacher.parameters(), strict=True):
        kept = done.relevant_slice.kept.get(name)
        assert torch.equal(weight, was if kept is None else was * kept) and weight.requires_grad


def test_the_record_says_which_triggers_were_learned_and_what_it_cost():
    done = OwnBackdoors(0.8, num=2, learning_rate=1e-2).prepare(tiny.bert(), data())
    told = done.details["own_backdoors"]
    assert told["samples"] == 24 and told["steps"] == 3  # no sample more than twice
    assert len(told["triggers"]) == 2
    assert {"tokens", "label", "flipped", "hosts", "flipped_without", "hosts_without"} <= told["triggers"][0].keys()
    assert done.seconds["profile"] > 0


def test_a_seed_makes_the_same_slice_again_and_another_one_another():
    one, again, other = (OwnBackdoors(0.7, num=2).prepare(tiny.bert(), data(seed)).relevant_slice for seed in (1, 1, 2))
    assert one == again and one.kept.bits.keys() == other.kept.bits.keys() and one != other


def test_sixteen_bit_teachers_are_scored_in_full_precision():
    student = tiny.bert().bfloat16()
    done = OwnBackdoors(0.8, num=2).prepare(student, data())
    assert done.relevant_slice.num_kept and student.dtype == torch.bfloat16


def test_images_are_scored_too():
    net = tiny.ConvNet()
    batches = [(torch.randn(6, 3, 8, 8), torch.arange(6) % 4)]
    done = OwnBackdoors(0.8, num=2, head=("head",)).prepare(copy.deepcopy(net), tiny.student_data(lambda: batches))
    assert "side" in done.details["own_backdoors"]["triggers"][0]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"num": 1}, "num is .* at least 2, but got 1"), ({"steps": 0}, "steps"), ({"learning_rate": 0.0}, "above 0")],
)
def test_values_that_no_run_could_use_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        OwnBackdoors(0.8, **wrong)


def test_nothing_that_shows_an_attack_can_be_given():
    ours, theirs = ({one.name for one in dataclasses.fields(kind)} for kind in (OwnBackdoors, SliceAndReset))
    assert ours - theirs == {"num", "steps", "batch_size", "learning_rate", "agreement", "attention"}
