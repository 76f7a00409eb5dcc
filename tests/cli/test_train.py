import json
import shlex

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import remos_hf.cli.train as train
from remos_hf.evaluation.measures import accuracy
from remos_hf.sharing.record import Sidecars
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
    assert other.exit_code == 1 and "seed differ" in other.stderr
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
        ("sentence\tlabel\ngood\t0\nbad\t99213\n", [], "they are codes"),
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
    assert result.exit_code == 1 and "dev.tsv has the label 2, but" in result.stderr


def test_teachers_of_timm_are_sent_elsewhere(remos, data, tmp_path):
    result = remos("train", "timm/resnet18", "--train-data", data, "--output", tmp_path / "s", "--slice-ratio", 0.9)
    assert result.exit_code == 1 and "examples/run_timm_remos.py" in result.stderr
