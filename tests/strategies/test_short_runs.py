import pytest
import torch
from torch import nn

from remos_hf.errors import NonFiniteError, RemosError
from remos_hf.strategies import short_runs
from remos_hf.strategies.short_runs import (
    Samples,
    check_counts,
    labelled_loss,
    mean_gradient,
    short_run,
    with_trained_head,
)
from remos_hf.strategies.student_data import StudentData
from tests import tiny

CPU = torch.device("cpu")


def samples_of(batches, seed=0):
    return Samples(StudentData(lambda samples: batches), CPU, seed)


def numbers(count=40):
    """A tuple batch sorted by label: ten batches of one label each, its input the row's number."""
    inputs = torch.arange(count, dtype=torch.float32)[:, None]
    labels = (inputs[:, 0] >= count / 2).long()
    return [(inputs[start : start + 4], labels[start : start + 4]) for start in range(0, count, 4)]


def test_a_step_sees_samples_of_several_batches_without_drawing_one_twice():
    samples = samples_of(numbers())
    for _ in range(5):
        drawn = samples.some(16)
        rows = torch.cat([inputs[:, 0] for inputs, _ in drawn])
        assert len(drawn) == 4 and len(rows) == 16 and len(rows.unique()) == 16
        assert all(torch.equal(labels, (inputs[:, 0] >= 20).long()) for inputs, labels in drawn)
    assert len({tuple(inputs[:, 0].tolist()) for _ in range(9) for inputs, _ in samples.some(8)}) > 9


def test_more_batches_are_drawn_from_where_they_are_small():
    assert sum(len(inputs) for inputs, _ in samples_of(numbers()).some(32)) == 32


def test_the_gradient_is_that_of_the_mean_over_samples_however_they_are_cut():
    model, batches = tiny.bert(), tiny.text_batches(padded=False)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    weight = {"w": model.bert.encoder.layer[0].intermediate.dense.weight}
    found, count = mean_gradient(model, samples_of(batches), weight)
    weight["w"].requires_grad_()
    (expected,) = torch.autograd.grad(model(**whole).loss, weight["w"])
    assert count == 12
    assert torch.allclose(found["w"], expected, atol=1e-7)
    uneven = [{key: value[:1] for key, value in whole.items()}, {key: value[1:] for key, value in whole.items()}]
    assert torch.allclose(mean_gradient(model, samples_of(uneven), weight)[0]["w"], expected, atol=1e-7)


def test_absolute_gradients_of_batches_do_not_cancel():
    model = nn.Linear(1, 2, bias=False)
    both = [(torch.ones(2, 1), torch.tensor([0, 0])), (torch.ones(2, 1), torch.tensor([1, 1]))]
    nn.init.zeros_(model.weight)
    weight = {"w": model.weight}
    assert mean_gradient(model, samples_of(both), weight)[0]["w"].abs().max() == 0
    assert mean_gradient(model, samples_of(both), weight, absolute=True)[0]["w"].min() == 0.5


def test_a_head_learns_on_a_copy_and_nothing_else_changes():
    student, batches = tiny.bert(), tiny.text_batches(4)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    asked, steps = with_trained_head(student, samples_of(batches), steps=25, head=None)
    assert steps == 25
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    changed = {key for key, value in asked.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith(("classifier", "bert.pooler")) for key in changed)
    losses = [sum(labelled_loss(model, batch).item() for batch in batches) for model in (student, asked)]
    assert losses[1] < losses[0]
    assert not any(parameter.requires_grad for parameter in asked.parameters())


def test_a_language_model_has_no_head_to_train():
    tied = tiny.llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    batches = [{**batch, "labels": batch["input_ids"]} for batch in tiny.text_batches()]
    assert with_trained_head(tied, samples_of(batches), steps=5, head=None)[1] == 0


def test_a_run_ends_when_it_is_told_to_and_takes_the_penalty_along():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.25)
    losses = short_run(
        nn.Identity(), samples_of(numbers()), lambda batch: 0 * weight.sum() + 3, optimizer, steps=9,
        penalty=lambda: weight.sum(), until=lambda: float(weight.detach()) <= 0.5,
    )  # fmt: skip
    assert losses == [3, 3] and float(weight) == 0.5 and not weight.requires_grad


def test_a_loss_that_is_not_finite_takes_no_step():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(NonFiniteError, match="Step 0 of the run before training has the loss nan"):
        short_run(
            nn.Identity(), samples_of(numbers()), lambda batch: weight.sum() * torch.nan,
            torch.optim.SGD([weight], 1.0), steps=2,
        )  # fmt: skip
    assert float(weight) == 1


def test_what_gives_no_loss_is_refused_in_plain_words():
    without = [{key: value for key, value in batch.items() if key != "labels"} for batch in tiny.text_batches()]
    with pytest.raises(ValueError, match=r"\['attention_mask', 'input_ids'\] the model gives none"):
        labelled_loss(tiny.bert(), without[0])
    with pytest.raises(ValueError, match="no sample to start"):
        mean_gradient(tiny.bert(), samples_of([]), {"w": nn.Parameter(torch.ones(1))})


def test_the_loss_is_found_however_a_model_returns_its_logits():
    model, (inputs, labels) = tiny.mlp(), (torch.randn(4, 5), torch.tensor([0, 2, 1, 0]))
    wanted = nn.functional.cross_entropy(model(inputs), labels)
    for shown in (lambda x: model(x), lambda x: {"logits": model(x)}, lambda x: (model(x), x)):
        assert torch.equal(labelled_loss(shown, (inputs, labels)), wanted)
    soft = nn.functional.one_hot(labels, 3) * 0.8 + 0.2 / 3
    assert torch.equal(labelled_loss(model, (inputs, soft)), nn.functional.cross_entropy(model(inputs), soft))
    texts = {**tiny.text_batches()[0], "return_dict": False}
    assert labelled_loss(tiny.bert(), texts).dim() == 0


def test_labels_that_cross_entropy_knows_nothing_of_are_refused():
    with pytest.raises(ValueError, match=r"of the shape \(4, 3\) of the logits, but got torch.float32 of shape \(4,\)"):
        labelled_loss(tiny.mlp(), (torch.randn(4, 5), torch.tensor([0.1, 1.7, 2.0, 0.5])))


def test_samples_are_held_in_float32_as_the_copies_that_they_are_for():
    held = samples_of([(torch.randn(4, 5, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 0]))])
    assert held.batches[0][0].dtype == torch.float32 and held.batches[0][1].dtype == torch.int64


@pytest.mark.parametrize("value", [-1, 1.5, True, "3"])
def test_counts_are_whole_numbers(value):
    with pytest.raises(ValueError, match="steps is a whole number, at least 1, but got"):
        check_counts(type("Recipe", (), {"steps": value}), steps=1)


class Failed(Exception):
    pass


def test_a_failure_on_one_process_ends_the_run_on_all(monkeypatch):
    told = []

    def added_up(state, device):  # of a group in which another process failed too
        told.append({name: float(value) for name, value in state.items()})
        return {"failed": state["failed"] + 1}

    def fails():
        raise Failed

    monkeypatch.setattr(short_runs, "in_processes", lambda: True)
    monkeypatch.setattr(short_runs, "added_up", added_up)
    with pytest.raises(RemosError, match="Another process failed"):
        short_runs.together(lambda: {"rows": torch.tensor(3)}, CPU)
    with pytest.raises(Failed):
        short_runs.together(fails, CPU)
    assert told == [{"rows": 3, "failed": 0}, {"failed": 1}]
