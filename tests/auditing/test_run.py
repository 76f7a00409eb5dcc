import json
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedModel

from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.auditing import run as run_module
from remos_hf.auditing.collected import report_of
from remos_hf.auditing.progress import Progress
from remos_hf.auditing.run import run_audit
from remos_hf.auditing.students import StudentPlan
from remos_hf.defects.base import CLEAN_INDEX, Defect, ExposedSet
from remos_hf.errors import NonFiniteError
from remos_hf.evaluation import tasks as tasks_module
from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.evaluation.reactivation import Reactivation
from remos_hf.evaluation.transfer import measure
from remos_hf.strategies import Finetune, Random, Retrain
from tests.auditing.audits import (
    BOTH,
    STUDENTS,
    WORD,
    Log,
    Slow,
    cells,
    fine_tune,
    mark,
    nudge,
    retuning,
    share,
    small_audit,
    spoil,
    train_teacher,
    untimed,
)
from tests.defects import toy

# --- what is made and measured ---


class Inside(Log):
    """Tells what a student is made of, and what the time went to."""

    def __call__(self, student, strategy, samples, lr_factor, seed):
        told = super().__call__(student, strategy, samples, lr_factor, seed)
        anatomy = {"of": f"{type(strategy).__name__} of {student.mark}, seed {seed}"}
        return {**told, "anatomy": anatomy, "seconds": {"profile": 0.001, "reset": 0.002}}


def test_what_a_student_is_made_of_is_reported_once_of_the_first_seed(folder, tmp_path):
    audit = small_audit(Inside(tmp_path / "log"), seeds=(0, 1), students={"finetune": STUDENTS["finetune"]})
    report = run_audit(audit, folder, keep_students=True, progress=False)
    about = [(one["task"], one["teacher"], one["student"], one["seed"]) for one in report.anatomies]
    assert about == [("toy", "clean", "finetune", 0), ("toy", "word", "finetune", 0)]
    assert all(one["anatomy"]["of"].endswith("seed 0") for one in report.anatomies)
    assert len({one["anatomy"]["of"] for one in report.anatomies}) == 2
    assert not any("anatomy" in json.dumps(record) for record in report.records)
    cell = json.loads((folder / "cells" / "word-1-finetune.json").read_text())
    assert cell["anatomy"]["of"].endswith("seed 1") and "anatomy" not in cell["made"]
    seconds = cell["made"]["seconds"]
    assert set(seconds) == {"profile", "reset", "train", "measure"} and seconds["train"] >= 0
    # Measured on another defect later, they are still what they were.
    later = run_audit(replace(audit, defects=BOTH), folder, progress=False)
    assert later.anatomies[:2] == report.anatomies and len(later.anatomies) == 3


def test_students_start_from_the_poisoned_teacher_and_twins_from_the_clean_one(whole):
    folder, _, log = whole
    marks = {name.split(" of ")[1] for name in log.students}
    weights = {}
    for kind in ("clean", "word"):
        for seed in (0, 1):
            teacher = toy.model().from_pretrained(folder / "teachers" / f"{kind}-{seed}")
            weights[f"{mark(teacher)}, seed {seed}"] = kind
    assert marks == set(weights) and len(weights) == 4


def test_a_teachers_seconds_are_none_of_a_students(log, folder, monkeypatch):
    monkeypatch.setattr(tasks_module, "fine_tune", lambda *args: time.sleep(1.5) or train_teacher(*args))
    report = run_audit(small_audit(log, defects={"word": WORD}), folder, progress=False)
    assert report.settings["teachers"]["toy"]["clean-0"]["seconds"] >= 1.5
    assert max(sum(record["made"]["seconds"].values()) for record in report.records) < 1.5


