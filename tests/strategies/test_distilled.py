import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from remos_hf.strategies.composed import Composed
from remos_hf.strategies.distilled import Distilled
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.hardened import Hardened
from tests import tiny
from tests.strategies.test_hardened import image_run, text_run


def moved(make, recipe, change=0.05):
    """A student that has moved away from its teacher, the teacher, and what holds the one to the other."""
    student, teacher = make(), make().eval().requires_grad_(False)
    hold = recipe.hold(student, teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(change * torch.randn(parameter.shape))
    return student, teacher, hold


def test_its_loss_is_the_runs_and_the_share_of_the_teachers_variance_that_the_student_misses():
    student, teacher, hold = moved(tiny.bert, Distilled(weight=2.0))
    batch = tiny.text_batches(1)[0]
    loss, outputs = hold.loss(student, batch, text_run(student))
    real, shares = batch["attention_mask"].bool(), []
    with torch.no_grad():
        pairs = [model(**batch, output_hidden_states=True).hidden_states[1:] for model in (student, teacher)]
    for mine, theirs in zip(*pairs, strict=True):
        mine, theirs = mine[real], theirs[real]
        shares.append((mine - theirs).square().mean() / (theirs - theirs.mean(0)).square().mean())
    assert loss.item() == pytest.approx((outputs.loss + 2 * sum(shares) / len(shares)).item(), rel=1e-5)


def test_a_student_that_is_the_teacher_pays_nothing():
    student, _, hold = moved(tiny.ConvNet, Distilled(head=("head",)), change=0.0)
    student.eval()
    batch = tiny.image_batches(1)[0]
    assert hold.loss(student, batch, image_run(student))[0] == image_run(student)(batch)[0]


def test_it_brings_the_features_back_to_the_teachers():
    student, _, hold = moved(tiny.bert, Distilled(weight=5.0), change=0.2)
    optimizer, batch = torch.optim.Adam(student.parameters(), 1e-2), tiny.text_batches(1)[0]
    away = []
    for _ in range(40):
        loss, outputs = hold.loss(student, batch, text_run(student))
        away.append((loss - outputs.loss).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert away[-1] < 0.5 * away[0]


@pytest.mark.parametrize("beside", [Hardened(seed=0), Hardened(seed=0, tokens=0), Guided(seed=0)], ids=str)
def test_beside_perturbations_it_compares_the_clean_samples_in_whatever_order_the_list_is(beside):
    found = []
    for order in (1, -1):
        torch.manual_seed(0)
        student, teacher, hold = moved(tiny.bert, Composed((beside, Distilled(weight=1.0))[::order]))
        given = []
        keep = lambda _, __, more, given=given: given.append(more["input_ids"])  # noqa: E731
        teacher.bert.embeddings.register_forward_pre_hook(keep, with_kwargs=True)
        batch = tiny.text_batches(1)[0]
        loss, outputs = hold.loss(student, batch, text_run(student))
        clean = hold.holds[0].clean
        assert clean.sum() == 2 and hold.holds[1].outside == 0
        seen = [[int(one) for one in row if one] for row in given[-1]]
        assert seen == [[int(one) for one in row if one] for row in batch["input_ids"][clean]]
        alone = Distilled().hold(student, teacher)
        part = {key: value[clean] for key, value in batch.items()}
        mine, own = alone.loss(student, part, text_run(student))
        assert (loss - outputs.loss).item() == pytest.approx((mine - own.loss).item(), rel=1e-4)
        found.append(loss.item())
    assert found[0] == found[1]


def test_a_batch_without_a_clean_sample_is_not_compared():
    student, _, hold = moved(tiny.bert, Composed((Hardened(seed=0, share=0.99), Distilled(weight=1.0))))
    loss, outputs = hold.loss(student, tiny.text_batches(1)[0], text_run(student))
    assert not hold.holds[0].clean.any() and loss == outputs.loss


class Recomputed(torch.nn.Module):
    """Its middle layer is run again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.middle, self.head = (torch.nn.Linear(4, 4) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, images):
        hidden = self.first(images)
        if self.reentrant is None:
            return self.head(self.middle(hidden) * 1)
        return self.head(checkpoint(lambda x: self.middle(x) * 1, hidden, use_reentrant=self.reentrant))


def test_gradient_checkpointing_works_unless_it_hides_the_gradient():
    gradients, batch = [], (torch.randn(6, 4), torch.zeros(6))
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        student, _, hold = moved(lambda reentrant=reentrant: Recomputed(reentrant), Distilled(head=("head",)))
        if reentrant:
            with pytest.raises(ValueError, match='Train without gradient_.*or with.*"use_reentrant": False'):
                hold.loss(student, batch, image_run(student))
            continue
        hold.loss(student, batch, image_run(student))[0].backward()
        gradients.append(student.middle.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_weight_below_0_is_refused_and_layers_are_named():
    with pytest.raises(ValueError, match="weight is a weight in the loss"):
        Distilled(weight=-1)
    model = tiny.ConvNet().eval()
    hold = Distilled(layers=["down"], head=["head"]).hold(model, copy.deepcopy(model))
    assert list(hold.layers) == ["down"]
