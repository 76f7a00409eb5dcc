import json
from contextlib import nullcontext

import pytest
from datasets import Dataset
from PIL import Image

import remos_hf.cli.audit as audit
from remos_hf import image_classifier
from remos_hf.auditing.student_files import save_timm_student
from remos_hf.cli.answer import NOTHING_SAID
from remos_hf.cli.options import AuditOptions
from remos_hf.judging.report import DefectReport
from tests.cli.conftest import write_data

pytest.importorskip("matplotlib")

OPTIONS = ["--defects", "word", "--quick", "--max-length", 16, "--epochs", 2, "--teacher-epochs", 2]


@pytest.fixture(scope="module", autouse=True)
def rendered():
    """Reports that were to be rendered, which takes long and is tested elsewhere."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "report_files", lambda report, path: asked.append(path) or {"html": path})
        yield asked


@pytest.fixture(scope="module")
def done(remos, teacher, tmp_path_factory):
    """An audit that is over: its folder, its command, and what it told."""
    place = tmp_path_factory.mktemp("audit")
    data = write_data(place / "toy.jsonl", 120)
    command = ["audit", teacher, "--data", data, "--output", place / "a", *OPTIONS, "--learning-rate", 3e-3]
    told = remos(*command, "--json")
    assert told.exit_code in (0, NOTHING_SAID), told.stderr
    return place / "a", command, told


def test_a_teacher_and_one_file_give_a_report(done, rendered):
    folder, _, told = done
    said, report = json.loads(told.stdout), DefectReport.load(folder / "report.json")
    assert {record["student"] for record in report.records} == {
        "finetune",
        "finetune lr x3",
        "retrain",
        "random 0.9",
        "remos 0.9",
        "repair_rows",
    }
    assert said["missing"] == 0 and len(said["results"]) == 6
    assert {name: part["samples"] for name, part in said["split"].items()} == {
        "test": 24,
        "dev": 12,
        "attacker": 42,
        "student": 42,
    }
    made = next(record["made"] for record in report.records if record["student"] == "remos 0.9")
    assert made["share_kept"] == pytest.approx(0.9, abs=0.01) and {"profile", "reset"} <= made["seconds"].keys()
    assert len(report.anatomies) == 11 and all(one["anatomy"]["layers"] for one in report.anatomies)
    assert report.settings["audits"]["toy"]["teacher"] == "teacher"
    assert said["report"]["html"] and rendered == [folder / "report.json"]
    assert "student 11 of 11, word, repair_rows, seed 0: accuracy" in told.stderr
    assert (said["can_be_said"], told.exit_code) in ((True, 0), (False, NOTHING_SAID)) and said["answer"]
    asked = report.settings["audits"]["toy"]
    assert asked["command"].startswith("remos audit teacher --data toy.jsonl --output a --defects word --quick")
    assert asked["max_samples"] == 1000 and asked["samples"]["test"] == {"from": "toy.jsonl", "samples": 24, "of": 120}
    assert asked["exposed"]["word"]["num_exposed"] > 0 and "command" not in (folder / "settings.json").read_text()
    assert "To make: 2 teachers and 11 students" in told.stderr and "first 6 steps" in told.stderr


def test_the_same_command_goes_on_and_makes_nothing_again(remos, done, monkeypatch):
    folder, command, _ = done
    before = (folder / "report.json").read_bytes()
    monkeypatch.setattr("transformers.Trainer.train", pytest.fail)
    told = remos(*command)
    assert told.exit_code in (0, NOTHING_SAID), told.stderr
    assert "To make: nothing, all is done." in told.stderr and "Nothing will be" not in told.stderr
    assert (folder / "report.json").read_bytes() == before
    assert "toy: word" in told.stdout and "Not all" not in told.stdout
    assert "Saved" in told.stdout.splitlines()[-1]


def test_another_audit_in_the_same_folder_is_refused(remos, done):
    _, command, _ = done
    for options in ([], ["--plan"]):
        told = remos(*command, "--epochs", 1, *options)
        assert told.exit_code == 1 and "other settings (epochs differ)" in told.stderr


def test_the_plan_makes_nothing_and_is_measured_by_what_is_done(remos, done, tmp_path):
    _, command, _ = done
    told = remos(*command, "--seeds", 1, "--plan", "--json")
    plan = json.loads(told.stdout)
    assert (plan["teachers_to_make"], plan["students_to_make"]) == (2, 11) and plan["minutes"] >= 0
    assert "first 6 steps" in plan["measured_by"]
    at = command.index("--output") + 1
    told = remos(*command[:at], tmp_path / "new", *command[at + 1 :], "--plan")
    assert told.exit_code == 0 and "To make: 2 teachers and 11 students" in told.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_will_not_be_said_is_told_before_anything_is_made(remos, teacher, tmp_path):
    few, enough = (write_data(tmp_path / f"{samples}.jsonl", samples) for samples in (100, 560))

    def told(data, *options):
        return remos("audit", teacher, "--data", data, "-o", tmp_path / "a", "--max-length", 16, "--plan", *options)

    told_of_few = told(few, "--seeds", 0, "--epochs", 1).stdout
    assert "Nothing will be said of word: " in told_of_few and "of 20 test samples can show it, and 50" in told_of_few
    assert "Nothing will be compared: that takes 3 seeds (--seeds)." in told_of_few
    assert "Nothing will be" not in told(enough, "--defects", "word", "--epochs", 1).stdout


def test_the_estimate_counts_reactivation(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_seconds_of_a_step", lambda *asked: (1.0, 0.5))
    data = str(write_data(tmp_path / "toy.jsonl", 400))
    options = {"data": data, "output": tmp_path / "a", "teacher": str(teacher), "max_length": 16, "defects": ["word"]}

    def minutes(**more):
        made, split, teachers, students = audit._audit(AuditOptions(**options, **more, slice_ratios=(0.9,), seeds=(0,)))
        return audit._planned(made, split, tmp_path / "a", students, teachers).minutes, made

    (with_it, made), (without, _) = minutes(), minutes(quick=True)
    # Each of 11 students once: twice 12 steps over 64 and 18 over 84 samples, and 80 shown twice.
    again = (0.5 + 12 + 2 * 80 / 16 / 3) + (0.5 + 18 + 2 * 80 / 16 / 3)
    assert made.reactivation.counts == (0, 20) and 60 * (with_it - without) == pytest.approx(11 * again)


def test_an_interruption_says_how_to_go_on(remos, done, monkeypatch, tmp_path):
    _, command, _ = done

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(audit, "run_audit", stop)
    told = remos(*command)
    assert told.exit_code == 130 and "the same command goes on" in told.stderr


def test_what_cannot_be_audited_is_told_in_one_line(remos, teacher, data, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "notes.txt").write_text("")
    (tmp_path / "few.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    for options, told in (
        (["--output", tmp_path / "held"], "is not empty and holds no audit (it holds notes.txt)"),
        (["--defects", "patch"], "The defects of texts are word, sentence, ripples, ep, lwp, but got 'patch'"),
        (["--target-label", "2"], "--target-label is a class of the task (0, 1) or its number, 0 to 1, but got 2"),
        (["--data", tmp_path / "few.tsv"], "2 samples are too few for the parts"),
    ):
        result = remos("audit", teacher, "--data", data, "--output", tmp_path / "a", *options)
        assert result.exit_code == 1 and told in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("given", "used"),
    [([], 2000), (["--max-samples", 300], 300), (["--max-samples", "all"], None), (["--quick"], 1000)],
)
def test_how_many_of_the_samples_are_used_is_told(remos, teacher, tmp_path, given, used, monkeypatch):
    monkeypatch.setattr(audit, "_seconds_of_a_step", lambda *args: (1.0, 0.0))
    write_data(tmp_path / "many.jsonl", 4100)
    asked = ["audit", teacher, "--data", tmp_path / "many.jsonl", "--output", tmp_path / "a", "--plan"]
    told = remos(*asked, *given).stdout
    assert ("Not all samples are used" in told) == (used is not None)
    assert used is None or f"{used:,} of 4,100 of {tmp_path / 'many.jsonl'} (--max-samples; at most" in told
    split = json.loads(remos(*asked, *given, "--json").stdout)["split"]
    assert sum(part["samples"] for part in split.values()) == (used or 4100)


def parts(pools, max_samples=None, **sources):
    every = dict.fromkeys(("test", "dev", "attacker", "student"), "d") | sources
    return audit._parts(pools, every, max_samples)


def numbered(count, start=0):
    return Dataset.from_dict({"text": [str(start + number) for number in range(count)], "label": [0] * count})


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sst-2/train.tsv", "sst-2/train"),
        ("qnli/train.jsonl.gz", "qnli/train"),
        ("v1.5/reviews.csv", "reviews"),
        ("flowers/train/", "flowers/train"),
        ("flowers.v2/", "flowers.v2"),
    ],
)
def test_a_task_is_named_after_its_data(tmp_path, file, name):
    place = tmp_path / file
    if file.endswith("/"):
        place.mkdir(parents=True)
    else:
        place.parent.mkdir(parents=True)
        place.touch()
    assert audit._name(str(place)) == name and audit._name("stanfordnlp/imdb") == "stanfordnlp/imdb"


def test_parts_never_overlap_whatever_they_come_from():
    pools = {"d": numbered(100), "a": numbered(50, 100), "t": numbered(30, 200)}
    for sources in (
        {},
        {"attacker": "a"},
        {"test": "t"},
        {"attacker": "a", "test": "t"},
        {"attacker": "a", "test": "a"},
    ):
        found = [set(part["text"]) for part in parts(pools, **sources).values()]
        assert len(set().union(*found)) == sum(map(len, found))
    own = parts(pools, attacker="a", test="t")
    assert {name: len(part) for name, part in own.items()} == {"test": 30, "dev": 10, "attacker": 50, "student": 90}
    assert {name: len(part) for name, part in parts(pools).items()} == {
        "test": 20,
        "dev": 10,
        "attacker": 35,
        "student": 35,
    }
    assert sum(len(part) for part in parts(pools, max_samples=40).values()) == 40
    large = parts({"d": numbered(9000)})
    assert (len(large["test"]), len(large["dev"])) == (1000, 500)


def test_a_class_keeps_its_number_in_every_source_and_one_that_was_never_learned_is_refused(tmp_path):
    for split, classes in (("train", "cat dog horse"), ("test", "cat horse"), ("other", "cat zebra")):
        for name in classes.split():
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    options = {"teacher": "t", "data": str(tmp_path / "train"), "output": tmp_path / "a"}
    test = audit._pools(AuditOptions(**options, test_data=str(tmp_path / "test")))[str(tmp_path / "test")]
    assert test["label"][:] == [0, 2] and test.features["label"].names == ["cat", "dog", "horse"]
    with pytest.raises(ValueError, match="other has the class 'zebra', which .*train has not"):
        audit._pools(AuditOptions(**options, test_data=str(tmp_path / "other")))
    attacker = audit._pools(AuditOptions(**options, attacker_data=str(tmp_path / "other")))[str(tmp_path / "other")]
    assert attacker["label"][:] == [0, 3] and attacker.features["label"].names == ["cat", "dog", "horse", "zebra"]


def test_an_attackers_numbered_task_may_have_more_labels_than_the_students(tmp_path):
    (tmp_path / "four.csv").write_text("text,label\n" + "".join(f"a{n},{n % 4}\n" for n in range(8)))
    (tmp_path / "two.csv").write_text("text,label\n" + "".join(f"b{n},{n % 2}\n" for n in range(8)))
    two, four = (str(tmp_path / f"{name}.csv") for name in ("two", "four"))
    asked = {"teacher": "t", "data": two, "output": tmp_path / "a", "attacker_data": four}
    pools = audit._pools(AuditOptions(**asked))
    assert set(pools[four]["label"]) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="four.csv has the class '2', which .*two.csv has not"):
        audit._pools(AuditOptions(**asked, test_data=four))


@pytest.mark.parametrize(("samples", "counts"), [(240, (0, 20)), (60, ())])
def test_reactivation_takes_no_more_poisoned_samples_than_there_are(teacher, tmp_path, samples, counts):
    data = write_data(tmp_path / "few.jsonl", samples)
    asked = AuditOptions(**{"teacher": str(teacher), "data": str(data), "output": tmp_path / "a", "max_length": 16})
    with nullcontext() if counts == audit._COUNTS else pytest.warns(match="too few samples for all of re-activation"):
        planned = audit._audit(asked)[0]
    retuned = {plan.reactivate for plan in planned.students.values()}
    assert retuned == {bool(counts)} and (planned.reactivation.counts == counts or not counts)
    assert ("reactivation_left_out" in planned.told) == (counts != audit._COUNTS)


@pytest.mark.timm
def test_an_audit_of_images_makes_the_best_start_of_our_table_too(tmp_path):
    pytest.importorskip("timm")
    save_timm_student(image_classifier("test_resnet", 5, seed=1, pretrained=False), tmp_path / "net")
    for shade, name in enumerate(("daisy", "rose")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (40, 32), (80 * shade, 10 * number, 90)).save(tmp_path / "images" / name / f"{number}.png")
    asked = {"teacher": f"timm/local-dir:{tmp_path / 'net'}", "data": str(tmp_path / "images")}
    planned = audit._audit(AuditOptions(**asked, output=tmp_path / "a", quick=True))[0]
    assert {"random 0.9", "remos 0.9", "subspace + hardened"} < set(planned.students)
    named = audit._audit(AuditOptions(**asked, output=tmp_path / "a", quick=True, students=["random"]))[0]
    assert not any("subspace" in name or "remos" in name for name in named.students)
