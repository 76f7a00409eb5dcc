import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, BertForMaskedLM

from remos_hf.auditing.data_files import read_table
from remos_hf.cli.profile import number_to_profile
from remos_hf.evaluation.tasks import TextTask
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.data_pass import DEFAULT_MAX_SAMPLES, profile_coverage


def test_the_profile_is_that_of_the_checkpoint_as_it_was_saved(remos, teacher, data, tmp_path):
    told = remos("profile", teacher, "--data", data, "--output", tmp_path / "p", "--max-length", 16, "--json")
    assert told.exit_code == 0, told.stderr
    found = CoverageProfile.load(tmp_path / "p")
    task = TextTask(AutoTokenizer.from_pretrained(teacher), max_length=16)
    batches = [batch for _, batch in task.batches(read_table(data))]
    assert found == profile_coverage(BertForMaskedLM.from_pretrained(teacher), batches)
    said = json.loads(told.stdout)
    assert said["num_samples"] == 64 and said["share_never_covered"] == found.share_never_covered
    assert said["never_covered"] / said["neurons"] == found.share_never_covered
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["remos_coverage.safetensors"]


def test_samples_are_drawn_by_the_seed_and_labels_are_not_needed(remos, teacher, tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text(
        "review\tlabel\n" + "".join(f"{word} film\t?\n" for word in "good bad great fine poor dull".split())
    )

    def profile(name, *options):
        asked = ["--data", path, "--output", tmp_path / name, "--max-samples", 3, "--criterion", "tknc", *options]
        result = remos("profile", teacher, *asked)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith("3 samples, 12 layers: ") and "never covered" in result.stdout
        return CoverageProfile.load(tmp_path / name)

    assert profile("a") == profile("b")
    assert profile("a", "--overwrite", "--seed", 5).data_fingerprint != profile("b", "--overwrite").data_fingerprint
    assert profile("a", "--overwrite").criterion["name"] == "TopKCoverage"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("sentence\n", "holds no sample"),
        ("a,b\nx,y\n", "which column holds the text is not clear"),
        (None, "There is no"),
    ],
)
def test_data_that_say_nothing_are_told_in_one_line(remos, teacher, tmp_path, content, told):
    path = tmp_path / "d.csv"
    if content is not None:
        path.write_text(content)
    result = remos("profile", teacher, "--data", path, "--output", tmp_path / "p")
    assert result.exit_code == 1 and told in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "p").exists()


def test_the_cap_on_profiled_samples_is_told_and_can_be_lifted(caplog):
    few, many = Dataset.from_dict({"text": ["a"] * 10}), Dataset.from_dict({"text": ["a"] * 3000})
    assert [number_to_profile(asked, few, "--x") for asked in (None, 4, "all", 40)] == [10, 4, 10, 10]
    assert caplog.text == ""
    assert [number_to_profile(asked, many, "--x") for asked in ("all", 2500, None)] == [3000, 2500, DEFAULT_MAX_SAMPLES]
    assert "2048 of 3000 samples are profiled, drawn by the seed. --x all takes all of them." in caplog.text
