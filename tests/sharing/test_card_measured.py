import re

import pytest

from remos_hf.defects.feature_attack import FeatureAttack
from remos_hf.judging.report import DefectReport
from remos_hf.sharing.card_measured import MeasuredStudent, Tie, chosen_student
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos
from tests.judging.reports import PLAIN, REMOS, USUAL, records, report
from tests.sharing.reports import DEFECTS, audited, measured
from tests.sharing.test_model_card import BARE, WEIGHTS, head_of, text_of

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


def rows_of(text):
    lines = text.split("| student | ACC")[1].split("\n\n")[0].splitlines()[2:]
    return [line.split(" | ")[0].strip("| ") for line in lines]


# --- whose rows they are ---


def test_only_rows_that_name_these_weights_are_of_this_student():
    own = text_of(BARE, measured(WEIGHTS), weights=WEIGHTS)
    assert "Measured of these weights (SHA-256 aaaaaaaaaaaa…): 84.0 % accuracy. Of 1 defect, these weights do" in own
    assert "The row in bold is these very weights" in own and "Nothing was measured" not in own
    for other in ("c" * 64, None):
        text = text_of(BARE, measured(WEIGHTS), weights=other)
        assert "Measured of these weights" not in text and "Nothing was measured of these weights" in text
        assert "The report beside them is of other weights" in text
        assert "No row is of the weights of this card" in text and "- these weights themselves" in text


def test_an_audits_rows_are_students_made_the_same_way_and_never_this_one():
    text = text_of(BARE, audited(), weights=WEIGHTS)
    assert "Nothing was measured of these weights. The report is of students made the same way from a teacher" in text
    assert "from a teacher that we poisoned" in text and "this student" not in text
    assert "students made this way inherit trigger words (word) less than plain fine-tuning does" in text
    assert "No row is of the weights of this card" in text and "- trigger words\n" in text


def test_a_found_defect_is_not_said_to_come_from_a_poisoned_teacher():
    several = [records(one[0]["student"], (10, 12, 14), flip=False) for one in USUAL]
    text = text_of(BARE, audited(*several, defects={"word": FeatureAttack().to_dict()}), weights=WEIGHTS)
    assert "we poisoned" not in text and "a teacher, on which the defects were found" in text


def test_a_report_that_names_no_weights_and_is_no_audits_is_said_to_be_so():
    text = text_of(BARE, report(*USUAL), weights=WEIGHTS)
    assert "does not say which weights its rows are of" in text and "Which weights the rows are of" in text
    assert "we poisoned" not in text


def test_these_weights_are_not_pooled_with_other_seeds_of_their_name():
    both = [*PLAIN, *({**one, "given": {"weights": f"{one['seed']}" * 64, "from": "x"}} for one in REMOS)]
    found = MeasuredStudent(audited(both), BARE, None, None, "1" * 64)
    assert (found.tie, [one["seed"] for one in found.records]) == (Tie.THESE, [1])
    row = found.verdicts["word"].section.rows[-1]
    assert (row["student"], row["seeds"], row["dir"].count) == ("remos 0.9", 1, REMOS[1]["dir"]["count"])
    plain = found.verdicts["word"].section.plain
    assert (plain["seeds"], plain["dir"].count) == (1, PLAIN[1]["dir"]["count"])


def test_other_weights_of_their_name_on_another_defect_are_not_theirs():
    given = {"weights": WEIGHTS, "from": "x"}, {"weights": "c" * 64, "from": "x"}
    both = [{**REMOS[0], "given": given[0]}, {**REMOS[0], "defect": "more", "given": given[1]}]
    found = MeasuredStudent(report(both, [{**PLAIN[0], "defect": "more"}]), BARE, None, None, WEIGHTS)
    assert list(found.of_defects) == ["word"] and found.without_it == ["more"]


def test_weights_are_found_whatever_their_name_and_another_name_is_refused():
    given = measured(WEIGHTS, [records("mine", (5, 5, 5))], student="mine")
    assert MeasuredStudent(given, BARE, None, None, WEIGHTS).student == "mine"
    with pytest.raises(ValueError, match="these weights are 'mine' of task 'SST-2', and not 'other'"):
        MeasuredStudent(given, BARE, "other", None, WEIGHTS)


