import json
import shutil
from dataclasses import replace

from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.auditing.collected import report_of
from remos_hf.auditing.run import run_audit
from remos_hf.evaluation.transfer import measure
from tests.auditing.audits import STUDENTS, WORD, Log, fine_tune, small_audit, spoil, untimed
from tests.defects import toy


def test_each_record_is_what_its_student_shows_beside_its_benign_twin(whole):
    folder, report, _ = whole
    audit = small_audit(Log(folder / "unused"))
    exposed = {"word": WORD.exposed_set(audit.test, **audit.task.exposing)}

    def by_hand(kind, strategy, seed):
        teacher = toy.model().from_pretrained(folder / "teachers" / f"{kind}-{seed}")
        student = with_new_head(teacher, 2, seed=seed)
        fine_tune(student, strategy, audit.student, 1.0, seed)
        return measure(student, audit.test, exposed, audit.task)

    assert [(one["task"], one["defect"], one["student"], one["seed"]) for one in report.records] == [
        ("toy", "word", name, seed) for name in STUDENTS for seed in (0, 1)
    ]
    for record in report.records:
        strategy = STUDENTS[record["student"]].strategy
        own, twin = by_hand("word", strategy, record["seed"]), by_hand("clean", strategy, record["seed"])
        assert (record["acc"], record["dir"]) == (own["acc"], own["dir"]["word"])
        assert (record["floor_acc"], record["floor"]) == (twin["acc"], twin["dir"]["word"])
    # Else any pairing would pass.
    assert len({json.dumps(record["floor"]) for record in report.records}) > 2


def test_retrain_is_its_own_floor_and_has_no_excess(whole):
    _, report, _ = whole
    found = [record for record in report.records if record["student"] == "retrain"]
    assert len(found) == 2
    for record in found:
        assert record["floor"] == record["dir"] and record["excess"] is None


def test_how_a_student_was_made_is_said(whole):
    _, report, _ = whole
    made = {record["student"]: record["made"] for record in report.records}
    assert (made["random 0.9"]["rule"], made["random 0.9"]["slice_ratio"]) == ("random", 0.9)
    assert made["random 0.9"]["squares_reset"] == 0.5
    assert "rule" not in made["finetune"] and made["finetune"]["strategy"]["name"] == "Finetune"
    assert set(made["finetune"]["seconds"]) == {"train", "measure"}


def test_the_report_holds_settings_versions_and_teachers(whole):
    folder, report, _ = whole
    audit = small_audit(Log(folder / "unused"), seeds=(0, 1))
    exposed = {"word": dict(WORD.exposed_set(audit.test, **audit.task.exposing).facts)}
    assert exposed["word"]["num_exposed"] == 10
    assert report.settings["audits"]["toy"] == json.loads(json.dumps({**audit.to_dict(), "exposed": exposed}))
    assert set(report.settings["teachers"]["toy"]) == {"clean-0", "clean-1", "word-0", "word-1"}
    teacher = toy.model().from_pretrained(folder / "teachers" / "word-0")
    shown = measure(teacher, audit.test, {"word": WORD.exposed_set(audit.test, **audit.task.exposing)}, audit.task)
    assert shown.items() <= report.settings["teachers"]["toy"]["word-0"].items()
    assert report.settings["missing"] == {"toy": 0} and report.versions["torch"]


def test_what_is_told_besides_stands_in_the_report_and_is_no_other_setting(whole):
    folder, report, _ = whole
    audit = small_audit(Log(folder / "unused"), seeds=(0, 1), told={"command": "remos audit t"})
    again = run_audit(audit, folder, progress=False)
    assert again.settings["audits"]["toy"] == {**report.settings["audits"]["toy"], "command": "remos audit t"}
    assert run_audit(replace(audit, told={}), folder, progress=False) == report


def test_exposed_sets_that_differ_by_seed_are_told_for_each(whole, tmp_path):
    folder = tmp_path / "audit"
    shutil.copytree(whole[0], folder)
    path = folder / "teachers" / "word-1.json"
    told = json.loads(path.read_text())
    told["exposed"]["word"]["num_exposed"] = 9
    path.write_text(json.dumps(told))
    found = report_of(small_audit(Log(folder / "unused"), seeds=(0, 1)), folder).settings["audits"]["toy"]["exposed"]
    assert found["word"]["num_exposed"] == 10
    assert {seed: one["num_exposed"] for seed, one in found["word"]["by_seed"].items()} == {"0": 10, "1": 9}


def test_versions_are_those_that_the_students_were_measured_with(log, folder):
    run_audit(small_audit(log), folder, progress=False)
    spoil(folder, "clean-0-finetune.json", versions={"torch": "1.0"})
    spoil(folder, "clean-0-retrain.json", versions={"torch": "2.0", "numpy": "1.26"})
    versions = report_of(small_audit(log), folder).versions
    assert versions["torch"].startswith("1.0, 2.0, ") and versions["numpy"] == "1.26"


def test_reporting_makes_nothing(whole, tmp_path):
    folder, report, log = whole
    before = len(log.students)
    assert untimed(report_of(small_audit(log, seeds=(0, 1)), folder)) == untimed(report)
    empty = report_of(small_audit(log), tmp_path / "none")
    assert empty.records == [] and empty.settings["missing"] == {"toy": 5}
    assert len(log.students) == before and not (tmp_path / "none").exists()


def test_records_wait_for_the_benign_twin(whole, log, folder):
    run_audit(small_audit(log), folder, progress=False)
    (folder / "cells" / "clean-0-finetune.json").unlink()
    report = report_of(small_audit(log), folder)
    assert {record["student"] for record in report.records} == {"retrain", "random 0.9"}
    assert report.settings["missing"] == {"toy": 1}
