import warnings

import pytest
import torch

from remos_hf.strategies.l2sp import _PIECE, L2SP, head_parameters
from tests import tiny


def held(strategy, make, batch, change):
    """A student that has moved away from its teacher, with the gradients of the hold's loss; the teacher; the loss."""
    student, teacher = make(), make()
    hold = strategy.hold(student, teacher)
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            parameter.add_(change * (number + 1))
    run = lambda inputs: (torch.zeros(()), "outputs")  # noqa: E731
    loss, outputs = hold.loss(student, batch, run)
    loss.backward()
    assert outputs == "outputs"
    return student, teacher, loss


@pytest.mark.parametrize(
    ("make", "strategy", "head"),
    [
        (tiny.bert, L2SP(0.3, 0.7), ("classifier.", "bert.pooler.")),
        (tiny.vit, L2SP(0.3, 0.7), ("classifier.",)),
        (tiny.ConvNet, L2SP(0.3, 0.7, head=("head",)), ("head.",)),
    ],
    ids=["text", "vision", "plain"],
)
def test_its_gradient_is_that_of_the_published_penalty(make, strategy, head):
    student, teacher, loss = held(strategy, make, None, 0.01)
    was, expected = dict(teacher.named_parameters()), 0.0
    for name, parameter in student.named_parameters():
        weight = parameter.detach().double()
        of_head = name.startswith(head)
        pull = 0.7 * weight if of_head else 0.3 * (weight - was[name].double())
        assert torch.allclose(parameter.grad.double(), pull, atol=1e-6), name
        expected += float(
            (weight if of_head else weight - was[name].double()).square().sum() * (0.35 if of_head else 0.15)
        )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_what_is_frozen_is_not_held():
    def make():
        model = tiny.bert()
        model.bert.embeddings.requires_grad_(False)
        return model

    _, _, loss = held(L2SP(1.0, 0.0), make, None, 0.01)
    moved = [number for number, (name, _) in enumerate(make().named_parameters(), start=1)
             if not name.startswith(("bert.embeddings.", "bert.pooler.", "classifier."))]  # fmt: skip
    sizes = [parameter.numel() for parameter in make().parameters()]
    assert loss.item() == pytest.approx(
        sum(0.5 * sizes[number - 1] * (0.01 * number) ** 2 for number in moved), rel=1e-4
    )


def test_tied_weights_are_held_once():
    from transformers import LlamaForCausalLM

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            type(tiny.llama().config)(**{**tiny.llama().config.to_dict(), "tie_word_embeddings": True})
        )

    student, _, _ = held(L2SP(1.0, 1.0), make, None, 0.01)
    embedding = student.get_input_embeddings().weight
    assert torch.allclose(embedding.grad, torch.full_like(embedding, 0.01), atol=1e-6)


def test_weights_out_of_range_are_refused():
    for options in ({"alpha": -1}, {"beta": float("nan")}, {"alpha": float("inf")}):
        with pytest.raises(ValueError, match="is a weight of the penalty"):
            L2SP(**options)


def test_the_heads_parameters_are_named():
    assert head_parameters(tiny.ConvNet(), ("head",)) == {"head.weight", "head.bias"}


def test_weights_of_half_precision_are_pulled_in_their_own():
    student, teacher, loss = held(L2SP(0.3, 0.7), lambda: tiny.bert().bfloat16(), None, 0.01)
    assert loss.dtype == torch.float32
    weight, was = student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight
    assert weight.grad.dtype == torch.bfloat16
    assert torch.allclose(weight.grad.float(), 0.3 * (weight.float() - was.float()), atol=1e-4)


def test_at_the_teachers_weights_nothing_pulls():
    student, _, loss = held(L2SP(1.0, 0.0), tiny.bert, None, 0.0)
    assert loss == 0 and not any(one.grad.any() for one in student.parameters() if one.grad is not None)


def test_a_trainer_that_decays_weights_beside_it_warns(tmp_path):
    from remos_hf.strategies import Finetune
    from tests.training.runs import trainer

    for strategy, told in ((L2SP(), "L2SP pulls"), ([Finetune(), L2SP()], r"Finetune \+ L2SP pulls")):
        options = {"weight_decay": 0.01, "max_steps": 1, "save_strategy": "no"}
        with pytest.warns(UserWarning, match=f"{told}.*Set weight_decay=0"):
            trainer(tmp_path, strategy=strategy, options=options).train()


def test_weights_of_several_pieces_in_any_layout_are_pulled_by_a_loss_of_any_scale():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = torch.nn.Conv2d(90, 90, 3).to(memory_format=torch.channels_last)
            self.head = torch.nn.Linear(90, 2)

    student, teacher = Wide(), Wide()
    hold = L2SP(0.3, 0.7, head=("head",)).hold(student, teacher)
    assert student.body.weight.numel() > _PIECE and not student.body.weight.is_contiguous()
    with torch.no_grad():
        student.body.weight.add_(torch.randn(student.body.weight.shape))
    loss, _ = hold.loss(student, None, lambda _: (torch.zeros(()), None))
    (loss / 4).backward()
    away = student.body.weight.detach() - teacher.body.weight.detach()
    assert torch.allclose(student.body.weight.grad, 0.3 / 4 * away, atol=1e-6)
    assert torch.allclose(student.head.weight.grad, 0.7 / 4 * student.head.weight.detach(), atol=1e-6)


def test_fit_warns_of_an_optimizer_that_decays_weights_beside_it():
    from remos_hf.training.accelerate_loop import fit

    for decay, warned in ((0.01, 1), (0.0, 0)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(tiny.bert(), tiny.dataset(), strategy=L2SP(), collate_fn=tiny.pad, batch_size=4, max_steps=1,
                optimizer=lambda model, by=decay: torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=by),
                progress=False)  # fmt: skip
        assert sum("Set weight_decay=0" in str(one.message) for one in told) == warned
