from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.evaluation.measures import Rate
from remos_hf.evaluation.over_seeds import LEAST_SPREAD, rate_over_seeds
from remos_hf.judging.kinds import MIXED, RANDOM, REMOS, TEACHER
from remos_hf.judging.rows import best_within, named_row, rows_of
from tests.judging.reports import PLAIN, USUAL, made_of, records, report, teachers
from tests.judging.reports import REMOS as SLICED

REFERENCE = "finetune"


def rows(*several):
    return rows_of([record for of in several for record in of], REFERENCE)


def test_a_row_puts_the_seeds_of_a_student_together():
    (row,) = rows(records("finetune", (180, 120, 60), acc=(180, 160, 140)))
    assert row["dir"] == rate_over_seeds([Rate.of(count, 200) for count in (180, 120, 60)])
    assert row["dir_by_seed"] == [0.9, 0.6, 0.3] and row["acc_by_seed"] == [0.9, 0.8, 0.7]
    assert (row["dir"].count, row["dir"].num_samples, row["seeds"]) == (360, 600, 3)
    assert row["excess"].value == pytest.approx(0.6 - 0.02) and row["floor"].value == pytest.approx(0.02)


def test_kinds_come_from_the_records():
    found = {row["student"]: row["kind"] for row in rows(*USUAL)}
    assert found["remos 0.9"] == REMOS and found["random 0.9"] == RANDOM
    renamed = [{**record, "student": "random 0.9"} for record in SLICED]
    assert rows(PLAIN, renamed)[1]["kind"] == REMOS


def test_students_are_compared_on_the_seeds_that_both_have():
    own = records("remos 0.9", (20, 20, 20))[:2]
    row = rows(records("finetune", (120, 160, 0)), own)[1]
    assert row["against_plain"]["dir"].by_seed == pytest.approx((-0.5, -0.7))
    assert row["relative_dir"].value == pytest.approx(0.1 / fmean((0.6, 0.8)))


def test_what_each_sample_did_is_used():
    (own,) = (row["against_plain"]["dir"] for row in rows(PLAIN, SLICED)[1:])
    without = [{**record, "outcomes": None} for record in SLICED]
    (apart,) = (row["against_plain"]["dir"] for row in rows(PLAIN, without)[1:])
    assert own.paired_samples and not apart.paired_samples and own.value == apart.value


def test_the_teacher_of_each_defect_has_its_row():
    found = {**teachers(), "clean-0": {**teachers()["clean-0"], "dir": {"penultimate": Rate.of(150, 200).to_dict()}}}
    adversarial = records("finetune", (90, 90, 90), defect="penultimate", flip=False)
    word, other = report(PLAIN, adversarial, taught=found).sections()
    assert (
        word.teacher["kind"] == TEACHER
        and word.teacher["dir"].value == pytest.approx(0.99)
        and word.clean_teacher["seeds"] == 3
    )
    assert other.teacher["dir"].value == 0.75 and other.clean_teacher is None
    (without,) = report(PLAIN, taught={}).sections()
    assert without.teacher is None


def test_a_teacher_of_a_like_name_is_another_one():
    held = {name.replace("word", "word-2"): one for name, one in teachers().items()}
    (section,) = report(PLAIN, taught=held).sections()
    assert section.teacher is None


points = st.lists(st.tuples(st.sampled_from(["random", "remos"]), st.sampled_from([0.9, 0.7]), st.integers(0, 200)))


@settings(max_examples=40, deadline=None)
@given(points, st.integers(0, 200))
def test_each_rule_resets_as_much_as_its_dev_accuracy_allows(several, plain):
    several = list({point[:2]: point for point in several}.values())
    made = [records(f"{rule} {ratio:g}", (9, 9, 9), dev=dev) for rule, ratio, dev in several]
    found = best_within(rows(records("finetune", (9, 9, 9), dev=plain), *made), REFERENCE, (0.01, 0.04))
    assert len(found) == 2 * len({rule for rule, _, _ in several})
    for choice in found:
        able = [one[1] for one in several if one[0] == choice.rule and one[2] >= plain - round(200 * choice.budget)]
        assert (choice.row["made"]["slice_ratio"] if choice.row else None) == (min(able) if able else None)


def test_what_slices_nothing_is_a_rule_of_its_own():
    found = best_within(rows(PLAIN, records("finetune lr x3", (9, 9, 9), dev=100)), REFERENCE, (0.02,))
    assert [(one.rule, one.row) for one in found] == [("finetune lr x3", None)]


def test_without_plain_fine_tuning_or_dev_accuracy_nothing_is_chosen():
    assert best_within(rows(SLICED), REFERENCE, (0.02,)) == []
    without = [{**record, "dev_acc": None} for record in PLAIN]
    assert best_within(rows(without, SLICED), REFERENCE, (0.02,)) == []


def test_reactivation_is_put_together_by_number_of_samples():
    curve = {"0": Rate.of(0, 100).to_dict(), "20": Rate.of(50, 100).to_dict()}
    (row,) = rows(records("finetune", (9, 9, 9), reactivation=curve))
    assert row["reactivation"][20].value == 0.5 and list(row["reactivation"]) == [0, 20]
    assert row["floor_reactivation"] == {} and named_row([row], "none") is None and made_of("x") == {}


def test_the_teacher_of_given_students_is_the_one_that_was_given():
    given = [{**record, "given": {"weights": None, "from": None}} for record in PLAIN]
    both = {**teachers(), "given": teachers((20,), acc=(172,), clean=(172,))["word-0"]}
    for several, value in ((given, 0.1), (PLAIN, 0.99)):
        (section,) = report(several, taught=both).sections()
        assert section.teacher["dir"].value == pytest.approx(value) and section.given == (several is given)


def test_seeds_made_in_several_ways_have_no_way_of_making():
    one, *others = SLICED
    row = rows(PLAIN, [one, *({**record, "made": made_of("remos 0.7")} for record in others)])[1]
    assert row["kind"] == MIXED and row["made"] == {} and rows(PLAIN, SLICED)[1]["made"] == made_of("remos 0.9")


def test_seeds_of_a_rate_of_failures_are_taken_to_vary_and_those_of_an_accuracy_are_not():
    (row,) = rows(records("finetune", (9, 9, 9)))
    assert row["dir"] == rate_over_seeds([Rate.of(9, 200)] * 3, least_spread=LEAST_SPREAD)
    assert row["acc"] == rate_over_seeds([Rate.of(170, 200)] * 3)
    assert row["excess"].high - row["excess"].value > 1.959964 * LEAST_SPREAD / 3**0.5
