import pytest
import torch

from remos_hf.errors import NonFiniteError
from remos_hf.strategies.relative_update import RelativeUpdate
from remos_hf.strategies.short_runs import Samples, labelled_loss, short_run
from remos_hf.strategies.student_data import StudentData
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*were to be kept:UserWarning")
HEAD = ("2",)


def one_channel_matters():
    """Samples whose label the first of four channels tells; the others are always 0."""
    values = torch.zeros(32, 4)
    values[:, 0] = torch.linspace(-1, 1, 32)
    return [(values[start::4], (values[start::4, 0] > 0).long()) for start in range(4)]


def test_what_the_trial_never_moves_is_reset_first():
    student, teacher = tiny.mlp(sizes=(4, 6, 2)), tiny.mlp(sizes=(4, 6, 2))
    data = StudentData(lambda samples: one_channel_matters())
    strategy = RelativeUpdate(0.25, steps=20, head=HEAD)
    done = strategy.prepare(student, data)
    kept = done.relevant_slice.kept["0.weight"].bool()
    assert bool(kept[:, 0].any()) and not bool(kept[:, 1:].any())  # silent channels have no gradient
    assert torch.equal(student[0].weight[kept], teacher[0].weight[kept])  # of the teacher, not of the trial
    assert torch.equal(student[2].weight, teacher[2].weight)
    assert done.details["relative_update"]["steps"] == 20
    assert done.relevant_slice.rule == "relative_update"


def test_it_is_the_update_over_the_size_that_counts():
    data = StudentData(lambda samples: one_channel_matters())
    student = tiny.mlp(sizes=(4, 6, 2))
    large = student[0].weight[:, 0].abs().argmax()
    with torch.no_grad():
        student[0].weight[large, 0] *= 1e4
    kept = RelativeUpdate(0.2, steps=5, learning_rate=1e-4, head=HEAD).prepare(student, data).relevant_slice.kept
    assert not bool(kept["0.weight"][large, 0])
    assert student[0].weight[large, 0].item() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate is above 0"),
        ({"floor": 0.0}, "floor is above 0"),
        ({"steps": 0}, "steps is a whole number"),
    ],
)
def test_what_no_run_could_use_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RelativeUpdate(0.9, **options)


def test_a_trial_that_explodes_is_named():
    student = tiny.mlp(sizes=(4, 6, 2))
    data = StudentData(lambda samples: [(torch.full((4, 4), 1e30), torch.tensor([0, 1, 0, 1]))])
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        RelativeUpdate(0.9, steps=5, learning_rate=1e9, head=HEAD).prepare(student, data)


@pytest.mark.parametrize("frozen", [False, True])
def test_it_keeps_the_largest_updates_for_their_size_of_a_trial_that_leaves_what_is_frozen(frozen):
    def net():
        made = tiny.mlp(sizes=(4, 6, 6, 2))
        made[0].requires_grad_(not frozen)
        return made

    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 4, generator=generator), torch.arange(8) % 2) for _ in range(4)]
    data, student, trial = StudentData(lambda samples: batches), net(), net()
    strategy = RelativeUpdate(0.5, steps=50, learning_rate=0.3, head=("4",), seed=0)
    kept = strategy.prepare(student, data).relevant_slice.kept
    samples = Samples(data, torch.device("cpu"), 0)
    by_hand = torch.optim.SGD([one for one in trial.parameters() if one.requires_grad], 0.3, momentum=0.9)
    for part in trial:
        part.requires_grad_(False)
    short_run(trial, samples, lambda batch: labelled_loss(trial, batch), by_hand, steps=50)
    places = (2,) if frozen else (0, 2)
    scores = {
        f"{place}.weight": (trial[place].weight - net()[place].weight).abs() / net()[place].weight.abs()
        for place in places
    }
    half = torch.cat([one.flatten() for one in scores.values()]).median()
    for name, score in scores.items():
        assert torch.equal(kept[name].bool(), score > half)
