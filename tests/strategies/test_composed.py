import json
import warnings
from dataclasses import dataclass

import pytest
import torch

from remos_hf.strategies.adversarial_training import AdversarialTraining
from remos_hf.strategies.base import Hold, Preparation, Strategy
from remos_hf.strategies.composed import Composed, as_strategy, strategy_from_dict
from remos_hf.strategies.delta import Delta
from remos_hf.strategies.distilled import Distilled
from remos_hf.strategies.feature_lwf import FeatureLwF
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.hardened import Hardened
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.neft import Neft
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.renofeation import DeltaR, Renofeation
from remos_hf.strategies.slice_and_reset import Random, Remos
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


@dataclass(frozen=True)
class Scaling(Strategy):
    """Multiplies the loss, and counts."""

    by: float

    def hold(self, student, teacher):
        return ScalingHold(self.by)


class ScalingHold(Hold):
    def __init__(self, by):
        self.by, self.steps = by, 0

    def loss(self, model, inputs, run):
        loss, outputs = run(inputs + [self.by])
        return loss * self.by + 1, outputs

    def after_step(self, model):
        self.steps += 1

    def finish(self, model, data):
        self.steps = -self.steps

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_one_strategy_is_itself_and_a_list_is_composed():
    assert as_strategy(Finetune()) == as_strategy([Finetune()]) == Finetune()
    assert as_strategy([Remos(0.9), Scaling(2.0)]) == Composed((Remos(0.9), Scaling(2.0)))


@pytest.mark.parametrize("given", [None, "remos", [], [Finetune(), "remos"], Finetune])
def test_what_is_no_strategy_is_refused(given):
    with pytest.raises(TypeError, match="strategy is a Strategy such as"):
        as_strategy(given)


def test_two_that_slice_are_refused_and_so_is_a_list_in_a_list():
    with pytest.raises(ValueError, match="Remos and Random both do"):
        Composed((Remos(0.9), Random(0.9)))
    with pytest.raises(ValueError, match="Write them in one list"):
        Composed((Finetune(), Composed((Finetune(), Scaling(2.0)))))


def test_its_description_names_all_parts_and_makes_it_again():
    both = Composed((Remos(0.9, head=("classifier",)), Scaling(2.0)))
    described = json.loads(json.dumps(both.to_dict()))
    assert described["name"] == "Remos + Scaling"
    assert strategy_from_dict(described) == both
    with pytest.raises(ValueError, match="There is no strategy 'Nobody'"):
        strategy_from_dict({"name": "Nobody"})


def test_the_parts_prepare_in_order_and_are_told_as_one():
    student, by_hand = tiny.bert(), tiny.bert()
    done = Composed((Retrain(seed=1), Random(0.8, seed=2))).prepare(student, tiny.student_data())
    Retrain(seed=1).prepare(by_hand, tiny.student_data())
    expected = Random(0.8, seed=2).prepare(by_hand, tiny.student_data())
    assert done.relevant_slice == expected.relevant_slice
    assert all(torch.equal(value, by_hand.state_dict()[key]) for key, value in student.state_dict().items())
    rows = Composed((Finetune(embedding_rows="mean"), Random(0.8))).prepare(tiny.bert(), tiny.student_data())
    assert rows.rows_reset > 0 and rows.relevant_slice is not None


def test_a_restart_gives_the_student_that_prepare_gave():
    both = Composed((Finetune(embedding_rows="mean"), Random(0.8, reset_to="init")))
    prepared, again = tiny.bert(), tiny.bert()
    done = both.prepare(prepared, tiny.student_data(seed=5))
    both.restart(again, tiny.student_data(seed=5), done.relevant_slice)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in prepared.state_dict().items())


def test_the_runs_seed_reaches_every_part_that_names_none():
    parts = Composed((Retrain(), Random(0.8, seed=4))).with_seed(9).strategies
    assert [one.seed for one in parts] == [9, 4]


def test_the_first_parts_loss_is_outermost():
    hold = Composed((Scaling(2.0), Finetune(), Scaling(3.0))).hold(None, None)
    assert hold.loss(None, [], lambda inputs: (10, inputs)) == (2 * (3 * 10 + 1) + 1, [2.0, 3.0])


def test_all_holds_act_and_are_saved():
    both = Composed((Scaling(2.0), Scaling(3.0)))
    hold, again = both.hold(None, None), both.hold(None, None)
    hold.after_step(None)
    again.load_state_dict(hold.state_dict())
    assert [one.steps for one in again.holds] == [1, 1]
    hold.finish(None, None)
    assert [one.steps for one in hold.holds] == [-1, -1]


def test_a_list_that_holds_nothing_has_no_hold():
    nothing = Composed((Finetune(), Random(0.8)))
    assert not nothing.holds and nothing.hold(None, None) is None
    assert Composed((Random(0.8), Scaling(2.0))).holds


