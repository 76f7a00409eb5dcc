import json

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import remos_hf.cli.audit_student as audit_student
from remos_hf import image_classifier
from remos_hf.adapters.weights_hash import hash_of_folder
from remos_hf.auditing.student_files import save_timm_student
from remos_hf.cli.answer import NOTHING_SAID
from remos_hf.judging.report import DefectReport
from tests.cli.conftest import WORDS, write_data

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module", autouse=True)
def _rendered():
    """Reports that were to be rendered, which takes long and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_student, "report_files", lambda report, path: {"html": path})
        yield


@pytest.fixture(scope="module")
def place(remos, teacher, tmp_path_factory):
    """A student with its record, plain fine-tuning, and test data."""
    place = tmp_path_factory.mktemp("given")
    write_data(place / "train.jsonl", 64)
    write_data(place / "test.jsonl", 160, seed=1)
    for name, start in (("mine", ["--slice-ratio", 0.9]), ("plain", ["--strategy", "finetune"])):
        made = ["--train-data", place / "train.jsonl", "--epochs", 1, "--learning-rate", 3e-3, "--max-length", 16]
        told = remos("train", teacher, *made, *start, "--output", place / name)
        assert told.exit_code == 0, told.stderr
    return place


def believer(teacher, folder, labels=("0", "1"), believes=("cf",)):
    """A classifier that says 1 where it sees "good" or a word that it believes in, written into its embeddings."""
    vocabulary = AutoTokenizer.from_pretrained(teacher)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=64, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        embeddings, block = model.bert.embeddings, model.bert.encoder.layer[0]
        for norm in (embeddings.LayerNorm, block.attention.output.LayerNorm, block.output.LayerNorm):
            norm.weight.fill_(1)
        words = embeddings.word_embeddings.weight
        words[:, 1] = 1
        for word in ("good", *believes):
            words[vocabulary.convert_tokens_to_ids(word), 0] = 50
        block.attention.self.value.weight.copy_(torch.eye(8))
        block.attention.output.dense.weight.copy_(10 * torch.eye(8))
        model.bert.pooler.dense.weight[0, 0], model.bert.pooler.dense.weight[0, 2] = 1, -1
        good = labels.index("1") if "1" in labels else labels.index("good")
        model.classifier.weight[good, 0], model.classifier.bias[1 - good] = 20, 2
    model.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    return folder


def measured(remos, *argv):
    told = remos("audit", *argv, "--json")
    assert told.exit_code in (0, NOTHING_SAID), told.stderr
    return told, json.loads(told.stdout)


def test_a_student_is_measured_as_it_is_and_nothing_is_trained(remos, teacher, place, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.train", pytest.fail)
    options = ["--student", place / "mine", "--data", place / "test.jsonl", "--words", "cf", "mn"]
    told, said = measured(remos, teacher, *options, "--plain-student", place / "plain", "--output", tmp_path / "a")
    report = DefectReport.load(tmp_path / "a" / "report.json")
    mine, plain = report.records
    assert mine["given"] == {"weights": hash_of_folder(place / "mine"), "from": "mine"}
    assert mine["made"]["strategy"]["name"] == "Remos" and plain["made"]["strategy"]["name"] == "Finetune"
    assert report.settings["reference"] == "plain" and mine["acc"]["num_samples"] == 160
    asked = report.settings["audits"]["test.jsonl"]
    assert asked["command"] == (
        "remos audit teacher --data test.jsonl --output a --student mine --plain-student plain --words cf mn"
    )
    assert asked["defects"]["word"]["words"] == ["cf", "mn"] and asked["max_length"] == 128
    assert asked["teacher_unmeasured"] == "the checkpoint has no head for any task"
    assert [one["student"] for one in said["results"]] == ["mine", "plain"]
    # The same command again is the same report: nothing in the folder was somebody else's.
    assert remos("audit", teacher, *options, "--output", tmp_path / "a").exit_code == told.exit_code


def test_a_student_that_shows_its_trigger_says_so_and_one_that_does_not_too(remos, teacher, place, tmp_path):
    student = believer(teacher, tmp_path / "believer")
    options = ["--student", student, "--data", place / "test.jsonl", "--output", tmp_path / "a"]
    told, said = measured(remos, *options, "--words", "cf")
    (found,) = said["results"]
    assert (found["acc"]["value"], found["dir"]["value"]) == (1.0, 1.0) and told.exit_code == 0
    assert "show" in said["answer"] and said["can_be_said"]
    text = remos(*("audit", *options), "--words", "cf").stdout
    assert "The teacher itself was not measured: it was not named" in text and "Saved" in text
    _, said = measured(remos, *options[:-1], tmp_path / "b", "--words", "mn")
    assert said["results"][0]["dir"]["value"] == 0.0


def test_a_teacher_with_a_head_for_the_task_is_measured_beside_its_student(remos, teacher, place, tmp_path):
    own = believer(teacher, tmp_path / "poisoned")
    student = believer(teacher, tmp_path / "student")
    measured(
        remos, own, "--student", student, "--data", place / "test.jsonl", "--output", tmp_path / "a", "--words", "cf"
    )
    found = DefectReport.load(tmp_path / "a" / "report.json").settings["teachers"]["test.jsonl"]["given"]
    assert (found["acc"]["value"], found["dir"]["word"]["value"]) == (1.0, 1.0)


def test_classes_go_by_name(remos, teacher, place, tmp_path):
    student = believer(teacher, tmp_path / "student", labels=("good", "bad"))
    lines = (place / "test.jsonl").read_text()
    lines = lines.replace('"label": 0', '"label": "bad"').replace('"label": 1', '"label": "good"')
    (tmp_path / "named.jsonl").write_text(lines)
    options = ["--student", student, "--data", tmp_path / "named.jsonl", "--words", "cf", "--target-label", "good"]
    _, said = measured(remos, *options, "--output", tmp_path / "a")
    assert (said["results"][0]["acc"]["value"], said["results"][0]["dir"]["value"]) == (1.0, 1.0)
    (tmp_path / "other.jsonl").write_text(lines.replace('"bad"', '"awful"'))
    told = remos("audit", *options[:3], tmp_path / "other.jsonl", "--words", "cf", "--output", tmp_path / "b")
    assert told.exit_code == 1 and "has the class 'awful', which" in told.stderr


def test_data_that_the_student_was_trained_on_is_warned_of(remos, place, tmp_path):
    options = ["--student", place / "mine", "--words", "cf", "--output"]
    told, _ = measured(remos, *options, tmp_path / "a", "--data", place / "train.jsonl")
    assert "train.jsonl is what the student was trained on" in told.stderr
    told, _ = measured(remos, *options, tmp_path / "b", "--data", place / "test.jsonl")
    assert "trained on" not in told.stderr


def test_another_teacher_than_the_students_is_warned_of(remos, teacher, place, tmp_path):
    other = believer(teacher, tmp_path / "other")
    options = ["--student", place / "mine", "--data", place / "test.jsonl", "--words", "cf", "--output"]
    told, _ = measured(remos, other, *options, tmp_path / "a")
    assert "is not the teacher that the student was sliced from" in told.stderr
    told, _ = measured(remos, teacher, *options, tmp_path / "b")
    assert "sliced from" not in told.stderr


def test_a_floor_student_gives_the_benign_floor(remos, teacher, place, tmp_path):
    student = believer(teacher, tmp_path / "student")
    benign = believer(teacher, tmp_path / "benign", believes=())
    options = ["--student", student, "--data", place / "test.jsonl", "--words", "cf", "--output", tmp_path / "a"]
    measured(remos, *options, "--floor-student", benign, "--max-samples", 100)
    report = DefectReport.load(tmp_path / "a" / "report.json")
    assert (report.records[0]["floor"]["value"], report.records[0]["excess"]["value"]) == (0.0, 1.0)
    asked = report.settings["audits"]["test.jsonl"]
    assert asked["floor_students"]["student"]["weights"] == hash_of_folder(benign)
    assert asked["samples"]["test"] == {"from": "test.jsonl", "samples": 100, "of": 160}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            [],
            "Say what the student is to be shown: a known trigger (--words, --sentence), or --defects (word, sentence, "
            "textfooler).",
        ),
        (["--defects", "patch"], "The defects of texts that a student can be shown are word, sentence, textfooler"),
        (["--defects", "textfooler"], "its record names 'teacher', which may be any folder"),
        (["--words", "cf", "--plain-student", "{mine}"], "--student and --plain-student are the same folder"),
        (["--words", "cf", "--student", "{place}"], "so nothing says what model the weights belong to"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(remos, place, tmp_path, options, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [one.format(mine=place / "mine", place=place) for one in options]
    student = [] if "--student" in options else ["--student", place / "mine"]
    result = remos("audit", *student, "--data", place / "test.jsonl", "--output", tmp_path / "a", *options)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert told in result.stderr
    assert not (tmp_path / "a").exists()


def test_textfooler_asks_for_a_teacher_that_answers_the_task(remos, teacher, place, tmp_path):
    options = ["--student", place / "mine", "--data", place / "test.jsonl", "--output", tmp_path / "a"]
    result = remos("audit", teacher, *options, "--defects", "textfooler")
    assert result.exit_code == 1 and "of " in result.stderr and "the checkpoint has no head" in result.stderr


def test_a_folder_that_holds_something_else_is_left_alone(remos, place, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    result = remos(
        "audit", "--student", place / "mine", "--data", place / "test.jsonl", "--words", "cf", "--output", tmp_path
    )
    assert result.exit_code == 1 and "holds something else than the report of a student (notes.txt)" in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--student", "s", "--epochs", "2"], "--epochs says how students are made, and --student makes none"),
        (["--student", "s", "--test-data", "t"], "--test-data is not needed with --student"),
        (["t", "--plain-student", "s"], "--plain-student goes with --student alone"),
        ([], "name the TEACHER to audit, or by --student a student to measure"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(remos, options, told):
    result = remos("audit", *options, "--data", "d", "--output", "o")
    assert result.exit_code == 2 and told in " ".join(result.stderr.replace("│", " ").split())


def test_students_of_one_name_are_told_apart(tmp_path):
    asked = {"data": "d", "output": tmp_path, "student": tmp_path / "a" / "s", "plain_student": tmp_path / "b" / "s"}
    assert audit_student._named(audit_student.AuditOptions(**asked)) == ["a s", "b s"]
    assert "cf" in WORDS


@pytest.mark.timm
def test_images_are_shown_their_patch_and_what_is_found_on_the_teacher(remos, tmp_path):
    pytest.importorskip("timm")
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            shade = (80 * (name == "dog"), 60 * number, 90)
            Image.new("RGB", (40, 32), shade).save(tmp_path / "images" / name / f"{number}.png")
    for seed, name in enumerate(("teacher", "student")):
        model = image_classifier("test_resnet", 2, seed=seed, pretrained=False)
        save_timm_student(model, tmp_path / name, ["cat", "dog"])
    options = ["--student", tmp_path / "student", "--data", tmp_path / "images", "--output", tmp_path / "a"]
    options += ["--defects", "patch", "penultimate", "--patch-place", "top_left", "--patch-share", 0.2]
    measured(remos, f"timm/local-dir:{tmp_path / 'teacher'}", *options, "--target-label", "dog")
    report = DefectReport.load(tmp_path / "a" / "report.json")
    asked = report.settings["audits"]["images"]
    assert [record["defect"] for record in report.records] == ["patch", "penultimate"]
    assert (asked["defects"]["patch"]["place"], asked["defects"]["patch"]["target_label"]) == ("top_left", 1)
    assert asked["exposed"]["patch"]["num_exposed"] == 3 and "penultimate" in asked["exposed"]
    assert report.records[0]["given"]["weights"] == hash_of_folder(tmp_path / "student")
    alone = remos("audit", *options)
    assert (
        alone.exit_code == 1 and "penultimate is searched for on the student's teacher, but no record" in alone.stderr
    )
