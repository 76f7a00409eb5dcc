"""A short run of benchmarks/fuzz_files.py: some hundred mutants of files that strangers may have made."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz_files.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize(("campaign", "count"), [("sidecars", 250), ("checkpoints", 30)])
@pytest.mark.filterwarnings("ignore")
def test_mutants_are_refused_by_documented_errors_or_read_as_they_are(fuzz, campaign, count):
    found = []
    fuzz.run(
        campaign, range(50_000, 50_000 + count), 0, lambda number, what, failure: found.append((number, what, failure))
    )
    assert len(found) == count and [failure for _, _, failure in found if failure is not None] == []
    assert {what.split(" ")[0] for _, what, _ in found} >= {"refused", "read,"} or campaign == "checkpoints"


def test_a_mutant_depends_on_its_number_and_the_seed_alone(fuzz, tmp_path):
    fuzz.save_student(tmp_path)
    tried = [fuzz.one("sidecars", number, 3, tmp_path) for number in (5, 6, 5, 6)]
    assert tried[:2] == tried[2:]