# --- what is shown ---


def test_the_table_shows_the_teacher_plain_fine_tuning_its_rivals_and_the_student():
    text = text_of(BARE, audited(*USUAL, records("retrain", (1, 1, 1))))
    assert rows_of(text) == [
        "teacher",
        "the same teacher, never poisoned",
        "finetune",
        "random 0.9",
        "finetune lr x3",
        "**remos 0.9**",
    ]


def test_no_student_is_ever_called_clean():
    words = re.compile(r"\b(is|are|be|was) (clean|safe|secure|free|robust)\b(?! of)|defect-free|backdoor-free", re.I)
    for strategy in (Remos(0.9), Finetune(), Random(0.9)):
        record = Sidecars({"strategy": strategy.to_dict()})
        assert not words.search(text_of(record, audited()))
    assert not words.search(text_of(BARE, measured(WEIGHTS), weights=WEIGHTS))


def test_what_follows_is_told_of_weights_that_show_a_defect_and_of_those_that_do_not():
    shows = measured(WEIGHTS, student="finetune")
    plain = Sidecars({"strategy": Finetune().to_dict()})
    *_, first, follows = head_of(text_of(plain, shows, weights=WEIGHTS))
    assert "these weights show trigger words (word)" in first and "They fail on inputs with trigger words" in follows
    *_, first, follows = head_of(text_of(BARE, measured(WEIGHTS), weights=WEIGHTS))
    assert "do not show trigger words (word)" in first and "does not say that they are free of defects" in follows


def test_where_nothing_can_be_said_the_head_says_so():
    near_chance = measured(WEIGHTS, [PLAIN, records("remos 0.9", (4, 4, 4), acc=(103, 103, 103))])
    *_, first, follows = head_of(text_of(BARE, near_chance, weights=WEIGHTS))
    assert "Nothing can be said of these weights: " in first and "not known to be absent" in follows
    two_seeds = audited(*(one[:2] for one in USUAL))
    assert "Nothing can be said of students made this way: 2 seeds" in head_of(text_of(BARE, two_seeds))[1]


# --- which student of a report ---


def test_the_student_that_was_made_as_the_record_says_is_found():
    assert chosen_student(audited(), BARE) == ("SST-2", "remos 0.9")
    other_seed = Sidecars({"strategy": Remos(0.9, seed=7).to_dict()})
    assert chosen_student(audited(), other_seed) == ("SST-2", "remos 0.9")
    assert chosen_student(audited(), Sidecars({"strategy": Finetune().to_dict()})) == ("SST-2", "finetune")


def test_a_student_that_was_made_otherwise_is_refused():
    with pytest.raises(ValueError, match="'random 0.9' was made by.*but the record says"):
        chosen_student(audited(), BARE, "random 0.9")
    with pytest.raises(ValueError, match="0 students of the report.*one of"):
        chosen_student(audited(), Sidecars({"strategy": Random(0.5).to_dict()}))
    with pytest.raises(ValueError, match="no student 'other'"):
        chosen_student(audited(), BARE, "other")


def test_the_task_must_be_clear():
    two = audited(*USUAL, *([{**one, "task": "IMDB"} for one in of] for of in USUAL))
    with pytest.raises(ValueError, match="2 tasks.*'SST-2', 'IMDB'"):
        chosen_student(two, BARE)
    assert chosen_student(two, BARE, task="IMDB") == ("IMDB", "remos 0.9")
    with pytest.raises(ValueError, match="no task 'QNLI'"):
        chosen_student(two, BARE, task="QNLI")
    with pytest.raises(ValueError, match="no records"):
        chosen_student(DefectReport([]), BARE)


def test_what_the_report_holds_of_others_but_not_of_this_student_is_named():
    more = [[{**one, "defect": "more"} for one in PLAIN]]
    found = MeasuredStudent(
        audited(*USUAL, *more, defects={**DEFECTS, "more": {}}, missing={"SST-2": 3}), BARE, None, None, None
    )
    assert found.without_it == ["more"] and list(found.of_defects) == ["word"]