def test_a_line_is_told_as_each_student_ends_and_none_of_those_that_were_done(log, folder):
    told = []
    run_audit(small_audit(log), folder, progress=False, tell=told.append)
    made = [("clean", "finetune"), ("clean", "retrain"), ("clean", "random 0.9"), ("word", "finetune")]
    assert [line.partition(": accuracy ")[0] for line in told] == [
        f"student {number} of 5, {kind}, {student}, seed 0"
        for number, (kind, student) in enumerate([*made, ("word", "random 0.9")], 1)
    ]
    assert all(line.endswith(" %; less than a minute left") for line in told)
    (folder / "cells" / "clean-0-retrain.json").unlink()
    again = []
    run_audit(small_audit(log), folder, progress=False, tell=again.append)
    assert again == [told[1]]


def test_each_seed_has_a_teacher_of_its_own(whole):
    folder, _, _ = whole
    for seed in (0, 1):
        expected = nudge(toy.model(seed), seed)
        made = toy.model().from_pretrained(folder / "teachers" / f"clean-{seed}")
        assert not toy.changed(toy.state(expected), toy.state(made))


def test_a_students_learning_rate_is_its_own(log, folder):
    students = {"finetune": StudentPlan(Finetune()), "finetune lr x3": StudentPlan(Finetune(), 3.0)}
    run_audit(small_audit(log, students=students), folder, progress=False)
    assert [name.split(" of ")[0] for name in log.students] == ["Finetune x1", "Finetune x3"] * 2


def test_dev_accuracy_is_that_on_the_dev_split(whole):
    folder, report, _ = whole
    audit = small_audit(Log(folder / "unused"))
    record = next(record for record in report.records if record["student"] == "random 0.9")
    teacher = toy.model().from_pretrained(folder / "teachers" / "word-0")
    student = with_new_head(teacher, 2, seed=0)
    fine_tune(student, Random(0.9), audit.student, 1.0, 0)
    assert record["dev_acc"] == measure(student, audit.dev, {}, audit.task)["acc"]
    assert record["dev_acc"]["num_samples"] == 12 and record["acc"]["num_samples"] == 20


# --- going on ---


def test_a_report_says_how_many_samples_of_the_attacker_hold_the_trigger(log, tmp_path):
    teachers = run_audit(small_audit(log), tmp_path, progress=False).settings["teachers"]["toy"]
    assert teachers["word-0"]["poisoning"] == {"num_poisoned": 8} and "poisoning" not in teachers["clean-0"]


def test_a_second_run_redoes_nothing(log, folder):
    teachers = []
    first = run_audit(small_audit(log, teachers=teachers), folder, progress=False)
    made, before = log.students, cells(folder)
    teachers.clear()
    again = run_audit(small_audit(log, teachers=teachers), folder, progress=False)
    assert log.students == made and not teachers and cells(folder) == before
    assert again == first


@pytest.mark.parametrize("nth", [1, 7])
def test_a_run_killed_between_students_goes_on_to_the_same_report(whole, folder, tmp_path, nth):
    log = Log(tmp_path / "log", stop_at=nth)
    with pytest.raises(KeyboardInterrupt):
        run_audit(small_audit(log, seeds=(0, 1)), folder, progress=False)
    assert len(cells(folder)) == nth - 1
    half = report_of(small_audit(log, seeds=(0, 1)), folder)
    assert half.settings["missing"] == {"toy": 10 - (nth - 1)}
    report = run_audit(small_audit(log, seeds=(0, 1)), folder, progress=False)
    assert untimed(report) == untimed(whole[1])
    assert sorted(log.students) == sorted(whole[2].students)


