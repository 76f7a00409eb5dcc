import pytest

from remos_hf.judging.judgement import judged
from remos_hf.judging.report import DefectReport
from remos_hf.showing.page_parts import cost_tables, settings_told, teachers_table, unmeasured_told
from tests.showing.test_page import PLAIN, audited, of_seeds, record, remos


def test_seconds_are_averaged_over_seeds_and_those_of_a_student_in_several_records_count_once():
    records = [
        record("remos", 5, seed=seed, defect=defect, seconds={"train": 10.0 + seed, "profile": 2.0})
        for seed in (0, 2)
        for defect in ("word", "ripples")
    ]
    (table,) = cost_tables(DefectReport([*records, PLAIN]))
    assert table.header == ("student", "profile", "train", "all", "n")
    assert table.lines == [["remos", "2.0", "11.0", "13.0", "2"]]
    assert cost_tables(DefectReport([PLAIN])) == []


def test_what_was_measured_of_teachers_is_a_table():
    table = teachers_table(audited())
    assert ["word-0", "A to B", "90.0 (n = 100)"] in [line[:3] for line in table.lines]
    assert any(line[3].startswith("word: 99.0 [") for line in table.lines)
    assert teachers_table(DefectReport([PLAIN])) is None


def test_settings_are_told_by_task_and_teachers_apart():
    report = DefectReport([PLAIN], {"audits": {"A to B": {"seeds": [0]}}, "teachers": {"A to B": {}}, "reference": "x"})
    told = settings_told(report)
    assert [one["title"] for one in told] == ["A to B", "Report"]
    assert '"seeds"' in told[0]["json"] and "teachers" not in told[1]["json"]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([remos(5)], "Plain fine-tuning, so whether there is anything to reduce, of: A to B: word."),
        ([record("finetune", 95, None)], "A benign floor of: A to B: word, finetune."),
        ([record("finetune", 0, of=0)], "A DIR, for want of samples that could show the defect, of:"),
        ([PLAIN], "Re-activation of: A to B: word."),
        ([PLAIN], "More than one seed of: A to B: word, finetune."),
        ([remos(n, ratio=n / 10) for n in range(1, 9)], " and 2 more."),
    ],
)
def test_what_was_not_measured_is_named(records, said):
    report = DefectReport(records)
    assert any(said in one for one in unmeasured_told(report, judged(report).verdicts, []))


def test_what_was_measured_is_not_named():
    report = DefectReport(of_seeds(PLAIN, remos(5)))
    told = " ".join(unmeasured_told(report, judged(report).verdicts, [{}]))
    assert "seed" not in told and "floor" not in told and "look" not in told and "Triggers, inputs" in told


def test_samples_that_were_not_drawn_and_a_teacher_that_was_not_measured_are_named():
    def told(used, **more):
        parts = {name: {"from": "a.tsv", "samples": count, "of": 1500} for name, count in used.items()}
        report = DefectReport([PLAIN], {"audits": {"A to B": {"samples": parts, **more}}})
        return " ".join(unmeasured_told(report, judged(report).verdicts, []))

    assert "Samples that were not used (A to B): 1,300 of 1,500 of a.tsv." in told({"test": 40, "student": 160})
    assert "The teacher itself (A to B): no teacher was given." in told({}, teacher_unmeasured="no teacher was given")
    assert "not used" not in told({"test": 500, "student": 1000}) and "teacher itself" not in told({})
