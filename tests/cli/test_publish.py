import json

import pytest

from remos_hf.adapters.weights_hash import hash_of_folder

pytest.importorskip("remos_hf.sharing.hub")


@pytest.fixture(scope="module")
def student(remos, teacher, tmp_path_factory):
    place = tmp_path_factory.mktemp("student") / "s"
    assert remos("slice", teacher, "--rule", "random", "--slice-ratio", 0.5, "--output", place).exit_code == 0
    return place


def test_a_card_goes_to_stdout_or_into_a_file(remos, student, tmp_path):
    told = remos("card", student, "--repo-id", "me/toy")
    assert told.exit_code == 0, told.stderr
    assert told.stdout.startswith("---\n") and "me/toy" in told.stdout
    assert json.loads(remos("card", student, "--repo-id", "me/toy", "--json").stdout)["card"] + "\n" == told.stdout
    path = tmp_path / "README.md"
    assert remos("card", student, "--repo-id", "me/toy", "--output", path).exit_code == 0
    assert path.read_text().strip() == told.stdout.strip()
    again = remos("card", student, "--output", path)
    assert again.exit_code == 1 and "--overwrite" in again.stderr
    assert remos("card", student, "--output", path, "--overwrite").exit_code == 0


def test_a_sliced_and_never_trained_checkpoint_is_no_student_and_none_of_its_weights_were_measured(remos, student):
    said = ("--dataset", "owner/texts", "--language", "en", "--license", "mit")
    text = remos("card", student, *said).stdout
    assert "not trained since" in text and "A student of" not in text
    assert "Nothing was measured of these weights" in text and hash_of_folder(student) in text
    assert all(line in text for line in ("- owner/texts", "language: en", "license: mit"))


def test_a_dry_run_lists_what_would_be_pushed(remos, student):
    told = remos("push", student, "me/toy", "--dry-run", "--json")
    assert told.exit_code == 0, told.stderr
    said = json.loads(told.stdout)
    assert {"model.safetensors", "remos_config.json", "README.md"} <= set(said["files"]) and said["dry_run"]
    assert "Would push to me/toy (private):" in remos("push", student, "me/toy", "--dry-run").stdout


def test_a_folder_that_is_no_student_is_refused(remos, tmp_path):
    for folder, told in ((tmp_path / "missing", "There is no folder"), (tmp_path, "remos_config.json")):
        for command in (["card", folder], ["push", folder, "me/toy", "--dry-run"]):
            result = remos(*command)
            assert result.exit_code == 1 and told in result.stderr and result.stderr.count("\n") == 1


def test_a_report_that_is_not_there_is_named_by_its_option(remos, student, tmp_path):
    for command in (["card", student], ["push", student, "me/toy", "--dry-run"]):
        told = remos(*command, "--report", tmp_path / "none.json")
        assert told.exit_code == 1 and "--report is the report.json of an audit, but there is no file" in told.stderr
