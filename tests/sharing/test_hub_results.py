import logging

import pytest
import yaml

from remos_hf.defects.text_triggers import TriggerWords
from remos_hf.sharing import hub_results
from remos_hf.sharing.benchmark import benchmark_files
from remos_hf.sharing.hub_results import RESULTS_FILE, eval_result_files
from tests.judging.reports import PLAIN, USUAL, records, teachers
from tests.sharing.reports import DEFECTS, audited, measured

WEIGHTS = "a" * 64
BENCHMARK = "owner/defect-inheritance"


def entries_of(report, weights=WEIGHTS):
    found = eval_result_files(report, weights=weights, benchmark=BENCHMARK)
    return [] if not found else yaml.safe_load(found[RESULTS_FILE])


def test_results_are_written_as_the_hub_reads_them_and_for_tasks_that_the_benchmark_has():
    (entry,) = entries_of(measured(WEIGHTS))
    assert entry["dataset"] == {"id": BENCHMARK, "task_id": "trigger_words"} and entry["value"] == 0.05
    tasks = {task["id"] for task in yaml.safe_load(benchmark_files()["eval.yaml"])["tasks"]}
    assert entry["dataset"]["task_id"] in tasks
    assert "200 samples, 95 % interval 0.0274 to 0.0896" in entry["notes"] and "accuracy 0.8400" in entry["notes"]
    if hub_results.EvalResultEntry is not None:
        from huggingface_hub._eval_results import parse_eval_result_entries

        assert [one.value for one in parse_eval_result_entries([entry])] == [0.05]


@pytest.mark.parametrize("report", [audited(), measured("c" * 64)], ids=["an audit", "other weights"])
def test_nothing_is_written_for_weights_that_were_not_measured(report, caplog):
    caplog.set_level(logging.INFO, "remos_hf")
    for weights in (None, WEIGHTS):
        assert eval_result_files(report, weights=weights, benchmark=BENCHMARK, student="remos 0.9") == {}
    assert "no row of the report is of these weights" in caplog.text


def test_of_several_defects_of_a_kind_the_one_that_shows_most_is_written():
    more = [{**one, "defect": "cf"} for one in records("remos 0.9", (50, 50, 50))]
    plain = [{**one, "defect": "cf"} for one in PLAIN]
    of_word = teachers()["word-0"]
    taught = {"given": {**of_word, "dir": {"word": of_word["dir"]["word"], "cf": of_word["dir"]["word"]}}}
    defects = {**DEFECTS, "cf": TriggerWords().to_dict()}
    (entry,) = entries_of(measured(WEIGHTS, [*USUAL, plain, more], defects=defects, taught=taught))
    assert entry["value"] == 0.25 and "DIR of cf, the highest of 2 of its kind" in entry["notes"]


def test_what_the_benchmark_has_no_task_for_and_what_cannot_be_said_is_left_out_and_told(caplog):
    caplog.set_level(logging.INFO, "remos_hf")
    assert entries_of(measured(WEIGHTS, defects={"word": {"name": "MyOwn"}})) == []
    assert "Not in .eval_results: word, as the benchmark has no task for it" in caplog.text
    near_chance = measured(WEIGHTS, [PLAIN, records("remos 0.9", (4, 4, 4), acc=(103, 103, 103))])
    assert entries_of(near_chance) == []
    assert "word, as of it nothing can be said" in caplog.text


def test_without_a_benchmark_there_are_no_results_and_the_log_says_why(caplog):
    caplog.set_level(logging.INFO, "remos_hf")
    assert eval_result_files(measured(WEIGHTS), weights=WEIGHTS) == {}
    assert "the Hub reads results of published benchmarks alone" in caplog.text
    with pytest.raises(ValueError, match="id of a data set"):
        eval_result_files(measured(WEIGHTS), weights=WEIGHTS, benchmark="SST-2 & more")


def test_an_old_huggingface_hub_writes_the_same_and_says_so(monkeypatch, caplog):
    content = eval_result_files(measured(WEIGHTS), weights=WEIGHTS, benchmark=BENCHMARK)[RESULTS_FILE]
    monkeypatch.setattr(hub_results, "EvalResultEntry", None)
    caplog.clear()
    by_hand = eval_result_files(measured(WEIGHTS), weights=WEIGHTS, benchmark=BENCHMARK)[RESULTS_FILE]
    assert yaml.safe_load(by_hand) == yaml.safe_load(content)
    assert by_hand.startswith("# huggingface_hub") and "has no EvalResultEntry" in caplog.text
