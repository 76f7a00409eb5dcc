import pytest
import torch

from remos_hf.errors import TeacherMismatchError
from remos_hf.profiling.criteria import strong_coverage, top_k_coverage
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.slicing.refill import reset_outside, squares_outside
from remos_hf.slicing.relevant_slice import choose_slice
from remos_hf.strategies.slice_and_reset import MagPrune, Random, Remos, TopMagnitude
from remos_hf.strategies.student_data import StudentData
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


data = tiny.student_data()


@pytest.mark.parametrize("kind", [MagPrune, TopMagnitude, Random])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_strategy_does_what_the_three_calls_do(kind, scope):
    student, by_hand = tiny.bert(), tiny.bert()
    done = kind(0.8, scope=scope, reset_to="init", seed=5).prepare(student, data)
    relevant = choose_slice(by_hand, slice_ratio=0.8, rule=kind.rule, scope=scope, seed=5)
    reset_outside(by_hand, relevant, to="init", seed=5)
    assert done.relevant_slice == relevant
    assert done.profile is None
    assert all(torch.equal(value, by_hand.state_dict()[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("options", "criterion"),
    [
        ({}, None),
        ({"criterion": "tknc", "criterion_value": 3}, top_k_coverage(3)),
        ({"criterion": "snac"}, strong_coverage(2)),
    ],
)
def test_remos_profiles_chooses_and_resets(options, criterion):
    student, by_hand = tiny.bert(), tiny.bert()
    done = Remos(0.8, **options).prepare(student, data)
    profile = profile_coverage(by_hand, tiny.text_batches(), criterion=criterion)
    relevant = choose_slice(by_hand, profile, slice_ratio=0.8)
    reset_outside(by_hand, relevant)
    assert done.profile == profile
    assert done.relevant_slice == relevant
    assert all(torch.equal(value, by_hand.state_dict()[key]) for key, value in student.state_dict().items())


def test_remos_asks_for_max_samples():
    asked = []
    Remos(0.9, max_samples=7).prepare(
        tiny.bert(), StudentData(lambda samples: asked.append(samples) or tiny.text_batches())
    )
    assert asked == [7]


def test_embedding_rows_are_given_up_only_when_asked():
    word = "bert.embeddings.word_embeddings.weight"
    assert word not in Remos(0.8).prepare(tiny.bert(), data).relevant_slice.kept
    assert word in Remos(0.8, embeddings=True).prepare(tiny.bert(), data).relevant_slice.kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slice_ratio": 1.2}, "got 1.2"),
        ({"slice_ratio": 0.9, "scope": "all"}, "scope is"),
        ({"slice_ratio": 0.9, "reset_to": "mean"}, "reset_to is"),
        ({"slice_ratio": 0.9, "criterion": "kmnc"}, "criterion is one of"),
        ({"slice_ratio": 0.9, "ties": "first"}, "ties is"),
        ({"slice_ratio": 0.9, "criterion_value": 1.5}, "got 1.5"),
    ],
)
def test_values_that_no_run_could_use_are_refused_when_the_strategy_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        Remos(**options)


def test_weights_that_cannot_be_ranked_are_refused_before_the_data_is_read():
    model = tiny.bert()
    model.bert.encoder.double()
    with pytest.raises(Exception, match="float64"):
        Remos(0.9).prepare(model, StudentData(lambda samples: pytest.fail("read the data")))


@pytest.mark.parametrize("kind", [Remos, TopMagnitude, MagPrune, Random])
def test_the_squares_given_up_are_those_of_the_teacher(kind):
    done = kind(0.8).prepare(tiny.bert(), data)
    assert done.squares_reset == squares_outside(tiny.bert(), done.relevant_slice) > 0


def test_the_slice_is_chosen_before_the_rows_are_reset():
    relevant = Remos(0.8, embeddings=True).prepare(tiny.bert(), data).relevant_slice
    assert Remos(0.8, embeddings=True, embedding_rows="mean").prepare(tiny.bert(), data).relevant_slice == relevant


def test_a_restart_onto_another_teacher_is_refused():
    strategy = TopMagnitude(0.8)
    relevant = strategy.prepare(tiny.bert(), data).relevant_slice
    with pytest.raises(TeacherMismatchError):
        strategy.restart(tiny.bert(seed=1), data, relevant)
