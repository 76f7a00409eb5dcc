import pytest
import torch
from torch import nn

from remos_hf.applications.class_accuracy import class_accuracy
from remos_hf.errors import NonFiniteError
from tests import tiny

# Its logits are its inputs.
ECHO = nn.Linear(3, 3, bias=False)
ECHO.weight.data.copy_(torch.eye(3))


def test_three_rates_are_told_apart():
    logits = torch.tensor([[3.0, 1, 0], [1, 2, 3], [0, 1, 5], [0, 5, 1], [9, 0, 1]])
    labels = torch.tensor([0, 1, 2, 2, 2])
    found = class_accuracy(ECHO, [(logits[:2], labels[:2]), (logits[2:], labels[2:])], [1, 0])
    assert (found.target.count, found.target.num_samples) == (1, 2)
    assert (found.among.count, found.among.num_samples) == (2, 2)
    assert (found.others.count, found.others.num_samples) == (1, 3)


def test_mappings_and_the_mode_of_the_model():
    model, batches = tiny.bert().train(), tiny.text_batches(2)
    found = class_accuracy(model, batches, [1])
    assert model.training
    assert found.target.num_samples + found.others.num_samples == 8
    assert found.among.value == 1.0


def test_wrong_input_is_refused():
    batch = torch.randn(2, 3), torch.tensor([0, 1])
    for batches, classes, told in (
        ([batch], [], "at least one"), ([batch], [3], "3 labels"), ([], [0], "no sample"), ([batch[0]], [0], "labels"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            class_accuracy(ECHO, batches, classes)
    for classes in ([1.0], [True], ["cat"]):
        with pytest.raises(TypeError, match="by their whole numbers"):
            class_accuracy(ECHO, [batch], classes)
    with pytest.raises(ValueError, match="a batch of 2 has 1 labels"):
        class_accuracy(ECHO, [(batch[0], batch[1][:1])], [0])
    with pytest.raises(TypeError, match="one class a sample"):  # one-hot of as many samples as there are classes
        class_accuracy(ECHO, [(torch.eye(3), torch.eye(3).long())], [0])
    with pytest.raises(NonFiniteError):
        class_accuracy(ECHO, [(torch.full((1, 3), float("nan")), torch.tensor([0]))], [0])


def test_a_label_that_the_model_does_not_have_is_refused():
    for label in (-100, 3):
        with pytest.raises(ValueError, match=f"label {label}, but the model has 3"):
            class_accuracy(ECHO, [(torch.randn(2, 3), torch.tensor([0, label]))], [0])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_model_is_measured_too():
    model = torch.ao.quantization.quantize_dynamic(tiny.mlp().eval(), {nn.Linear}, dtype=torch.qint8)
    assert class_accuracy(model, [(torch.randn(2, 5), torch.tensor([0, 1]))], [0]).target.num_samples == 1
