import pytest
import torch
from torch import nn

from remos_hf.errors import TeacherMismatchError
from remos_hf.profiling.criteria import median_coverage, strong_coverage, threshold_coverage, top_k_coverage
from remos_hf.profiling.data_pass import observe, profile_coverage
from remos_hf.profiling.means import InputMeans
from remos_hf.profiling.second_moments import SecondMoments
from remos_hf.slicing.ordinal import Selection
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
        ({}, median_coverage()),
        ({"criterion": "nc"}, threshold_coverage(0.5)),
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
        ({"slice_ratio": 0.9, "reset_to": "noise"}, "reset_to is"),
        ({"slice_ratio": 0.9, "criterion": "kmnc"}, "criterion is one of"),
        ({"slice_ratio": 0.9, "criterion_value": 0.5}, "'median' takes no criterion_value, but got 0.5"),
        ({"slice_ratio": 0.9, "ties": "first"}, "ties is"),
        ({"slice_ratio": 0.9, "criterion": "nc", "criterion_value": 1.5}, "got 1.5"),
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


@pytest.mark.parametrize("kind", [Remos, Random])
def test_means_and_second_moments_of_the_runs_samples_stand_in_for_what_is_given_up(kind):
    for to, observer, name in (("mean", InputMeans(), "means"), ("reconstruct", SecondMoments(), "second_moments")):
        student, by_hand, again = tiny.bert(), tiny.bert(), tiny.bert()
        done = kind(0.8, reset_to=to, seed=2).prepare(student, data)
        observe(by_hand, tiny.text_batches(), [observer])
        found = observer.means() if to == "mean" else observer.moments()
        reset_outside(by_hand, done.relevant_slice, to=to, **{name: found})
        kind(0.8, reset_to=to, seed=2).restart(again, data, done.relevant_slice)
        for key, value in student.state_dict().items():
            assert torch.equal(value, by_hand.state_dict()[key]) and torch.equal(value, again.state_dict()[key])


class Partly(nn.Module):
    """One layer runs only on some batches, another one never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs):
        hidden = self.always(inputs)
        return self.sometimes(hidden) if float(inputs[0, 0]) > 0 else hidden


@pytest.mark.filterwarnings("ignore:.*never ran.*:UserWarning", "ignore:Less than half:UserWarning")
@pytest.mark.parametrize("kind", [Remos, MagPrune, TopMagnitude, Random])
def test_all_rules_compete_over_the_layers_that_run_on_the_data(kind):
    batches = [torch.full((4, 4), -1.0), torch.full((4, 4), -1.0), torch.full((4, 4), 1.0)]
    done = kind(0.5, head=()).prepare(Partly(), StudentData(lambda samples: batches))
    assert sorted(done.relevant_slice.kept) == ["always.weight", "sometimes.weight"]
    assert done.relevant_slice.account.left_out


def test_reading_stops_as_soon_as_all_layers_have_run():
    def batches(samples):
        yield tiny.text_batches(1)[0]
        pytest.fail("read a second batch")

    assert Random(0.8).prepare(tiny.bert(), StudentData(batches)).relevant_slice is not None


def test_a_rule_of_ones_own_is_asked():
    def every_second(layers, profile, share, seed):
        bits = [torch.full(((layer.numel + 7) // 8,), 0b01010101, dtype=torch.uint8) for layer in layers]
        assert profile.num_samples == 12 and share == 0.5 and seed == 9
        return Selection(bits, sum(layer.numel for layer in layers) // 2, 1)

    class Mine(Remos):
        rule = staticmethod(every_second)

    student = tiny.bert()
    relevant = Mine(0.5).prepare(student, tiny.student_data(seed=9)).relevant_slice
    assert relevant.share_kept == 0.5 and "every_second" in relevant.rule
    assert not student.bert.encoder.layer[0].output.dense.weight[:, 1::2].any()
