import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from datasets import Dataset

from remos_hf.defects.textattack_processes import finished
from remos_hf.errors import RemosError
from tests.defects.attacked import NEAR, attacked, needs_textattack, rows_of, timeless

# Every attack starts processes that import TextAttack: seconds each, and more on a busy machine.
pytestmark = pytest.mark.timeout(400)


@needs_textattack
def test_the_callers_process_stays_as_it_was(made):
    assert made.same_environment
    assert "textattack" not in sys.modules


@needs_textattack
def test_two_workers_find_what_one_finds(world, made):
    if made.recipe == "textfooler":
        pytest.skip("one recipe is enough, and Kuleshov2017 has every constraint")
    again = attacked(world, made.recipe, workers=2)
    assert rows_of(again) == rows_of(made.exposed)
    assert timeless(again.facts) == timeless(made.exposed.facts)


def test_half_a_result_file_is_announced_and_not_read(tmp_path, caplog):
    (tmp_path / "rows-0-1.json").write_text('[{"row": 0}, {"row": 1}]')
    (tmp_path / "rows-2-3.json").write_text('[{"row": 2}, {"ro')
    (tmp_path / ".rows-4-5.json.17.tmp").write_text('[{"row": 4}]')
    with caplog.at_level(logging.WARNING):
        assert sorted(finished(tmp_path)) == [0, 1]
    assert "rows-2-3.json is not whole" in caplog.text


KILLED = """
import sys
from datasets import load_from_disk
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from remos_hf.defects.adversarial_text import AdversarialText
import json
folder, cache, fields = sys.argv[1:]
AdversarialText("textfooler", **json.loads(fields)).exposed_set(
    load_from_disk(folder + "/data"),
    teacher=AutoModelForSequenceClassification.from_pretrained(folder + "/teacher"),
    tokenizer=AutoTokenizer.from_pretrained(folder + "/teacher"),
    cache=cache,
)
"""


@needs_textattack
def test_a_killed_run_goes_on_from_its_last_samples(world, tmp_path):
    long = Dataset.from_dict({"text": list(world.dataset["text"]) * 30, "label": list(world.dataset["label"]) * 30})
    long.save_to_disk(str(tmp_path / "data"))
    world.teacher.save_pretrained(tmp_path / "teacher")
    world.tokenizer.save_pretrained(tmp_path / "teacher")
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(cache), json.dumps(world.fields)]
    root = str(Path(__file__).parents[2])
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(cache.glob(".*.partial/rows-*.json"))) >= 2)
    workers = psutil.Process(run.pid).children()
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert workers and not psutil.wait_procs(workers, timeout=30)[1], "a worker outlived its run"
    (partial,) = cache.glob(".*.partial")
    known = len(finished(partial))
    assert 0 < known < len(long)

    exposed = attacked(world, dataset=long, cache=cache, workers=2)
    assert exposed.facts["num_resumed"] == known
    whole = [row["text"] for row in exposed.dataset]
    assert len(whole) % 30 == 0 and whole == whole[: len(whole) // 30] * 30
    assert [path.name for path in cache.iterdir()] == [partial.name[1:].removesuffix(".partial")]


def wait_for(happened, seconds=300):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@needs_textattack
def test_what_fails_in_a_worker_names_the_sample_and_keeps_the_finished_ones(world, tmp_path):
    texts = [*world.dataset["text"], "it was so", "the plot ended awful"]
    (tmp_path / "near.json").write_text(json.dumps({**NEAR, "plot": [7]}))
    rows = Dataset.from_dict({"text": texts[:4] + texts[-1:], "label": [*world.dataset["label"][:4], 0]})
    with pytest.raises(RemosError, match=r"row 4 \('the plot ended awful'\): AttributeError"):
        attacked(world, dataset=rows, cache=tmp_path / "cache", neighbours=str(tmp_path / "near.json"))
    (partial,) = (tmp_path / "cache").glob(".*.partial")
    assert sorted(finished(partial)) == [0, 1, 2, 3]
