import pytest

from remos_hf.judging.judgement import judged
from remos_hf.judging.one_student import (
    LESS,
    NOT_LESS,
    PLAINLY,
    OfStudent,
    answer_of,
    follows_of,
    of_student,
)
from remos_hf.judging.verdicts import CANNOT, NOT_SHOWN, NOTHING, SHOWN
from tests.judging.reports import FASTER, PLAIN, RANDOM, REMOS, USUAL, records, report, teachers


def said(*several, student="remos 0.9", **settings):
    (verdict,) = judged(report(*(several or USUAL), **settings)).verdicts
    return of_student(verdict, student)


def given(*several, student="remos 0.9"):
    """One seed of each, measured as the very weights that they are."""
    weights = {"weights": "a" * 64, "from": "x"}
    one = [[{**record, "given": weights} for record in of if record["seed"] == 0] for of in several]
    return said(*one, student=student, taught={"given": teachers()["word-0"]})


def text_of(found):
    return " ".join(found.sentences).replace("\N{NO-BREAK SPACE}", " ")


# --- students that an audit made alike ---


def test_over_three_seeds_a_student_inherits_less_or_is_not_shown_to():
    found = said()
    assert found.kind == LESS and "ReMoS (keeping 90 %) reaches DIR 5.3 %" in text_of(found)
    assert "It inherits 92.7 points [87.3, 95.6] less than plain fine-tuning" in text_of(found)
    same = said(PLAIN, records("remos 0.9", (190, 199, 197)), RANDOM, FASTER)
    assert same.kind == NOT_LESS and "It is not shown to inherit less" in text_of(same)


def test_what_is_left_is_held_against_its_own_floor():
    assert "It removes the defect" in text_of(said())
    much = said(PLAIN, records("remos 0.9", (90, 92, 94)))
    assert much.kind == LESS and "It removes" not in text_of(much) and "What is left is 44.0 points" in text_of(much)
    without = said(PLAIN, records("remos 0.9", (10, 14, 8), floors=None))
    assert "no benign floor of its own, so what is left cannot be said" in text_of(without)


def test_below_three_seeds_nothing_is_compared():
    found = said(*(one[:2] for one in USUAL))
    assert found.kind == CANNOT and "cannot be said: 2 seeds" in text_of(found) and found.reason.key == "seeds"
    few = said(PLAIN, REMOS[:2])
    assert few.kind == CANNOT and "2 seeds in common with it; 3 are needed" in text_of(few)


def test_a_student_near_the_commonest_label_says_nothing():
    assert said(PLAIN, records("remos 0.9", (0, 0, 0), acc=(103, 101, 102))).kind == CANNOT
    assert said(PLAIN, records("remos 0.9", (0, 0, 0), acc=(150, 150, 150))).kind == LESS


def test_behind_the_teachers_gate_too():
    found = said(taught=teachers((20, 20, 20)))
    assert found.kind == CANNOT and "does not obey its own trigger" in text_of(found)


def test_where_plain_fine_tuning_inherits_nothing_there_is_nothing_to_judge_by():
    found = said(records("finetune", (5, 4, 6)), REMOS)
    assert found.kind == NOTHING and "There is nothing to reduce" in text_of(found)


@pytest.mark.parametrize(("dirs", "kind"), [((196, 198, 194), PLAINLY), ((5, 4, 6), NOTHING)])
def test_plain_fine_tuning_itself_is_told_to_have_done_nothing(dirs, kind):
    found = said(records("finetune", dirs), student="finetune")
    assert found.kind == kind and "nothing was done against inheriting" in text_of(found)


# --- rivals ---


def test_a_rival_is_denied_only_where_the_kinds_of_all_others_are_known():
    told = text_of(said(PLAIN, REMOS))
    assert "A random reset was not measured" in told
    assert "A higher learning rate was not measured" in told
    told = text_of(said(PLAIN, REMOS, records("somebody's", (3, 4, 5))))
    assert "was not measured" not in told
    assert "Whether a random reset was measured is not known: how “somebody's” was made is not recorded." in told


def test_a_rival_is_compared_at_equal_accuracy_alone():
    assert "56.3 points [39.4, 72.8] more than ReMoS" in text_of(said())
    assert "it is not told apart from ReMoS" in text_of(said(PLAIN, REMOS, records("random 0.9", (9, 14, 9))))
    far = text_of(said(PLAIN, REMOS, records("random 0.9", (9, 14, 9), acc=(150, 151, 150))))
    assert "No student of a random reset has the accuracy of ReMoS" in far


# --- weights that were given ---


def test_of_given_weights_their_own_samples_tell():
    found = given(*USUAL)
    assert found.kind == NOT_SHOWN and "does not show the defect on these inputs: DIR 5.0 %" in text_of(found)
    assert given(*USUAL, student="random 0.9").kind == SHOWN


def test_given_weights_are_compared_with_the_plain_ones_beside_them_as_two_models():
    told = text_of(given(*USUAL))
    assert "“remos 0.9” does so 93.0 points [88.1, 95.5] less." in told and "That compares two models" in told
    close = text_of(given(PLAIN, records("remos 0.9", (195, 0, 0))))
    assert "does so 0.5 points" in close and "which may be chance" in close
    more = text_of(given(records("finetune", (20, 0, 0)), records("remos 0.9", (60, 0, 0))))
    assert "“remos 0.9” does so 20.0 points [" in more and "] more." in more
    assert "Plain fine-tuning was not measured beside it" in text_of(given(REMOS))


def test_given_plain_fine_tuning_is_compared_with_nothing():
    found = given(*USUAL, student="finetune")
    assert found.kind == SHOWN and "nothing was done against inheriting" in text_of(found)
    assert "beside it" not in text_of(found)


# --- all defects together ---


def test_an_answer_counts_what_was_said_of_each_defect():
    told = [OfStudent(name, kind, []) for name, kind in (("a", SHOWN), ("b", NOT_SHOWN), ("c", NOT_SHOWN))]
    answer = "Of 3 defects, these weights show a; do not show b and c."
    assert answer_of(told, "these weights") == answer
    many = [OfStudent(f"d{number}", LESS, []) for number in range(4)]
    assert answer_of(many, "they") == "Of 4 defects, they inherit 4 of them less than plain fine-tuning does."
    unknown = said(taught=teachers((20, 20, 20)))
    assert "; of word it cannot be said." in answer_of([*told, unknown], "they")
    assert answer_of([unknown], "they").startswith("Nothing can be said of they: the poisoned teacher")


def test_what_follows_never_calls_weights_free_of_defects():
    shown, not_shown, cannot = (OfStudent(kind, kind, []) for kind in (SHOWN, NOT_SHOWN, CANNOT))
    assert "They fail on inputs with" in follows_of([shown, not_shown, cannot])
    assert "does not say that they are free of defects" in follows_of([not_shown])
    assert follows_of([not_shown, cannot]) == "What cannot be said is not known to be absent."
