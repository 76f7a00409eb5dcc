import copy

import pytest
import torch

from remos_hf.errors import LayerMismatchError, TeacherMismatchError
from remos_hf.slicing.relevant_slice import choose_slice
from remos_hf.slicing.reset import reset_outside
from tests import tiny


@pytest.fixture
def teacher():
    return tiny.bert()


@pytest.fixture
def relevant(teacher):
    return choose_slice(teacher, slice_ratio=0.7, rule="random")


@pytest.mark.parametrize("to", ["zero", "init"])
def test_kept_weights_stay_bit_for_bit_and_the_others_go(teacher, relevant, to):
    student = reset_outside(copy.deepcopy(teacher), relevant, to=to)
    theirs = dict(teacher.named_parameters())
    for name, ours in student.named_parameters():
        if name not in relevant.kept:
            assert torch.equal(ours, theirs[name])
            continue
        kept = relevant.kept[name]
        assert torch.equal(ours[kept], theirs[name][kept])
        if to == "zero":
            assert not ours[~kept].any()
        else:
            assert not torch.isclose(ours[~kept], theirs[name][~kept]).any()
            assert ours[~kept].std().item() == pytest.approx(teacher.config.initializer_range, rel=0.3)


def test_fresh_values_depend_on_the_seed_alone(teacher, relevant):
    def reset(seed):
        torch.randn(3)  # the global state must not matter
        return reset_outside(copy.deepcopy(teacher), relevant, to="init", seed=seed).state_dict()

    one, same, other = reset(1), reset(1), reset(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_reset_weights_train_again(teacher, relevant):
    student = reset_outside(teacher, relevant)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    student(**tiny.text_batches(1)[0]).loss.backward()
    optimizer.step()
    name = next(iter(relevant.kept))
    reset = dict(student.named_parameters())[name][~relevant.kept[name]]
    assert (reset != 0).float().mean() > 0.9


def test_a_new_head_is_no_other_teacher(teacher, relevant):
    with torch.no_grad():
        teacher.classifier.weight.normal_()
    reset_outside(teacher, relevant)


@pytest.mark.parametrize("make", [lambda: tiny.bert(seed=1), lambda: tiny.bert().bfloat16()])
def test_another_teacher_is_refused_before_anything_is_written(relevant, make):
    other = make()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(TeacherMismatchError):
        reset_outside(other, relevant)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    reset_outside(other, relevant, verify_teacher=False)


def test_another_architecture_is_refused_even_unverified(relevant):
    with pytest.raises(LayerMismatchError):
        reset_outside(tiny.gpt2(), relevant, verify_teacher=False)


def test_an_unknown_way_to_reset_is_refused(teacher, relevant):
    with pytest.raises(ValueError, match="'zero' or 'init', but got 'mean'"):
        reset_outside(teacher, relevant, to="mean")


def test_a_tied_weight_is_reset_once_for_all_its_names():
    model = tiny.mlp(sizes=(4, 4, 4))
    model[2].weight = model[0].weight
    relevant = choose_slice(model, slice_ratio=0.5, rule="random")
    reset_outside(model, relevant)
    assert model[2].weight is model[0].weight
    assert (model[2].weight == 0).sum() == 8
