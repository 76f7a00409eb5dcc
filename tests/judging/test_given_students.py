import pytest

from remos_hf.evaluation.measures import Rate
from remos_hf.judging.given_students import verdict_of_given
from remos_hf.judging.judgement import judged
from remos_hf.judging.verdicts import CANNOT, NOT_SHOWN, SHOWN
from tests.judging.reports import records, report, teachers

GIVEN = {"weights": "a" * 64, "from": "student"}


def given_report(count, *, taught=None, of=200, floor=4, acc=170, floor_acc=None):
    held = {"given": teachers()["word-0"]} if taught is None else taught
    floors = None if floor is None else (floor,) * 3
    twin = {} if floor_acc is None else {"floor_acc": Rate.of(floor_acc, 200).to_dict()}
    one = records("mine", (count,) * 3, floors=floors, of=of, acc=(acc,) * 3, given=GIVEN, **twin)[:1]
    return report(one, taught=held)


def told(count, floor=4, **options):
    (section,) = given_report(count, floor=floor, **options).sections()
    return verdict_of_given(section)


@pytest.mark.parametrize(("count", "kind"), [(190, SHOWN), (40, SHOWN), (4, NOT_SHOWN), (0, NOT_SHOWN)])
def test_these_weights_show_a_defect_or_they_do_not(count, kind):
    found = told(count)
    assert found.kind == kind and "(n = 200)" in found.sentences[0].replace("\N{NO-BREAK SPACE}", " ")


def test_one_student_is_enough_to_speak_of_its_weights_and_too_little_to_speak_of_how_it_was_made():
    found = judged(given_report(190))
    assert found.can_be_said and found.answer == "Of 1 defect tried, these weights show 1."
    assert not any("made the same way" in one for one in found.limits)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"of": 60, "floor": None}, "may be anything from 2.6 to 15.9 %"),
        ({"of": 20, "floor": 0}, "20 samples alone"),
        ({"acc": 103}, "commonest label"),
    ],
)
def test_behind_the_same_gates(options, why):
    found = told(4, **options)
    assert found.kind == CANNOT and why in found.sentences[0]
    answer = judged(given_report(4, **options))
    assert not answer.can_be_said and answer.answer.startswith("Nothing can be said of these weights: ")


def test_where_the_teacher_does_not_show_it_either_nothing_is_praised():
    quiet = {"given": teachers((20, 20, 20))["word-0"]}
    found = told(4, taught=quiet)
    assert found.kind == NOT_SHOWN and "little to inherit" in found.sentences[-1]
    assert "Of 1 the teacher itself shows little" in judged(given_report(4, taught=quiet)).answer
    assert "little" not in judged(given_report(4)).answer


def test_each_of_several_students_has_its_own_verdict():
    one, other = given_report(190), given_report(2)
    renamed = [{**record, "student": "yours"} for record in other.records]
    found = judged(report(one.records, renamed, taught={"given": teachers()["word-0"]}))
    assert found.verdicts[0].verdict == "shown by “mine”; not shown by “yours”"
    assert [line[1:3] for line in found.glance.lines] == [["mine", SHOWN], ["yours", NOT_SHOWN]]


def test_a_twin_decides_where_there_is_one():
    kinds = [told(count, floor=floor).kind for count, floor in ((40, 4), (30, 14), (40, 38), (40, 60))]
    assert kinds == [SHOWN, CANNOT, NOT_SHOWN, NOT_SHOWN]


def test_how_much_was_inherited_needs_a_twin():
    assert any("inherited cannot be said" in one for one in told(100, floor=None).sentences)
    with_twin = told(100).claims[1]
    assert with_twin.holds is True and "48.0\N{NO-BREAK SPACE}points" in with_twin.sentence
    assert told(100, floor=130).claims[1].holds is False
    assert not any("inherited cannot be said" in one for one in told(0, floor=None).sentences)


def test_each_seed_of_a_student_is_looked_at_by_itself():
    held = report(
        records("mine", (4, 190, 4), acc=(100, 170, 170), given=GIVEN), taught={"given": teachers()["word-0"]}
    )
    (section,) = held.sections()
    found = verdict_of_given(section)
    assert [claim.holds for claim in found.claims if claim.about == "shows"] == [None, True, False]
    assert found.kind == SHOWN


@pytest.mark.parametrize(
    ("right", "kind", "words"), [(168, NOT_SHOWN, "no more than such"), (120, CANNOT, "the twin's own")]
)
def test_what_a_twin_shows_too_is_not_called_shown_and_a_weak_twin_is_no_proof(right, kind, words):
    found = told(130, floor=130, floor_acc=right)
    assert found.kind == kind and words in found.sentences[0]
    assert ("does not show" in found.sentences[0]) is (kind == NOT_SHOWN)


@pytest.mark.parametrize(
    ("dir_", "little", "words"), [(30, 1, "little to inherit"), (120, 0, "reaches 90 %"), (180, 0, "")]
)
def test_a_teacher_that_shows_less_than_a_working_trigger_is_told_and_little_is_called_little(dir_, little, words):
    taught = {"given": teachers((dir_,) * 3)["word-0"]}
    answer = judged(given_report(4, taught=taught))
    assert ("little or nothing" in answer.answer) is bool(little)
    sentences = " ".join(answer.verdicts[0].sentences)
    assert (words in sentences) if words else "The teacher itself" not in sentences


@pytest.mark.parametrize(("count", "floor", "holds"), [(100, 4, [True]), (100, 100, [False]), (30, 14, [])])
def test_what_was_inherited_is_what_is_shown_beyond_the_twin(count, floor, holds):
    assert [claim.holds for claim in told(count, floor=floor).claims if claim.about == "inherits"] == holds


def test_a_verdict_of_weights_on_a_part_of_the_inputs_says_so():
    facts = {"num_exposed": 100, "num_left_out": {"cut off": 100}}
    held = given_report(190)
    with_facts = report(
        held.records, taught={"given": teachers()["word-0"]}, audits={"SST-2": {"exposed": {"word": facts}}}
    )
    (section,) = with_facts.sections()
    assert verdict_of_given(section).verdict == f"{SHOWN} (50 % of the inputs could not be exposed)"


def test_weights_that_are_there_are_read_by_their_samples_and_take_more_of_them_and_no_seeds():
    found = judged(given_report(4, of=60, floor=None))
    assert found.advice == ["Give more test samples (`--data`, `--max-samples`): the interval is too wide."]
    assert "over seeds" not in found.how_to_read and "surely below 10 %" in found.how_to_read


@pytest.mark.parametrize("count", [0, 190])
def test_a_twin_that_could_show_nothing_is_told_and_not_taken_for_none(count):
    held = given_report(count)
    held.records[0] |= {"floor": Rate.of(0, 0).to_dict(), "floor_acc": Rate.of(100, 200).to_dict()}
    (section,) = held.sections()
    said = " ".join(verdict_of_given(section).sentences)
    assert "Its twin of a clean teacher gets 50.0 % right, but none right on which the defect could show" in said
    assert "No student of a teacher without the defect was given" not in said
