import re

import pytest

from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.judging.report import DefectReport
from remos_hf.sharing.card_measured import chosen_student
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos
from tests.sharing.reports import cell, report, usual
from tests.sharing.test_model_card import BARE, text_of

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


def test_the_table_shows_plain_fine_tuning_its_rivals_and_the_student_with_their_counts():
    text = text_of(BARE, report([*usual(), *usual(seed=1), cell("retrain", (50, 100), (0, 9), None)]))
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ") and "[" in line}
    names = [name.strip("| ") for name in rows if "student" != name.strip("| ")]
    assert names == ["finetune", "finetune lr x3", "random 0.9", "**remos 0.9** (this student)"]
    own = rows["| **remos 0.9** (this student)"]
    excess = excess_dir(Rate.of(10, 200), Rate.of(4, 200))
    assert own == (
        "| **remos 0.9** (this student) | 86.0 (86.0, 86.0) | 5.0 [2.7, 9.0] (5.0, 5.0) | 200 | 2 | 2.0 | "
        f"3.0 [{100 * excess.low:.1f}, {100 * excess.high:.1f}] |"
    )


def test_what_inherited_less_is_told_so_and_never_called_clean():
    text = text_of(BARE, report())
    assert "The student inherited less of this defect than plain fine-tuning: excess DIR 3.0" in text
    assert "At equal accuracy the student inherited less than a random reset" in text
    assert "NOT shown" not in text
    words = re.compile(r"\b(is|are|be|was) (clean|safe|secure|free|robust)\b|defect-free|backdoor-free|guarantee", re.I)
    for strategy in ("Remos", "Finetune", "Random"):
        record = Sidecars({"strategy": {"name": strategy}})
        student = {"Remos": "remos 0.9", "Finetune": "finetune", "Random": "random 0.9"}[strategy]
        assert not words.search(text_of(record, report(), student=student))


@pytest.mark.parametrize(
    ("rival", "kind"), [("random", "a random reset"), ("faster", "plain fine-tuning at a higher learning rate")]
)
def test_a_rival_that_does_as_well_at_equal_accuracy_is_told(rival, kind):
    text = text_of(BARE, report(usual(**{rival: (6, 100)})))
    assert f"The student is NOT shown to have inherited less than {kind} at the same accuracy or a better one" in text


def test_a_rival_that_is_more_accurate_and_inherits_more_is_no_comparison_at_equal_accuracy():
    # Whatever ruins a student keeps the defect away.
    cells = usual()
    cells[3] = cell("remos 0.9", (60, 100), (1, 100), (1, 100))
    text = text_of(BARE, report(cells))
    assert "At equal accuracy the student inherited less" not in text
    assert "Every random reset measured here is more accurate than the student by over 1 point" in text
    assert "whether one that costs as much accuracy would inherit as little is not known" in text


def test_among_rivals_the_equally_accurate_one_is_beaten_and_the_more_accurate_one_not_forgotten():
    cells = [*usual(random=(40, 100)), cell("random 0.97", (90, 100), (60, 100), (2, 100))]
    text = text_of(BARE, report(cells))
    assert "At equal accuracy the student inherited less than a random reset" in text and "of random 0.9, in %" in text
    cells[-1] = cell("random 0.97", (90, 100), (5, 100), (2, 100))
    assert "NOT shown to have inherited less than a random reset at the same" in text_of(BARE, report(cells))


def test_a_rival_that_is_less_accurate_is_no_comparison_at_equal_accuracy():
    cells = usual()
    cells[2] = cell("random 0.9", (80, 100), (1, 100))
    text = text_of(BARE, report(cells))
    assert "No random reset measured here is as accurate as the student" in text


def test_rivals_that_were_not_measured_are_named():
    cells = usual()
    text = text_of(BARE, report([cells[0], cells[3]]))
    assert "A random reset was not measured" in text
    assert "Plain fine-tuning at a higher learning rate was not measured" in text
    assert "Plain fine-tuning was not measured: whether there was anything" in text_of(BARE, report([cells[3]]))


def test_where_plain_fine_tuning_does_not_inherit_the_card_says_that_nothing_was_shown():
    cells = [cell("finetune", (90, 100), (4, 100), (3, 100)), cell("remos 0.9", (86, 100), (1, 100), (1, 100))]
    text = text_of(BARE, report(cells))
    assert "Plain fine-tuning does not inherit this defect" in text
    assert "inherited less of this defect than" not in text and "it inherited less of 0" in text


def test_a_student_within_the_reach_of_plain_fine_tuning_is_not_said_to_inherit_less():
    cells = [cell("finetune", (90, 100), (50, 100)), cell("remos 0.9", (86, 100), (45, 100))]
    text = text_of(BARE, report(cells))
    assert "is not shown to have inherited less of this defect" in text and "it inherited less of 0" in text


def test_plain_fine_tuning_itself_is_told_to_have_done_nothing():
    plain = Sidecars({"strategy": Finetune().to_dict()})
    assert "nothing was done against inheriting the defect" in text_of(plain, report())


def test_a_row_of_several_seeds_or_backdoors_is_told_to_be_several_models():
    assert "A row pools" not in text_of(BARE, report())
    assert "one for each seed." in text_of(BARE, report([*usual(), *usual(seed=1)]))
    audited = report(audits={"SST-2": {"students": {}}})
    assert "one for each seed and each implanted defect. The uploaded weights are at most one" in text_of(BARE, audited)


def test_the_student_that_was_made_as_the_record_says_is_found():
    assert chosen_student(report(), BARE) == ("SST-2", "remos 0.9")
    other_seed = Sidecars({"strategy": Remos(0.9, seed=7).to_dict()})
    assert chosen_student(report(), other_seed) == ("SST-2", "remos 0.9")
    assert chosen_student(report(), Sidecars({"strategy": Finetune().to_dict()})) == ("SST-2", "finetune")


def test_a_student_that_was_made_otherwise_is_refused():
    with pytest.raises(ValueError, match="'random 0.9' was made by.*but the record says"):
        chosen_student(report(), BARE, "random 0.9")
    with pytest.raises(ValueError, match="0 students of the report.*one of"):
        chosen_student(report(), Sidecars({"strategy": Random(0.5).to_dict()}))
    with pytest.raises(ValueError, match="no student 'other'"):
        chosen_student(report(), BARE, "other")


def test_the_task_must_be_clear():
    two = report([*usual(), *usual(task="IMDB")])
    with pytest.raises(ValueError, match="2 tasks.*'SST-2', 'IMDB'"):
        chosen_student(two, BARE)
    assert chosen_student(two, BARE, task="IMDB") == ("IMDB", "remos 0.9")
    with pytest.raises(ValueError, match="no task 'QNLI'"):
        chosen_student(two, BARE, task="QNLI")
    with pytest.raises(ValueError, match="no records"):
        chosen_student(DefectReport([]), BARE)
