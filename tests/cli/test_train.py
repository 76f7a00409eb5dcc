import json
import re
import shlex
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import remos_hf.cli.train as train
from remos_hf import image_classifier
from remos_hf.auditing.data_files import read_data
from remos_hf.auditing.student_files import load_student, save_timm_student
from remos_hf.evaluation.measures import accuracy
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.sharing.record import SIDECAR_FILES, Sidecars
from tests.cli.conftest import write_data

OPTIONS = ["--max-length", 16, "--epochs", 2, "--batch-size", 8, "--learning-rate", 3e-3]


@pytest.fixture
def command(teacher, data, tmp_path):
    return ["train", teacher, "--train-data", data, "--output", tmp_path / "s", *OPTIONS]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_student_is_an_ordinary_checkpoint_with_its_record_and_accuracy(remos, command, tmp_path):
    dev = write_data(tmp_path / "dev.jsonl", 20, seed=5)
    told = remos(*command, "--eval-data", dev, "--slice-ratio", 0.8, "--json")
    assert told.exit_code == 0, told.stderr
    said, place = json.loads(told.stdout), tmp_path / "s"
    assert said["accuracy"]["num_samples"] == 20 and 0 <= said["accuracy"]["value"] <= 1 and said["steps"] == 16
    record = Sidecars.load(place)
    assert record.config["strategy"]["name"] == "Remos" and record.config["teacher"]["id"] == "teacher"
    assert record.relevant_slice.slice_ratio == 0.8 and record.profile.num_samples == 64
    student = AutoModelForSequenceClassification.from_pretrained(place)
    assert student.config.num_labels == 2
    assert said["files"] == sorted(path.name for path in place.iterdir())
    assert not any(name.endswith(".bin") or name == train.UNFINISHED for name in said["files"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.jsonl", "s"]


def test_the_recorded_command_names_no_local_path_and_makes_the_student_again(remos, command, data, tmp_path):
    assert remos(*command, "--slice-ratio", 0.8, "--bf16", "--text-column", "sentence").exit_code == 0
    told = Sidecars.load(tmp_path / "s").config["command"]
    assert str(tmp_path) not in told and str(data.parent) not in told
    places = {command[1].name: command[1], data.name: data, "student": tmp_path / "again"}
    program, *asked = [places.get(part, part) for part in shlex.split(told)]
    assert program == "remos" and remos(*asked).exit_code == 0
    one, other = weights(tmp_path / "s"), weights(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_strategies_are_those_of_the_package(remos, command, tmp_path):
    for strategy, options in (("finetune", []), ("random", ["--slice-ratio", 0.5])):
        asked = [*command, "--strategy", strategy, *options, "--overwrite", "--epochs", 0.2]
        result = remos(*asked)
        assert result.exit_code == 0, result.stderr
        assert "Accuracy" not in result.stdout and "Trained" in result.stdout
        made_by = Sidecars.load(tmp_path / "s").config["strategy"]
        assert made_by["name"].lower() == strategy and made_by.get("slice_ratio", 0.5) == 0.5


def test_interrupted_it_goes_on_as_if_nothing_had_been(remos, command, tmp_path, monkeypatch):
    command = [*command, "--slice-ratio", 0.8]
    assert remos(*command[:4], "--output", tmp_path / "whole", *OPTIONS, "--slice-ratio", 0.8).exit_code == 0
    steps = []

    def stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 11:  # after the checkpoint of step 8
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    compute = train.RemosTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(train.RemosTrainer, "compute_loss", stop)
        told = remos(*command)
    assert told.exit_code == 130 and "checkpoint-8 is kept" in told.stderr and "--resume" in told.stderr
    work = tmp_path / "s" / train.UNFINISHED
    assert sorted(path.name for path in work.iterdir()) == ["asked.json", "checkpoint-8"]
    (work / "checkpoint-9").mkdir()  # as a killed run leaves it
    (work / "checkpoint-9" / "model.safetensors").write_bytes(b"half")

    refused = remos(*command)
    assert refused.exit_code == 1 and "--resume" in refused.stderr
    other = remos(*command, "--resume", "--seed", 4)
    assert other.exit_code == 1 and "was started with --seed 0, not 4. Ask for the same" in other.stderr
    other = remos(*command, "--resume", "--text-column", "sentence", "--bf16", "--slice-ratio", 0.7)
    assert "--bf16 off, not on; --slice-ratio 0.8, not 0.7; --text-column left out, not sentence" in other.stderr
    told = remos(*command, "--resume")
    assert told.exit_code == 0, told.stderr
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "s")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert not work.exists()


def test_a_resume_with_nothing_to_resume_says_so(remos, command, tmp_path):
    told = remos(*command, "--slice-ratio", 0.8, "--epochs", 0.2, "--resume")
    assert told.exit_code == 0 and "holds no run to go on with, so training starts anew" in told.stderr


def test_interrupted_before_the_first_checkpoint_nothing_is_left(remos, command, tmp_path, monkeypatch):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.RemosTrainer, "compute_loss", stop)
    told = remos(*command, "--slice-ratio", 0.8)
    assert told.exit_code == 130 and "Nothing is kept" in told.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("lines", "options", "told"),
    [
        ("sentence\tlabel\ngood\t1\nbad\tnan\n", [], "sample 1 has 'nan' in column 'label'"),
        ("sentence\tgold\ngood\t1\n", [], "samples have no column 'label'; their columns are ['sentence', 'gold']"),
        ("sentence\tlabel\ngood\t1\n", ["--text-column", "txt"], "samples have no column 'txt'"),
        ("sentence\tlabel\n", [], "holds no sample"),
        ("sentence\tlabel\ngood\t0\n", [], "two labels or more"),
        ("sentence\tlabel\ngood\tBad\nbad\tbad\n", [], "differ in nothing but capitals"),
    ],
)
def test_data_that_do_not_fit_are_told_in_one_line(remos, teacher, tmp_path, lines, options, told):
    path = tmp_path / "d.tsv"
    path.write_text(lines)
    result = remos("train", teacher, "--train-data", path, "--output", tmp_path / "s", "--slice-ratio", 0.9, *options)
    assert result.exit_code == 1 and told in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_classes_keep_their_names_in_every_file_and_in_the_student(remos, command, tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text("sentence,label\n" + "bad,negative\nso so,mixed\ngood,positive\n" * 3)
    (tmp_path / "dev.csv").write_text("sentence,label\ngood,positive\nbad,negative\n")
    seen = []
    monkeypatch.setattr(train, "accuracy", lambda found, labels: seen.append(labels) or accuracy(found, labels))
    asked = [tmp_path / "train.csv" if part is command[3] else part for part in command]
    result = remos(*asked, "--strategy", "finetune", "--eval-data", tmp_path / "dev.csv", "--epochs", 0.5)
    assert result.exit_code == 0, result.stderr
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s").config
    assert config.id2label == {0: "mixed", 1: "negative", 2: "positive"} and seen == [[2, 1]]


def test_labels_that_were_never_trained_are_refused(remos, command, tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\ngood\t2\n")
    result = remos(*command, "--slice-ratio", 0.9, "--eval-data", path)
    assert result.exit_code == 1 and "dev.tsv has the class '2', which" in result.stderr


def test_codes_are_names_in_the_saved_student(remos, teacher, tmp_path):
    for name, labels in (("train", (7, 99213, 7, 99213)), ("dev", (99213,))):
        rows = "".join(f"good bad {label},{label}\n" for label in labels)
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    asked = ["--strategy", "finetune", "--eval-data", dev, "--epochs", 1, "--output", tmp_path / "s"]
    result = remos("train", teacher, "--train-data", train, *asked)
    assert result.exit_code == 0, result.stderr
    assert "are 7, 99213, not 0 to 1: they are taken for the names of 2 classes" in result.stderr
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "s").config.id2label == {0: "7", 1: "99213"}


@pytest.mark.parametrize("strategy", ["l2sp", "renofeation"])
def test_rivals_that_hold_their_student_are_named_like_any_other(remos, command, tmp_path, strategy):
    told = remos(*command, "--strategy", strategy, "--epochs", 0.2)
    assert told.exit_code == 0, told.stderr
    assert Sidecars.load(tmp_path / "s").config["strategy"]["name"].lower() == strategy


def test_several_strategies_start_and_hold_one_student(remos, command, tmp_path):
    asked = ["--strategy", "subspace", "--energy", 0.9, "--strategy", "hardened", "--epochs", 0.2]
    told = remos(*command, *asked, "--json")
    assert told.exit_code == 0, told.stderr
    config = Sidecars.load(tmp_path / "s").config
    assert config["strategy"]["name"] == "Subspace + Hardened" and config["strategy"]["strategies"][0]["energy"] == 0.9
    assert config["start"]["subspace"]["layers"] and config["finish"]["hardened"]["root_mean_squares"]


def test_an_energy_that_removes_no_own_trigger_is_refused_with_what_was_tried(remos, command, tmp_path):
    dev = write_data(tmp_path / "dev.jsonl", 80, seed=5)
    asked = ["--strategy", "subspace", "--energy", "auto", "--accuracy-budget", 0.5, "--eval-data", dev]
    told = remos(*command, *asked, "--epochs", 12, "--learning-rate", 5e-3)
    assert told.exit_code == 1 and not (tmp_path / "s").exists()
    curve = re.findall(r"energy (0\.\d+) 1\.0000 \[.+?\], own triggers turn \d+ of 16, untaught \d+ of 16", told.stderr)
    assert curve[0] == "0.99" and len(curve) > 3 and "--accuracy-budget 0.5" in told.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of class folders with tiny pictures."""
    folder = tmp_path_factory.mktemp("images")
    for shade, name in enumerate(("daisy", "rose", "tulip")):
        (folder / name).mkdir()
        for number in range(4):
            Image.new("RGB", (40, 32), (80 * shade, 20 * number, 90)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def of_timm(tmp_path_factory):
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("timm") / "net"
    save_timm_student(image_classifier("test_resnet", 5, seed=1, pretrained=False), folder)
    return f"timm/local-dir:{folder}"


@pytest.mark.timm
def test_a_student_of_a_teacher_of_timm_is_loaded_again_by_everything(remos, of_timm, images, tmp_path):
    import timm

    asked = ["train", of_timm, "--train-data", images, "--eval-data", images, "--slice-ratio", 0.8, "--epochs", 1]
    told = remos(*asked, "--output", tmp_path / "s", "--batch-size", 4, "--json")
    assert told.exit_code == 0, told.stderr
    said, place = json.loads(told.stdout), tmp_path / "s"
    assert said["files"] == sorted(["config.json", "model.safetensors", "remos_config.json", *SIDECAR_FILES[1:]])
    assert said["accuracy"]["num_samples"] == 12 and said["teacher"]["id"] == "net"
    student = load_student(place)
    assert student.class_names == ("daisy", "rose", "tulip") and student.record.relevant_slice.slice_ratio == 0.8
    samples = read_data(images)
    found = predict_labels(student.model, samples, student.task(samples), progress=False)
    assert accuracy(found, samples["label"]).value == said["accuracy"]["value"]
    plain = timm.create_model(f"local-dir:{place}", pretrained=True)
    loaded = image_classifier("test_resnet", checkpoint_path=place / "model.safetensors").body
    wrapped = AutoModelForImageClassification.from_pretrained(place)
    assert wrapped.config.id2label == {0: "daisy", 1: "rose", 2: "tulip"}
    for other in (plain, loaded, wrapped.timm_model):
        assert all(torch.equal(one, other.state_dict()[name]) for name, one in student.model.body.state_dict().items())
    command = student.record.config["command"]
    assert "timm/local-dir:net" in command and str(tmp_path) not in command


@pytest.mark.timm
def test_options_of_texts_are_refused_for_images_and_the_reverse(remos, of_timm, images, command, tmp_path):
    asked = ["train", of_timm, "--train-data", images, "--output", tmp_path / "s", "--slice-ratio", 0.8]
    told = remos(*asked, "--max-length", 16)
    assert told.exit_code == 1 and "--max-length says nothing of how images are read" in told.stderr
    told = remos(*command, "--slice-ratio", 0.8, "--augment", "none")
    assert told.exit_code == 1 and "--augment says nothing of how texts are read" in told.stderr
    assert not (tmp_path / "s").exists()
    told = remos("train", of_timm, *command[2:], "--slice-ratio", 0.8)
    assert told.exit_code == 1 and "reads images, but the samples are texts" in told.stderr


def test_into_a_log_goes_a_line_a_minute(remos, command, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 25))  # 25 seconds each time somebody looks
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    told = remos(*command, "--strategy", "finetune")
    assert told.exit_code == 0, told.stderr
    lines = [line.split(" ", 1)[1] for line in told.stderr.splitlines() if "training: " in line]
    assert 2 <= len(lines) < 16 and all(" of 2, step " in line and " of 16; " in line for line in lines), told.stderr
