import json

import pytest
import torch
from transformers import BertForMaskedLM

from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.refill import reset_outside
from remos_hf.slicing.relevant_slice import choose_slice


@pytest.fixture(scope="module")
def coverage(remos, teacher, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("profile") / "p"
    assert remos("profile", teacher, "--data", data, "--output", place, "--max-length", 16).exit_code == 0
    return place


def same(folder, model):
    found = BertForMaskedLM.from_pretrained(folder).state_dict()
    return all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_the_student_is_what_the_public_functions_make(remos, teacher, coverage, tmp_path):
    place = tmp_path / "s"
    told = remos("slice", teacher, "--coverage", coverage, "--slice-ratio", 0.8, "--output", place, "--json")
    assert told.exit_code == 0, told.stderr
    model = BertForMaskedLM.from_pretrained(teacher)
    relevant = choose_slice(model, CoverageProfile.load(coverage), slice_ratio=0.8)
    assert same(place, reset_outside(model, relevant))
    said, record = json.loads(told.stdout), Sidecars.load(place)
    assert said["num_kept"] == relevant.num_kept and said["files"] == sorted(path.name for path in place.iterdir())
    assert record.relevant_slice.kept == relevant.kept and record.profile == CoverageProfile.load(coverage)
    assert record.config["teacher"]["id"] == "teacher" and record.config["teacher"]["hash"] == relevant.teacher_hash
    made_by = record.config["strategy"]
    assert (made_by["name"], made_by["slice_ratio"], made_by["criterion"], made_by["criterion_value"]) == (
        "Remos",
        0.8,
        "median",
        None,
    )
    assert record.config["slice"]["squares_reset"] == said["squares_reset"] > 0


def test_data_are_profiled_first(remos, teacher, data, coverage, tmp_path):
    for name, source in (("a", ("--coverage", coverage)), ("b", ("--data", data, "--max-length", 16))):
        result = remos("slice", teacher, *source, "--slice-ratio", 0.8, "--output", tmp_path / name)
        assert result.exit_code == 0 and "Kept 3,277 of 4,096 weights" in result.stdout
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_papers_criterion_goes_by_its_name_into_the_record(remos, teacher, data, tmp_path):
    asked = ["--data", data, "--max-length", 16, "--slice-ratio", 0.8, "--criterion", "nc", "--output", tmp_path / "s"]
    assert remos("slice", teacher, *asked).exit_code == 0
    record = Sidecars.load(tmp_path / "s")
    assert (record.config["strategy"]["criterion"], record.config["strategy"]["criterion_value"]) == ("nc", 0.5)
    assert record.profile.criterion == {"name": "ThresholdCoverage", "threshold": 0.5}


def test_rules_without_data_and_other_resets(remos, teacher, tmp_path):
    options = ["--rule", "random", "--slice-ratio", 0.5, "--scope", "layer", "--reset-to", "init", "--seed", 3]
    assert remos("slice", teacher, *options, "--output", tmp_path / "s").exit_code == 0
    model = BertForMaskedLM.from_pretrained(teacher)
    relevant = choose_slice(model, slice_ratio=0.5, rule="random", scope="layer", seed=3)
    assert same(tmp_path / "s", reset_outside(model, relevant, to="init", seed=3))
    made_by = Sidecars.load(tmp_path / "s").config["strategy"]
    assert (made_by["name"], made_by["scope"], made_by["reset_to"], made_by["seed"]) == ("Random", "layer", "init", 3)


def test_an_earlier_student_is_replaced_if_asked_for(remos, teacher, tmp_path):
    options = ["slice", teacher, "--rule", "random", "--slice-ratio", 0.5, "--output", tmp_path / "s"]
    assert remos(*options).exit_code == 0
    (tmp_path / "s" / "notes.txt").write_text("mine")
    before = (tmp_path / "s" / "model.safetensors").read_bytes()
    refused = remos(*options, "--seed", 1)
    assert refused.exit_code == 1 and "--overwrite" in refused.stderr
    assert (tmp_path / "s" / "model.safetensors").read_bytes() == before
    assert remos(*options, "--seed", 1, "--overwrite").exit_code == 0
    assert (tmp_path / "s" / "model.safetensors").read_bytes() != before
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine" and Sidecars.load(tmp_path / "s")


def test_what_cannot_be_sliced_leaves_nothing(remos, teacher, coverage, tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((coverage / "remos_coverage.safetensors").read_bytes()[:-9])
    for name, options, told in (
        (tmp_path / "pickled", ["--rule", "random"], "only as pytorch_model.bin"),
        ("timm/resnet18", ["--rule", "random"], "of timm, none is"),
        (teacher, ["--coverage", broken], "broken.safetensors"),
        (teacher, ["--coverage", tmp_path / "nothing"], "There is no"),
    ):
        result = remos("slice", name, *options, "--slice-ratio", 0.9, "--output", tmp_path / "s")
        assert result.exit_code == 1 and told in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_slicing_what_was_sliced_before_is_told(remos, teacher, data, tmp_path):
    options = ["--rule", "random", "--slice-ratio", 0.5]
    first = remos("slice", teacher, *options, "--output", tmp_path / "one")
    assert first.exit_code == 0 and "sliced before" not in first.stderr
    again = remos("slice", tmp_path / "one", *options, "--output", tmp_path / "two")
    assert (
        again.exit_code == 0 and "one was sliced before: Random kept 50.0% of teacher. What it gave up" in again.stderr
    )
    asked = ["train", tmp_path / "one", "--train-data", data, "--epochs", 0.2, "--max-length", 16, "--output"]
    told = remos(*asked, tmp_path / "three", "--slice-ratio", 0.8)
    assert told.exit_code == 0 and "one was sliced before: Random kept 50.0%" in told.stderr
    assert "sliced before" not in remos(*asked, tmp_path / "four", "--strategy", "finetune").stderr
