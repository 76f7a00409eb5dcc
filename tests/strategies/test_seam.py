import pytest
import torch

from remos_hf.strategies.seam import SeaM
from remos_hf.strategies.student_data import StudentData
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*were to be kept:UserWarning")


def separable():
    """Images whose label is the sign of the first channel; a net with a head on three layers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 6, generator=generator)
    return [(images[start : start + 8], (images[start : start + 8, 0] > 0).long()) for start in range(0, 64, 8)]


def test_it_keeps_the_weights_that_the_task_needs():
    data, student = StudentData(lambda samples: separable()), tiny.mlp(sizes=(6, 12, 8, 2))
    with torch.no_grad():
        student[0].weight[:, 0] *= 5
    done = SeaM(0.5, steps=150, head_steps=50, head=("4",)).prepare(student, data)
    told = done.details["seam"]
    assert told["share_above"] <= 0.5 and told["steps"] < 150
    assert done.relevant_slice.share_kept == 0.5
    kept = done.relevant_slice.kept["0.weight"].float()
    assert kept[:, 0].mean() > kept[:, 1:].mean()  # the only channel that tells the label
    assert done.relevant_slice.rule == "seam" and "4.weight" not in done.relevant_slice.kept
    weight = student[0].weight.detach()
    assert bool((weight[kept == 0] == 0).all())


def test_where_the_steps_end_before_the_lowest_masks_go():
    done = SeaM(0.6, alpha=0.0, steps=9, head_steps=2).prepare(tiny.bert(), tiny.student_data())
    told = done.details["seam"]
    assert told == {**told, "share_above": 1.0, "steps": 9, "head_steps": 2}
    assert abs(done.relevant_slice.share_kept - 0.6) < 0.02


def test_the_pay_for_kept_weights_is_what_empties_the_mask():
    def share(alpha):
        strategy = SeaM(0.01, alpha=alpha, mask_rate=0.25, steps=6, head_steps=0)
        return strategy.prepare(tiny.bert(), tiny.student_data()).details["seam"]["share_above"]

    assert share(500.0) < share(0.0)


def test_the_student_keeps_its_fresh_head_and_its_modes():
    student, teacher = tiny.bert().train(), tiny.bert()
    SeaM(0.8, steps=3, head_steps=3).prepare(student, tiny.student_data())
    assert student.training and all(parameter.requires_grad for parameter in student.parameters())
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "layer"}, "scope is 'model'"),
        ({"alpha": -1.0}, "alpha is"),
        ({"mask_rate": 0.0}, "mask_rate is"),
        ({"steps": 0}, "steps is"),
    ],
)
def test_values_that_no_run_could_use_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SeaM(0.8, **options)
