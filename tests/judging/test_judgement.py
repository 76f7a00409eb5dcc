import pytest

from remos_hf.judging.judgement import judged
from tests.judging.reports import FASTER, PLAIN, RANDOM, USUAL, records, report, teachers

BUDGET = (0.02,)


def of_defect(name, several):
    return [[{**record, "defect": name} for record in of] for of in several]


def answer(*several, **options):
    return judged(report(*several, **options), budgets=BUDGET)


def test_the_answer_counts_what_is_kept_and_what_the_recommended_start_removes_and_costs():
    found = answer(*USUAL)
    said = found.answer.replace("\N{NO-BREAK SPACE}", " ")
    assert said == "Plain fine-tuning keeps 1 of 1 defect. ReMoS removes 1 of them at 1.0 points less accuracy."
    weak = answer(PLAIN, records("remos 0.9", (80, 84, 82), acc=(168, 168, 168)), RANDOM)
    assert "removes none of them and reduces 1 other at" in weak.answer
    dear = answer(PLAIN, records("remos 0.9", (10, 14, 8), acc=(150, 150, 150)))
    assert "10.0 points less accuracy (more than the budget)" in dear.answer.replace("\N{NO-BREAK SPACE}", " ")
    assert "ReMoS was not measured" in answer(PLAIN, RANDOM).answer


def test_nothing_kept_is_nothing_to_remove():
    found = answer(records("finetune", (4, 4, 4)), *USUAL[1:])
    assert found.answer == "Plain fine-tuning keeps none of 1 defect. There is nothing to remove." and found.can_be_said


def test_where_nothing_can_be_said_the_answer_says_why_and_the_advice_what_to_do():
    few = [of[:1] for of in USUAL]
    found = answer(*few, taught={name: one for name, one in teachers().items() if name.endswith("0")})
    assert not found.can_be_said and found.answer.startswith("Nothing can be said: 1 seed tells nothing of the spread")
    assert any("--seeds 0 1 2" in one for one in found.advice)


def test_what_cannot_be_said_of_some_is_told_beside_what_can():
    mute = of_defect("sentence", [records("finetune", (0, 0, 0), acc=(100, 100, 100))])
    found = answer(*USUAL, *mute)
    assert (
        found.answer.startswith("Plain fine-tuning keeps 1 of 2 defects; of 1 it cannot be said.") and found.can_be_said
    )


def test_the_advice_names_the_start_that_leaves_least_also_where_it_is_a_rival():
    assert any(one.startswith("ReMoS leaves least of word, within 2 points") for one in answer(*USUAL).advice)
    found = answer(PLAIN, records("remos 0.9", (80, 84, 82)), records("random 0.9", (10, 12, 11)))
    assert any(one.startswith("A random reset leaves least of word") for one in found.advice)
    assert any("no choice of weights is shown to do better" in one for one in found.advice)
    assert not any("no choice of weights" in one for one in answer(*USUAL).advice)


def test_no_start_is_recommended_where_none_reduces():
    found = answer(PLAIN, records("remos 0.9", (196, 197, 195)))
    assert any("No start that was measured reduces" in one for one in found.advice)


def test_the_glance_has_a_line_a_defect_and_always_a_place_for_the_recommended_start_with_its_accuracy():
    glance = answer(PLAIN, RANDOM, FASTER, *of_defect("sentence", USUAL)).glance
    lines = {line[0]: dict(zip(glance.header, line, strict=True)) for line in glance.lines}
    assert set(lines) == {"word", "sentence"}
    assert lines["word"]["ReMoS"] == "-" and lines["sentence"]["ReMoS"] == "5.3 at 84.0"
    assert lines["word"]["teacher"] == "99.0 at 86.0" and lines["word"]["plain fine-tuning"] == "98.0 at 85.0"


def test_another_start_that_does_best_has_a_column_of_its_own():
    assert "best other start" not in answer(*USUAL).glance.header
    glance = answer(PLAIN, records("remos 0.9", (80, 84, 82)), records("mag_prune 0.9", (9, 8, 9))).glance
    assert dict(zip(glance.header, glance.lines[0], strict=True))["best other start"] == (
        "resetting the smallest weights (keeping 90 %): 4.3 at 85.0"
    )
    beside = answer(PLAIN, records("mag_prune 0.9", (9, 8, 9)), *of_defect("sentence", USUAL)).glance
    assert [line[-1] for line in beside.lines] == ["resetting the smallest weights (keeping 90 %): 4.3 at 85.0", "-"]


def test_a_defect_has_its_plain_name_where_the_report_knows_its_class():
    audits = {"SST-2": {"defects": {"word": {"name": "TriggerWords"}}}}
    assert answer(*USUAL, audits=audits).glance.lines[0][0] == "trigger words (word)"


@pytest.mark.parametrize("given", [True, False])
def test_whose_weights_the_answer_speaks_of_is_said(given):
    several = [[{**record, "given": {"weights": None, "from": None}} for record in of] if given else of for of in USUAL]
    assert any("made the same way" in one for one in answer(*several).limits) != given


def test_an_audit_that_is_not_over_says_so():
    assert any("3 students are still to be made" in one for one in answer(*USUAL, missing={"SST-2": 3}).limits)