def test_a_teacher_that_was_being_written_is_made_again(log, folder, monkeypatch):
    save, teachers = PreTrainedModel.save_pretrained, []

    def dies(model, place, **options):
        save(model, place, **options)
        (Path(place) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", dies)
    with pytest.raises(KeyboardInterrupt):
        run_audit(small_audit(log), folder, progress=False)
    assert not (folder / "teachers" / "clean-0").exists() and not log.students
    # Killed for good, it would have left its folder there.
    (folder / "teachers" / ".clean-0.abcd").mkdir()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    report = run_audit(small_audit(log, teachers=teachers), folder, progress=False)
    assert teachers and len(report.records) == 3


def test_a_cell_that_was_being_written_is_made_again(log, folder):
    (folder / "cells").mkdir(parents=True)
    (folder / "cells" / ".clean-0-finetune.json.123.tmp").write_text('{"acc": {"val')
    report = run_audit(small_audit(log), folder, progress=False)
    assert len(report.records) == 3 and len(log.students) == 5


def test_what_another_process_finished_meanwhile_is_taken_over(whole, log, folder, monkeypatch):
    class Late(FileLock):
        """Is free only once the other process is done with what it guards."""

        def acquire(self, *args, **options):
            name = Path(self.lock_file).name.removesuffix(".lock")
            room = "cells" if name.endswith(".json") else "teachers"
            if not name.endswith("lr x3.json"):
                copy = shutil.copy if room == "cells" else shutil.copytree
                copy(whole[0] / room / name, folder / room / name)
            return super().acquire(*args, **options)

    monkeypatch.setattr(run_module, "FileLock", Late)
    monkeypatch.setattr(tasks_module, "fine_tune", pytest.fail)
    run_audit(small_audit(log), folder, progress=False)
    assert not log.students
    # A student that nobody made, of a teacher that another process is making.
    more = {**STUDENTS, "finetune lr x3": StudentPlan(Finetune(), 3.0, defects=())}
    run_audit(small_audit(log, students=more), folder, progress=False)
    assert [name.split()[:2] for name in log.students] == [["Finetune", "x3"]]


def test_a_student_whose_training_diverged_is_named_and_leaves_no_cell(log, folder):
    def diverges(student, *args):
        facts = log(student, *args)
        if isinstance(args[0], Random):
            student.classifier.bias.data.fill_(float("nan"))
        return facts

    with pytest.raises(NonFiniteError, match="Student 'random 0.9' of 'clean', seed 0: .* diverged"):
        run_audit(small_audit(log, fine_tune=diverges), folder, progress=False)
    assert sorted(cells(folder)) == ["clean-0-finetune.json", "clean-0-retrain.json"]


# --- adding ---


def test_more_seeds_students_and_defects_add_only_what_is_missing(log, folder):
    few = {"finetune": STUDENTS["finetune"], "retrain": STUDENTS["retrain"]}
    run_audit(small_audit(log, students=few), folder, progress=False)
    before, made = cells(folder), log.students
    assert len(made) == 3
    run_audit(small_audit(log, seeds=(0, 1)), folder, progress=False)
    assert {name: content for name, content in cells(folder).items() if name in before} == before
    assert log.students[:3] == made and len(log.students) == 3 + 5 + 2
    run_audit(small_audit(log, seeds=(0,)), folder, progress=False)
    assert len(log.students) == 10


@pytest.mark.parametrize("keep", [True, False])
def test_a_defect_added_later_needs_no_kept_student_made_again(log, folder, keep):
    run_audit(small_audit(log), folder, progress=False, keep_students=keep)
    before = {name: json.loads(text) for name, text in cells(folder).items()}
    report = run_audit(small_audit(log, defects=BOTH), folder, progress=False, keep_students=keep)
    added = Counter(log.students[5:])
    assert sum(added.values()) == (2 if keep else 5)  # the new teacher's students; and the clean ones made again
    after = {name: json.loads(text) for name, text in cells(folder).items()}
    assert [name for name in before if name.startswith("word") and after[name] != before[name]] == []
    for name in ("clean-0-finetune.json", "clean-0-retrain.json"):
        assert after[name]["dir"]["word"] == before[name]["dir"]["word"] and "other" in after[name]["dir"]
        assert after[name]["made"] == before[name]["made"]
    assert len(report.records) == 6 and report.settings["missing"] == {"toy": 0}
    assert (folder / "students" / "clean-0-finetune").is_dir() == keep


def test_only_the_added_defect_is_measured(log, folder, monkeypatch):
    asked = []

    def noted(model, dataset, exposed, task, **options):
        asked.append(sorted(exposed))
        return measure(model, dataset, exposed, task, **options)

    run_audit(small_audit(log), folder, progress=False, keep_students=True)
    before = report_of(small_audit(log, defects=BOTH), folder)
    assert before.settings["missing"] == {"toy": 5}  # three clean students lack it, two were never made
    monkeypatch.setattr(run_module, "measure", noted)
    run_audit(small_audit(log, defects=BOTH), folder, progress=False)
    assert asked and all(names == ["other"] for names in asked)


def test_a_kept_student_is_the_one_that_was_measured(log, folder):
    first = run_audit(small_audit(log), folder, progress=False, keep_students=True)
    for path in (folder / "cells").iterdir():
        path.unlink()
    again = run_audit(small_audit(log), folder, progress=False, keep_students=True)
    assert len(log.students) == 5 and untimed(again) == untimed(first)


def test_numbers_of_a_student_that_came_out_otherwise_are_not_mixed(log, folder):
    run_audit(small_audit(log), folder, progress=False)
    name = "clean-0-finetune.json"
    true = json.loads(cells(folder)[name])
    other = {"acc": Rate.of(1, 20).to_dict(), "dir": {"word": Rate.of(3, 4).to_dict()}}
    spoil(folder, name, **other, made={"strategy": "old"})
    run_audit(small_audit(log, defects=BOTH), folder, progress=False)
    found = json.loads(cells(folder)[name])
    assert found["acc"] == true["acc"] and found["dir"]["word"] == true["dir"]["word"]
    assert set(found["dir"]) == set(BOTH) and found["made"]["strategy"]["name"] == "Finetune"


def test_a_student_may_be_measured_on_more_defects_later(log, folder):
    cut = {**STUDENTS, "random 0.9": StudentPlan(Random(0.9), defects=("word",))}
    report = run_audit(small_audit(log, defects=BOTH, students=cut), folder, progress=False)
    assert ("other", "random 0.9") not in {(record["defect"], record["student"]) for record in report.records}
    assert "other-0-random 0.9.json" not in cells(folder)
    before = len(log.students)
    report = run_audit(small_audit(log, defects=BOTH), folder, progress=False)
    assert len(report.records) == 6 and len(log.students) == before + 2  # the new one, and its twin's added figures


# --- re-activation ---


def test_reactivation_stands_beside_that_of_the_benign_twin(log, folder, retuned):
    report = run_audit(retuning(log), folder, progress=False)
    curves = {record["student"]: (record["reactivation"], record["floor_reactivation"]) for record in report.records}
    expected = {"0": Rate.of(0, 50).to_dict(), "5": Rate.of(5, 50).to_dict()}
    assert curves == {"finetune": (expected, expected), "retrain": (None, None), "random 0.9": (None, None)}
    assert retuned == [("cf", (0, 5), 0)] * 2


def test_only_the_seeds_asked_for_are_retuned_and_more_may_be_asked_for(log, folder, retuned):
    students = {"finetune": StudentPlan(Finetune(), reactivate=True)}
    for seeds, number in (((1,), 2), ((0, 1), 4), ((0, 1), 4)):
        plan = Reactivation(counts=(0, 5), seeds=seeds)
        run_audit(small_audit(log, students=students, seeds=(0, 1), reactivation=plan), folder, progress=False)
        assert len(retuned) == number


def test_reactivation_may_be_added_and_grow(log, folder, retuned):
    run_audit(small_audit(log), folder, progress=False, keep_students=True)
    run_audit(retuning(log), folder, progress=False)
    assert len(retuned) == 2
    report = run_audit(retuning(log, (0, 5, 20), num_exposed=40), folder, progress=False)
    curve = report.records[0]["reactivation"]
    assert {count: rate["num_samples"] for count, rate in curve.items()} == {"0": 40, "5": 40, "20": 40}
    assert len(retuned) == 4 and len(log.students) == 5
    run_audit(retuning(log, (0, 5, 20), ("finetune", "random 0.9"), num_exposed=40), folder, progress=False)
    assert len(retuned) == 6 and len(log.students) == 5


def test_curves_that_a_run_does_not_ask_for_stay_and_are_not_reported(log, folder, retuned):
    run_audit(retuning(log), folder, progress=False, keep_students=True)
    without = run_audit(small_audit(log, defects=BOTH), folder, progress=False)
    assert not any(record["reactivation"] for record in without.records)
    unasked = run_audit(retuning(log, names=(), defects=BOTH), folder, progress=False)
    assert not any(record["reactivation"] for record in unasked.records)
    again = run_audit(retuning(log, defects=BOTH), folder, progress=False)
    assert [one[0] for one in retuned] == ["cf", "cf", "mn", "mn"]
    assert all(record["reactivation"] for record in again.records if record["student"] == "finetune")


# --- found defects ---


@dataclass(frozen=True)
class Negated(Defect):
    """A found defect: texts turned around, searched for on the teacher; notes each search."""

    place: str
    nothing: bool = False

    def exposed_set(self, dataset, *, teacher=None, tokenizer=None, max_length=None, cache=None, workers=1):
        assert not teacher.training and tokenizer is not None and Path(cache).name == "exposed" and workers == 1
        with Path(self.place).open("a") as file:
            file.write(f"{mark(teacher)}\n")
        index = [] if self.nothing else [3, 1, 6, 4, 10]
        texts = [f"{dataset['text'][row]} bad awful" for row in index]
        labels = [dataset["label"][row] for row in index]
        return ExposedSet(Dataset.from_dict({"text": texts, "label": labels, CLEAN_INDEX: index}), None)


def test_found_defects_are_measured_on_the_clean_teachers_students_with_retrain_as_floor(log, folder, tmp_path):
    found = Negated(str(tmp_path / "searches"))
    audit = small_audit(log, defects={"found": found}, seeds=(0, 1))
    report = run_audit(audit, folder, progress=False)
    assert len(log.students) == 6 and all(name.startswith("clean") for name in cells(folder))
    numbers = {(record["student"], record["seed"]): record for record in report.records}
    assert len(numbers) == 6
    for (student, seed), record in numbers.items():
        assert record["dir"] == json.loads(cells(folder)[f"clean-{seed}-{student}.json"])["dir"]["found"]
        assert record["floor"] == numbers["retrain", seed]["dir"] and record["flip"] is None
        apart = excess_dir(*(Rate(**one) for one in (record["dir"], record["floor"]))).to_dict()
        assert record["excess"] == (None if student == "retrain" else apart)
    for seed in (0, 1):  # the teacher itself, on what was found on it
        told = json.loads((folder / "teachers" / f"clean-{seed}.json").read_text())
        teacher = toy.model().from_pretrained(folder / "teachers" / f"clean-{seed}")
        exposed = {"found": found.exposed_set(audit.test, teacher=teacher, cache="exposed", **audit.task.exposing)}
        shown = measure(teacher, audit.test, exposed, audit.task)
        assert shown.items() <= told.items() and shown["dir"]["found"]["num_samples"] > 0
        assert told["exposed"] == {"found": {"num_exposed": 5}} and told["seconds"] > 0
    # One search a seed, each on that seed's clean teacher.
    searched = (tmp_path / "searches").read_text().split()
    teachers = [toy.model().from_pretrained(folder / "teachers" / f"clean-{seed}") for seed in (0, 1)]
    assert searched[:2] == list(map(mark, teachers))


def test_without_retrain_a_found_defect_has_no_floor(log, folder, tmp_path):
    students = {"finetune": STUDENTS["finetune"]}
    report = run_audit(
        small_audit(log, defects={"found": Negated(str(tmp_path / "s"))}, students=students), folder, progress=False
    )
    assert [(record["floor"], record["excess"]) for record in report.records] == [(None, None)]


def test_a_search_that_found_nothing_is_reported_without_a_value(log, folder, tmp_path):
    found = Negated(str(tmp_path / "s"), nothing=True)
    report = run_audit(small_audit(log, defects={"word": WORD, "found": found}), folder, progress=False)
    assert {record["dir"]["value"] for record in report.records if record["defect"] == "found"} == {None}
    assert "- (-)" in report.to_markdown()


def test_found_defects_are_not_reactivated(log, folder, tmp_path, retuned):
    run_audit(retuning(log, defects={"word": WORD, "found": Negated(str(tmp_path / "s"))}), folder, progress=False)
    assert [one[0] for one in retuned] == ["cf", "cf"]


def test_a_search_that_another_process_holds_is_waited_for_before_a_student_is_trained(log, folder, tmp_path):
    audit = small_audit(
        log, defects={"found": Negated(str(tmp_path / "s"))}, students={"finetune": STUDENTS["finetune"]}
    )
    (folder / "locks").mkdir(parents=True)
    held = FileLock(folder / "locks" / "exposed-found-0.lock", thread_local=False)
    held.acquire()
    seen = []

    def free():
        seen.extend(log.students)
        held.release()

    timer = threading.Timer(1.0, free)
    timer.start()
    run_audit(audit, folder, progress=False)
    timer.join()
    assert seen == [] and len(log.students) == 1


# --- several processes ---


def test_two_processes_share_the_work_and_what_a_killed_one_held_is_made_by_the_other(whole, tmp_path, folder):
    log = tmp_path / "log"
    there = get_context("fork").Process(target=share, args=(folder, log, 3))
    there.start()
    wait_for(Path(f"{log}.ready"), there)

    def kill():
        wait_for(Path(f"{log}.hangs"), there)
        there.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    here = Slow(log)
    report = run_audit(small_audit(here, seeds=(0, 1)), folder, progress=False)
    killer.join()
    there.join()
    made_by = Counter(line.partition(":")[0] for line in log.read_text().splitlines())
    assert made_by == {"there": 2, "here": 8}
    assert sorted(here.students) == sorted(whole[2].students)
    assert untimed(report) == untimed(whole[1])


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.is_alive(), "the other process failed"
        time.sleep(0.05)
    raise TimeoutError(path)


def test_a_held_student_is_left_to_its_process(log, folder):
    (folder / "locks").mkdir(parents=True)
    held = FileLock(folder / "locks" / "clean-0-finetune.json.lock", thread_local=False)
    held.acquire()

    def free():
        for _ in range(400):
            if len(log.students) == 4:  # the others are made meanwhile
                break
            time.sleep(0.05)
        held.release()

    other = threading.Thread(target=free)
    other.start()
    run_audit(small_audit(log), folder, progress=False)
    other.join()
    assert len(log.students) == 5 and log.students[-1].startswith("Finetune")
    assert [name.split()[0] for name in log.students].index("Finetune") == 2  # the poisoned teacher's was not held


def test_a_teacher_that_another_process_makes_is_waited_for(log, folder):
    (folder / "locks").mkdir(parents=True)
    held, teachers, seen = FileLock(folder / "locks" / "clean-0.lock", thread_local=False), [], []
    held.acquire()
    timer = threading.Timer(0.5, lambda: (seen.extend(teachers), held.release()))
    timer.start()
    run_audit(small_audit(log, teachers=teachers), folder, progress=False)
    timer.join()
    assert seen == [] and teachers and len(log.students) == 5


def test_a_done_student_needs_no_lock(log, folder):
    first = run_audit(small_audit(log), folder, progress=False)
    with FileLock(folder / "locks" / "clean-0-finetune.json.lock"):
        assert run_audit(small_audit(log), folder, progress=False) == first


# --- showing it ---


def test_a_short_run_shows_no_bar(log, folder, capfd):
    start = time.perf_counter()
    run_audit(small_audit(log), folder, progress=True)
    # On a busy machine the run is no short one.
    assert time.perf_counter() - start > 2 or "%|" not in capfd.readouterr().err


def test_a_long_run_shows_one_bar_over_the_students(log, folder, capfd, monkeypatch):
    bar = run_module.tqdm
    monkeypatch.setattr(run_module, "tqdm", lambda **options: bar(**{**options, "delay": 1e-9, "mininterval": 0}))
    run_audit(small_audit(log), folder, progress=True)
    shown = capfd.readouterr().err
    assert "5/5" in shown and "student" in shown and "Map" not in shown
    run_audit(small_audit(log), folder, progress=False)
    assert "5/5" not in capfd.readouterr().err


def test_the_teachers_are_not_all_held_in_memory(log, folder):
    run = run_module._Run(small_audit(log, defects=BOTH, seeds=(0, 1)), folder, 1, False, Progress(12, log))
    for seed in (0, 1):
        for kind in ("clean", "word", "other"):
            run._teacher(kind, seed)
    assert set(run._teachers) == {("clean", 1), ("other", 1)}


def test_a_plan_for_a_retrain_of_some_defects_gives_others_no_floor_of_it(log, folder, tmp_path):
    students = {"finetune": StudentPlan(Finetune()), "retrain": StudentPlan(Retrain(), defects=("word",))}
    defects = {"word": WORD, "found": Negated(str(tmp_path / "s"))}
    report = run_audit(small_audit(log, defects=defects, students=students), folder, progress=False)
    (found,) = [record for record in report.records if record["defect"] == "found"]
    assert (found["student"], found["floor"]) == ("finetune", None)


def test_the_global_random_state_decides_nothing(whole, log, folder):
    torch.manual_seed(99)
    report = run_audit(small_audit(log, seeds=(0, 1)), folder, progress=False)
    assert untimed(report) == untimed(whole[1])


def test_each_seed_draws_its_own_mask_and_its_own_fresh_weights(folder, log):
    drawn = {}

    def noting(student, strategy, samples, lr_factor, seed):
        drawn.setdefault(type(strategy).__name__, []).append((strategy.seed, seed))
        return log(student, strategy, samples, lr_factor, seed)

    students = {"random": StudentPlan(Random(0.9, seed=None)), "named": StudentPlan(Retrain(seed=5))}
    report = run_audit(small_audit(log, students=students, seeds=(3, 4), fine_tune=noting), folder, progress=False)
    assert drawn == {"Random": [(3, 3), (3, 3), (4, 4), (4, 4)], "Retrain": [(5, 3), (5, 4)]}
    told = {(record["student"], record["seed"]): record["made"]["seed"] for record in report.records}
    assert told == {("random", 3): 3, ("random", 4): 4, ("named", 3): 5, ("named", 4): 5}


def test_all_parts_of_a_composed_student_are_told(log, folder):
    def only_random(student, strategy, *args):
        return log(student, strategy.strategies[0], *args)

    students = {"both": StudentPlan([Random(0.9), Finetune()])}
    report = run_audit(small_audit(log, students=students, fine_tune=only_random), folder, progress=False)
    made = report.records[0]["made"]
    assert (made["rule"], made["slice_ratio"]) == ("random + Finetune", 0.9)
    assert made["strategy"]["name"] == "Random + Finetune"


def test_whatever_a_killed_run_left_is_cleared(log, folder):
    left = [folder / room / name for room, name in (("teachers", ".clean-0.writing"), ("students", ".gone-7.writing"))]
    for place in left:
        (place / "trainer").mkdir(parents=True)
        (place / "model.safetensors").write_bytes(b"half")
    (folder / "cells").mkdir()
    (folder / "cells" / ".word-9-finetune.json.writing").write_text("{")
    run_audit(small_audit(log), folder, progress=False, keep_students=True)
    assert not list(folder.rglob(".*"))


def test_killed_at_any_write_and_again_it_goes_on_to_the_same_report_and_leaves_nothing(whole, log, folder):
    kills, left = 0, 1
    while not until_killed(lambda: run_audit(small_audit(log), folder, progress=False, keep_students=True), left):
        kills, left = kills + 1, left + 5
    report = run_audit(small_audit(log), folder, progress=False, keep_students=True)
    assert kills >= 8 and not list(folder.rglob(".*"))
    expected = [record for record in untimed(whole[1])[0] if record["seed"] == 0]
    assert untimed(report)[0] == expected


def until_killed(act, left):
    """Act in a process that dies, without a word, at this one of its writes; whether it lived."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:

        def dying(write):
            def counted(*args, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return write(*args, **options)

            return counted

        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        act()
        os._exit(0)
    finally:
        os._exit(1)