@pytest.mark.parametrize(
    ("other", "warned"),
    [
        (Finetune(embedding_rows="mean"), True),
        (Random(0.5), True),
        (Retrain(), True),
        (DeltaR(), True),
        (Finetune(), False),
    ],
)
def test_a_spring_to_the_teacher_beside_what_gives_weights_up_is_told(other, warned):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        as_strategy([other, L2SP()]).hold(tiny.bert(), tiny.bert())
    assert [f"what {type(other).__name__} gives up back" in str(one.message) for one in told] == [True] * warned


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (L2SP(), "L2SP would not hold them: it pulls .* Leave one of them out"),
        (Renofeation(head_decay=0), "Renofeation would not .* it averages .* average_decay=0"),
        (Renofeation(average_decay=0), "Renofeation would not .* Set its head_decay=0"),
        (Delta(), "Delta would not .* Set its head_decay=0"),
        (DeltaR(), "DeltaR would not .* Set its head_decay=0"),
    ],
)
def test_weights_that_are_computed_from_others_are_refused_to_what_would_not_hold_them(other, told):
    for bounding in (Neft(2), Neft(2, beta=None, mix=True)):
        for parts in ((bounding, other), (other, bounding)):
            with pytest.raises(ValueError, match=f"Neft has its student compute .*{told}"):
                Composed(parts)
    assert Composed((Neft(2, beta=None), other))


def test_what_looks_at_no_weight_holds_such_a_student():
    assert Composed((Neft(2), Delta(head_decay=0))) and Composed((Neft(2), Distilled()))


@pytest.mark.parametrize("changing", [AdversarialTraining(), Guided(share=1), Hardened(share=1.0)], ids=str)
@pytest.mark.parametrize("looking", [Delta(), DeltaR(), Distilled(), FeatureLwF(), Renofeation()], ids=str)
def test_what_changes_all_samples_is_refused_beside_what_looks_at_clean_ones(changing, looking):
    for parts in ((changing, looking), (looking, changing)):
        with pytest.raises(ValueError, match=f"{type(looking).__name__} would compare none. Leave one of them out"):
            Composed(parts)
    assert Composed((Guided(share=0.9), Hardened(share=0.9), looking)) and Composed((changing, L2SP(), Finetune()))


@pytest.mark.parametrize(
    "words", [["a"], ["a", "b"], ["a", "a"], ["a", "a", "a"], ["a", "a_2", "a"], ["a", "a", "a_2"]]
)
def test_nothing_that_parts_say_at_the_end_is_lost_whatever_words_they_use(words):
    class Saying(Strategy):
        def hold(self, student, teacher):
            return SayingHold(*left.pop(0))

    class SayingHold(Hold):
        def __init__(self, word, number):
            self.told = {word: number}

        def details(self):
            return self.told

    left = [*zip(words, range(len(words)), strict=True)]
    told = Composed((Finetune(), *(Saying() for _ in words))).hold(None, None).details()
    assert list(told.values()) == [*range(len(words))]
    assert all(word.startswith(asked) for word, asked in zip(told, words, strict=True))
    assert len(set(words)) < len(words) or list(told) == words


@pytest.mark.parametrize(
    ("parts", "refused"),
    [
        ((AdversarialTraining(), Guided()), "Guided"),
        ((Guided(), AdversarialTraining()), None),
        ((Guided(share=1.0), Guided(radius=0.2)), "Guided"),
        ((Guided(), Hardened(share=1.0)), "Guided"),
        ((Guided(share=1.0), Hardened()), None),
        ((Hardened(share=1.0), AdversarialTraining()), None),
        ((Guided(share=0.9), Guided(share=0.9)), None),
    ],
    ids=str,
)
def test_what_changes_clean_samples_is_refused_inside_of_what_leaves_none(parts, refused):
    if refused is None:
        hold, model = Composed(parts).hold(tiny.bert(), tiny.bert()), tiny.bert()
        hold.loss(model, tiny.text_batches(1)[0], lambda given: (model(**given).loss, None))
        assert not any(one.clean.all() for one in hold.holds)
        return
    with pytest.raises(ValueError, match=f"{refused} would change none. Leave one of them out"):
        Composed(parts).hold(tiny.bert(), tiny.bert())


class _Telling(Finetune):
    word = "one"

    def prepare(self, student, data):
        return Preparation(details={self.word: 1})


class _TellingToo(_Telling):
    word = "two"


def test_what_parts_say_of_themselves_stands_side_by_side():
    done = as_strategy([_Telling(), _TellingToo()]).prepare(None, None)
    assert done.details == {"one": 1, "two": 1}
    with pytest.raises(ValueError, match="both record \\['one'\\]"):
        as_strategy([_Telling(), _Telling()]).prepare(None, None)
