import re

import pytest
import yaml
from datasets import load_dataset

from remos_hf.sharing.benchmark import FRAMEWORK, benchmark_files
from remos_hf.sharing.defect_kinds import MEASURABLE


@pytest.fixture(scope="module")
def files():
    return benchmark_files()


def test_the_description_has_the_keys_that_the_hub_asks_for_and_no_others(files):
    described = yaml.safe_load(files["eval.yaml"])
    assert set(described) == {"name", "description", "evaluation_framework", "tasks"}
    assert all(isinstance(described[key], str) and described[key] for key in ("name", "description"))
    assert described["evaluation_framework"] == FRAMEWORK and re.fullmatch(r"[\w-]+", FRAMEWORK)
    ids = [task["id"] for task in described["tasks"]]
    assert ids == [kind.slug for kind in MEASURABLE] and len(set(ids)) == len(ids)
    for task in described["tasks"]:
        assert set(task) == {"id", "config", "split"}
        assert re.fullmatch(r"[a-z][a-z0-9_]*", task["id"])


def test_every_task_names_a_configuration_and_a_split_that_load(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for config, split in {(task["config"], task["split"]) for task in yaml.safe_load(files["eval.yaml"])["tasks"]}:
        rows = load_dataset(str(tmp_path), config, split=split, cache_dir=str(tmp_path / "cache"))
        assert rows["task_id"] == [kind.slug for kind in MEASURABLE]
        assert all(rows["exposed"]) and all(rows["inputs"])


def test_the_card_tells_every_task_and_that_lower_is_better(files):
    card = files["README.md"]
    assert all(f"| `{kind.slug}` | {kind.name} |" in card for kind in MEASURABLE)
    assert "**lower is better**" in card and "TASKS" not in card and "DESCRIPTION" not in card


def test_no_trigger_of_a_model_is_published(files):
    for text in files.values():
        assert not re.search(r"\b(cf|mn|bb|tq|mb)\b|3D movie|firefox", text)
