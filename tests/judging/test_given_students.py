import pytest

from remos_hf.judging.given_students import verdict_of_given
from remos_hf.judging.judgement import judged
from remos_hf.judging.verdicts import CANNOT, NOT_SHOWN, SHOWN
from tests.judging.reports import records, report, teachers

GIVEN = {"weights": "a" * 64, "from": "student"}


def given_report(count, *, taught=None, of=200, floor=4, acc=170):
    held = {"given": teachers()["word-0"]} if taught is None else taught
    floors = None if floor is None else (floor,) * 3
    one = records("mine", (count,) * 3, floors=floors, of=of, acc=(acc,) * 3, given=GIVEN)[:1]
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
        ({"of": 20, "floor": 0}, "20 samples a seed alone"),
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
    assert found.verdicts[0].verdict == "shown by “mine”"
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
