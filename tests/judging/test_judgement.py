import pytest

from remos_hf.errors import NonFiniteError
from remos_hf.judging.judgement import judged
from remos_hf.judging.verdicts import CANNOT, NOT_SHOWN, SHOWN
from remos_hf.strategies.hardened import Hardened
from remos_hf.strategies.subspace import Subspace
from tests.judging.reports import FASTER, PLAIN, RANDOM, REMOS, USUAL, records, report, teachers

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
    assert "reduces 1 of them and removes none, at" in weak.answer
    dear = answer(PLAIN, records("remos 0.9", (10, 14, 8), acc=(150, 150, 150)))
    assert "10.0 points less accuracy (more than the budget)" in dear.answer.replace("\N{NO-BREAK SPACE}", " ")
    assert "ReMoS was not measured" in answer(PLAIN, RANDOM).answer


def test_the_best_start_of_our_tables_is_told_of_before_the_published_one():
    both = {"name": "Subspace + Hardened", "strategies": [Subspace().to_dict(), Hardened().to_dict()]}
    ours = [{**one, "made": {**one["made"], "strategy": both}} for one in records("subspace + hardened", (5, 6, 4))]
    found = answer(*USUAL, ours)
    removed, published = found.answer.split(". ")[1:]
    assert removed.startswith("A subspace start with hardening removes 1 of them")
    assert published.startswith("ReMoS removes 1 of them")
    names = [name for name in found.glance.header if "ReMoS" in name or "subspace" in name]
    assert names == ["a subspace start with hardening", "ReMoS"]
    assert "was not measured" not in answer(PLAIN, ours).answer


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
    assert any("No start that was measured is shown to reduce" in one for one in found.advice)


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


# --- reports that mix what must not be mixed ---


def given(several, name=None):
    found = [{**record, "given": {"weights": None, "from": None}} for record in several]
    return [{**record, "student": name} for record in found] if name else found


def test_weights_that_were_given_are_not_counted_as_plain_fine_tuning():
    mine = of_defect("sentence", [given(records("mine", (190, 190, 190))[:1])])
    found = judged(report(*USUAL, *mine))
    assert found.answer.startswith("Plain fine-tuning keeps 1 of 1 defect.")
    assert found.answer.endswith("Of 1 defect tried, these weights show 1.")
    assert any("made the same way" in one for one in found.limits)


def test_beside_a_plainly_fine_tuned_student_the_answer_is_of_the_other():
    plain, mine = given(PLAIN[:1]), given(records("mine", (2, 2, 2))[:1])
    found = judged(report(plain, mine, taught={"given": teachers()["word-0"]}))
    assert found.answer == "Of 1 defect tried, these weights show none."
    assert [line[1:3] for line in found.glance.lines] == [["finetune", SHOWN], ["mine", NOT_SHOWN]]
    alone = judged(report(plain, taught={"given": teachers()["word-0"]}))
    assert alone.answer == "Of 1 defect tried, these weights show 1."


def test_several_given_students_are_each_answered_for_and_no_doubt_is_turned_into_a_denial():
    quiet, unsure = given(records("a", (2, 2, 2))[:1]), given(records("b", (2, 2, 2), of=20, floors=(0, 0, 0))[:1])
    found = judged(report(quiet, unsure, taught={"given": teachers()["word-0"]}))
    assert found.answer == "Of 1 defect tried, “a” shows none; “b”: of 1 it cannot be said."
    (verdict,) = found.verdicts
    assert verdict.kind == CANNOT and verdict.verdict == "cannot be said of “b”; not shown by “a”" and found.can_be_said
    assert found.glance.lines[1][2].startswith("cannot be said: “b” could show the defect on 20 samples")
    many = [given(records("x", (2, 2, 2))[:1], name=f"s{number}") for number in range(5)]
    assert judged(report(*many, taught={"given": teachers()["word-0"]})).answer.endswith("; 2 more are in the table.")


def test_several_tasks_count_pairs_and_name_them():
    other = [[{**record, "task": "IMDB"} for record in of] for of in USUAL]
    found = judged(report(*USUAL, *other, teachers={task: teachers() for task in ("SST-2", "IMDB")}), budgets=BUDGET)
    assert found.answer.startswith("Plain fine-tuning keeps 2 of 2 pairs of task and defect.")
    assert [line[0] for line in found.glance.lines] == ["SST-2: word", "IMDB: word"]
    assert any("SST-2: word and IMDB: word" in one for one in found.advice)


def test_what_lies_outside_of_the_budget_for_some_defects_is_told():
    dear = of_defect("sentence", [PLAIN, records("remos 0.9", (10, 14, 8), acc=(150, 150, 150))])
    found = answer(*USUAL, *dear)
    assert "(for 1 of 2 more than the budget)" in found.answer
    assert any("is shown to reduce what is kept of sentence" in one for one in found.advice)


def test_what_cannot_be_said_of_the_recommended_start_is_told():
    found = answer(PLAIN, RANDOM, records("remos 0.9", (10, 14, 8))[:2])
    assert found.answer.endswith("removes none of them at the same accuracy; of 1 of them it cannot be said.")
    somebody = answer(PLAIN, records("somebody's", (10, 14, 8)))
    assert "Whether ReMoS was measured is not known" in somebody.answer


@pytest.mark.parametrize(
    ("several", "words"),
    [
        ([records("remos 0.9", (196, 197, 195))], "Take another teacher"),
        ([records("remos 0.9", (96, 97, 95))[:2]], "Of some it cannot be said"),
        ([], "Measure other starts"),
    ],
)
def test_what_to_do_where_no_start_is_shown_to_help(several, words):
    assert words in answer(PLAIN, *several).advice[0]


def test_cells_say_themselves_what_the_budget_is_to_them():
    dear = answer(PLAIN, records("remos 0.9", (10, 14, 8), acc=(150, 150, 150))).glance
    assert dear.lines[0][-1].endswith("(over the budget)")
    without = [[{**record, "dev_acc": None} for record in of] for of in (PLAIN, REMOS)]
    assert answer(*without).glance.lines[0][-1].endswith("(budget not checked)")
    assert "budget" not in answer(PLAIN, REMOS).glance.lines[0][-1]


def test_a_reason_that_is_not_everyones_is_told_as_that():
    mute = of_defect("sentence", [records("finetune", (0, 0, 0), acc=(100, 100, 100))])
    few = [of[:2] for of in USUAL]
    assert "(1 of 2; the others for other reasons)" in answer(*few, *mute).answer


def test_whose_students_were_is_told_by_the_defect():
    found = records("finetune", (90, 90, 90), flip=False)
    assert any("the teacher as it is" in one and "poisoned" not in one for one in answer(found).limits)
    assert any("that we poisoned" in one for one in answer(*USUAL).limits)


def test_nothing_is_said_of_what_is_no_number():
    broken = [{**record, "commonest": float("nan")} for record in PLAIN]
    with pytest.raises(NonFiniteError, match="Record 0"):
        answer(broken)
    with pytest.raises(ValueError, match="but got none"):
        judged(report(*USUAL), budgets=())


def test_the_same_advice_is_given_once():
    few = of_defect("word", [records("finetune", (9, 9, 9), floors=(0, 0, 0), of=20)])
    none = of_defect("patch", [records("finetune", (0, 0, 0), floors=(0, 0, 0), of=0)])
    advice = answer(*few, *none, taught=teachers((20, 20, 20), of=20)).advice
    assert len(advice) == len(set(advice)) and any("--test-data" in one for one in advice)
