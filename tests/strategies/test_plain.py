import pytest
import torch
import transformers
from torch import nn

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.renofeation import DeltaR, Renofeation
from remos_hf.strategies.student_data import StudentData
from tests import tiny

no_data = StudentData(lambda samples: pytest.fail("needs no data"))


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


class Own(nn.Module):
    """Holds a parameter of its own, and cannot reset it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 7.0))
        self.inner = nn.Linear(2, 2)


class StartedByItsLibrary(Own):
    def init_weights(self, mode=""):
        with torch.no_grad():
            self.scale.fill_(1.0)
            self.inner.weight.mul_(2)  # after the child has reset itself


def started(make, seed=0):
    student = nn.ModuleDict({"own": make()})
    Retrain(seed=seed).prepare(student, no_data)
    return student.own


def test_retrain_lets_a_module_start_itself_as_its_library_does():
    own = started(StartedByItsLibrary)
    torch.manual_seed(0)
    inner = nn.Linear(2, 2)
    assert own.scale.tolist() == [1.0, 1.0]
    assert torch.equal(own.inner.weight, 2 * inner.weight) and torch.equal(own.inner.bias, inner.bias)


class Scaled(Own):
    def init_weights(self):
        with torch.no_grad():
            self.scale.mul_(0.5)  # what is left of a trained value is not fresh


class Asking(Own):
    def init_weights(self, mode):
        raise AssertionError("nobody can say which mode")


@pytest.mark.parametrize("make", [Own, Scaled, Asking], ids=lambda kind: kind.__name__)
def test_retrain_refuses_parameters_that_nothing_starts_anew_and_leaves_the_model_whole(make):
    student = nn.ModuleDict({"own": make(), "linear": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(TypeError, match=rf"'own\.scale' a fresh value: 'own' \({make.__name__}\) has no reset_param"):
        Retrain().prepare(student, no_data)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.timm
def test_retrain_starts_a_vision_transformer_of_timm_as_timm_does():
    import timm

    student = timm.create_model("test_vit", init_values=0.5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7)
    Retrain(seed=1).prepare(student, no_data)
    assert not any((parameter == 7).any() for parameter in student.parameters())
    assert student.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
    assert 0 < student.cls_token.std().item() < 1e-5
    assert (student.blocks[0].ls1.gamma == 0.5).all()


@pytest.mark.timm
def test_retrain_refuses_a_convnext_of_timm_whose_layer_scale_nothing_starts_anew():
    import timm

    with pytest.raises(TypeError, match=r"stages\.0\.blocks\.0\.gamma"):
        Retrain().prepare(timm.create_model("test_convnext"), no_data)


def same(student, before):
    return all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.ConvNet], ids=lambda f: f.__name__)
@pytest.mark.parametrize("recipe", [Retrain, DeltaR, Renofeation])
def test_a_frozen_parameter_that_would_be_drawn_for_good_is_refused_and_the_student_left_whole(make, recipe):
    student = make()
    name, frozen = next((name, one) for name, one in student.named_parameters() if one.dim() > 1)
    frozen.requires_grad_(False).fill_(7)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=f"1 are frozen, the first of them '{name}', .* requires_grad"):
        recipe(head=()).prepare(student, no_data) if recipe is not Retrain else Retrain().prepare(student, no_data)
    assert same(student, before)


def test_a_frozen_parameter_that_its_library_does_not_draw_is_none_to_refuse():
    student = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=32, dim=8, n_layers=1, n_heads=2, hidden_dim=16, sinusoidal_pos_embds=True
        )
    )
    fixed = student.distilbert.embeddings.position_embeddings.weight.requires_grad_(False).clone()
    Retrain().prepare(student, no_data)
    assert torch.equal(student.distilbert.embeddings.position_embeddings.weight, fixed)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (lambda: nn.Linear(16, 5), r"'classifier.weight' is \(5, 16\), and the config makes it \(2, 16\)"),
        (lambda: nn.Sequential(nn.Linear(16, 2)), "'classifier.0.weight' is .* makes none"),
        (lambda: nn.Linear(16, 2, bias=False), "'classifier.bias' is not in the student"),
    ],
)
def test_a_head_that_is_not_the_configs_is_refused_by_its_name(head, told):
    student = tiny.bert()
    student.classifier = head()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=f"{told}.*num_labels=2"):
        Retrain().prepare(student, no_data)
    assert same(student, before)
