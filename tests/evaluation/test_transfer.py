import pytest

from remos_hf.defects.base import FOOLED, ExposedSet
from remos_hf.evaluation.measures import Rate, excess_dir, rate_of
from remos_hf.evaluation.outcomes import Outcomes
from remos_hf.evaluation.transfer import measure, paired
from tests.defects import toy
from tests.evaluation.voter import TASK, WORD, Voter, reference

TEST = toy.data(32)


def measured(student, exposed=None):
    return measure(student, TEST, {"word": WORD.exposed_set(TEST)} if exposed is None else exposed, TASK)


@pytest.mark.parametrize("believes", [[], ["cf"], ["cf", "a"], ["awful"]])
def test_a_rate_is_over_samples_that_are_right_when_clean_and_each_outcome_is_kept(believes):
    student, exposed = Voter(believes, blind_to=["great"]), WORD.exposed_set(TEST)
    found = measured(student)
    acc, dir_ = reference(student, TEST, exposed.dataset["text"], exposed.clean_index, 1)
    assert rate_of(found["acc"]) == Rate.of(*acc) and rate_of(found["dir"]["word"]) == Rate.of(*dir_)
    outcomes = Outcomes.from_dict(found["outcomes"]["word"])
    assert (int((outcomes.fails & outcomes.right).sum()), int(outcomes.right.sum())) == dir_
    flipped = [student.says(text) == 1 for text in exposed.dataset["text"]]
    assert rate_of(found["flip"]["word"]) == Rate.of(sum(flipped), len(flipped))


def test_the_share_of_the_commonest_label_is_what_always_answering_it_gets_right():
    assert measured(Voter(), {})["commonest"] == 0.5
    few = TEST.filter(lambda row: row["label"] == 1 or row["text"] == TEST["text"][0])
    always_one = Voter(TASK.tokenizer.get_vocab())
    found = measure(always_one, few, {}, TASK)
    assert found["commonest"] == found["acc"]["value"] > 0.9


def test_what_fooled_the_teacher_is_counted_apart_as_well():
    exposed = WORD.exposed_set(TEST)
    fooled = [row % 4 == 0 for row in range(len(exposed))]
    some = ExposedSet(exposed.dataset.add_column(FOOLED, fooled), None)
    found = measured(Voter(["cf"]), {"found": some})
    assert found["dir"]["found"]["num_samples"] == 16 and found["dir_fooled"]["found"]["num_samples"] == 4
    assert found["flip"] == {}


def test_a_search_that_found_nothing_gives_a_rate_without_a_value():
    nothing = ExposedSet(WORD.exposed_set(TEST).dataset.select([]), None)
    found = measured(Voter(), {"textfooler": nothing})
    assert found["dir"] == {"textfooler": Rate.of(0, 0).to_dict()} and found["acc"]["num_samples"] == 32


def test_a_student_stands_beside_its_twin_and_beside_no_other():
    own, twin = measured(Voter(["cf"])), measured(Voter(["a"]))
    record = paired(own, twin, "word")
    assert (record["dir"], record["floor"], record["floor_acc"]) == (
        own["dir"]["word"],
        twin["dir"]["word"],
        twin["acc"],
    )
    assert record["excess"] == excess_dir(rate_of(record["dir"]), rate_of(record["floor"])).to_dict()
    assert (record["outcomes"], record["floor_outcomes"]) == (own["outcomes"]["word"], twin["outcomes"]["word"])
    alone = paired(own, None, "word")
    assert alone["floor"] is alone["excess"] is alone["floor_outcomes"] is None
    itself = paired(own, own, "word")  # takes nothing from any teacher: its own floor, and no excess
    assert itself["floor"] == itself["dir"] and itself["excess"] is None


def test_what_a_model_gives_without_the_trigger_stands_beside_what_it_gives_with_it():
    always = Voter(TASK.tokenizer.get_vocab())
    both = {key: rate_of(measured(always)[key]["word"]).value for key in ("flip", "flip_clean")}
    assert both == {"flip": 1.0, "flip_clean": 1.0}
    obeying = measured(Voter(["cf"]))
    assert rate_of(obeying["flip"]["word"]).value == 1.0 and rate_of(obeying["flip_clean"]["word"]).value == 0.0
