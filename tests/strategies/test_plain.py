import pytest
import torch
from torch import nn

from remos_hf.strategies.plain import Finetune, Retrain
from tests import tiny


def no_data(samples):
    pytest.fail("needs no data")


def test_finetune_keeps_everything():
    student, teacher = tiny.bert(), tiny.bert()
    assert Finetune().prepare(student, no_data).relevant_slice is None
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.ConvNet], ids=lambda f: f.__name__)
def test_retrain_keeps_no_trained_weight_and_no_running_statistic(make):
    student = make()
    with torch.no_grad():
        for tensor in student.state_dict().values():
            tensor.fill_(7)
    Retrain(seed=1).prepare(student, no_data)
    assert not any((value == 7).any() for key, value in student.state_dict().items() if "position_ids" not in key)


def test_retrain_leaves_the_global_random_state_alone():
    student = tiny.bert()
    state = torch.random.get_rng_state()
    Retrain().prepare(student, no_data)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_retrain_starts_like_a_new_model():
    student = tiny.bert(hidden=64)
    Retrain().prepare(student, no_data)
    assert student.bert.encoder.layer[0].intermediate.dense.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not student.bert.encoder.layer[0].intermediate.dense.bias.any()


def test_retrain_refuses_parameters_it_cannot_reset():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(TypeError, match=r"'own' \(Own\) has parameters and no reset_parameters"):
        Retrain().prepare(nn.ModuleDict({"own": Own()}), no_data)
