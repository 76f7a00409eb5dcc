import json
import logging
import os
import sys
import time
from multiprocessing import get_context
from types import SimpleNamespace

import psutil
import pytest
from datasets import Dataset, concatenate_datasets

from remos_hf.defects.textattack_processes import finished
from remos_hf.errors import RemosError
from tests.defects.attacked import NEAR, attacked, needs_textattack, rows_of, timeless

# Every attack starts processes that import TextAttack: seconds each, and more on a busy machine.
pytestmark = pytest.mark.timeout(400)


def test_half_a_result_file_is_announced_and_not_read(tmp_path, caplog):
    (tmp_path / "rows-0-1.json").write_text('[{"row": 0}, {"row": 1}]')
    (tmp_path / "rows-2-3.json").write_text('[{"row": 2}, {"ro')
    (tmp_path / ".rows-4-5.json.17.tmp").write_text('[{"row": 4}]')
    with caplog.at_level(logging.WARNING):
        assert sorted(finished(tmp_path)) == [0, 1]
    assert "rows-2-3.json is not whole" in caplog.text


COPIES = 8


@pytest.fixture(scope="module")
def gone_on(world, tmp_path_factory):
    """A run that was killed after its first samples, and gone on with by two workers."""
    cache = tmp_path_factory.mktemp("killed") / "cache"
    long = concatenate_datasets([world.dataset] * COPIES)
    run = get_context("fork").Process(target=attacked, args=(world, "kuleshov", long, cache))
    run.start()
    wait_for(lambda: len(list(cache.glob(".*.partial/rows-*.json"))) >= 2)
    workers = psutil.Process(run.pid).children()
    run.kill()
    run.join()
    assert workers and not psutil.wait_procs(workers, timeout=30)[1], "a worker outlived its run"
    (partial,) = cache.glob(".*.partial")
    known = len(finished(partial))
    assert 0 < known < len(long)
    before = dict(os.environ)
    exposed = attacked(world, "kuleshov", long, cache, workers=2)
    return SimpleNamespace(
        exposed=exposed, known=known, cache=cache, partial=partial, same_environment=before == dict(os.environ)
    )


@needs_textattack
def test_a_killed_run_goes_on_from_its_last_samples(gone_on):
    assert gone_on.exposed.facts["num_resumed"] == gone_on.known
    assert [path.name for path in gone_on.cache.iterdir()] == [gone_on.partial.name[1:].removesuffix(".partial")]


@needs_textattack
def test_two_workers_find_what_one_finds(gone_on, made):
    if made.recipe == "textfooler":
        pytest.skip("one recipe is enough, and Kuleshov2017 has every constraint")
    found, expected = rows_of(gone_on.exposed), rows_of(made.exposed)
    assert len(found) == COPIES * len(expected)
    for place, row in enumerate(found):
        copy, same = divmod(place, len(expected))
        assert row == {**expected[same], "clean_index": expected[same]["clean_index"] + 16 * copy}
    for name, fact in timeless(made.exposed.facts).items():
        if name != "num_resumed":
            times = COPIES if name.startswith("num_") else 1
            several = {reason: times * number for reason, number in fact.items()} if name == "num_left_out" else None
            wanted = fact * times if several is None and times > 1 else several or fact
            assert gone_on.exposed.facts[name] == wanted, name


@needs_textattack
def test_the_callers_process_stays_as_it_was(gone_on):
    assert gone_on.same_environment
    assert "textattack" not in sys.modules


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
