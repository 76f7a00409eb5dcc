import importlib.util
import json
import logging
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification

from remos_hf.defects import adversarial_text
from remos_hf.defects.adversarial_text import AdversarialText
from remos_hf.defects.base import ExposedSet
from remos_hf.errors import RemosError
from tests.defects.attacked import NEAR, attacked, labels_of, needs_textattack, rows_of

# Every attack starts processes that import TextAttack: seconds each, and more on a busy machine.
pytestmark = pytest.mark.timeout(400)


@needs_textattack
def test_every_exposed_text_fools_the_teacher(world, made):
    assert len(made.exposed) >= 4
    assert all(
        predicted != label
        for predicted, label in zip(
            labels_of(world, made.exposed.dataset["text"]), made.exposed.dataset["label"], strict=True
        )
    )
    clean = world.dataset.select(made.exposed.clean_index)
    assert labels_of(world, clean["text"]) == list(clean["label"])


@needs_textattack
def test_rows_are_the_clean_ones_with_another_text(world, made):
    clean = world.dataset.select(made.exposed.clean_index)
    assert made.exposed.target_label is None
    assert made.exposed.dataset.column_names == ["text", "label", "id", "clean_index"]
    assert made.exposed.dataset.features["label"] == world.dataset.features["label"]
    for name in ("label", "id"):
        assert list(made.exposed.dataset[name]) == list(clean[name])
    assert all(a != b for a, b in zip(made.exposed.dataset["text"], clean["text"], strict=True))


@needs_textattack
def test_facts_count_every_sample_once(made):
    facts = made.exposed.facts
    assert facts["num_clean"] == 16
    assert facts["num_fooled"] == len(made.exposed)
    parts = ("num_teacher_wrong", "num_fooled", "num_failed", "num_goal_without_fooling")
    assert sum(facts[part] for part in parts) == 16
    assert facts["mean_queries"] > 1


@needs_textattack
@pytest.mark.parametrize("max_length", [24, 5])
def test_changes_beyond_what_the_models_read_are_left_out_and_counted(world, made, max_length, caplog):
    defect = AdversarialText(made.recipe, **world.fields)
    given = {"teacher": world.teacher, "tokenizer": world.tokenizer, "cache": made.cache}
    exposed = defect.exposed_set(world.dataset, max_length=max_length, **given)
    changed = [text.split()[: max_length - 2] for text in made.exposed.dataset["text"]]  # two tokens are special
    clean = world.dataset.select(made.exposed.clean_index)["text"]
    beyond = sum(one == text.split()[: max_length - 2] for one, text in zip(changed, clean, strict=True))
    assert (beyond > 5) == (max_length == 5)
    facts = exposed.facts
    assert len(exposed) == facts["num_exposed"] == len(made.exposed) - beyond
    assert facts["num_left_out"].get("equal to the clean input", 0) == beyond
    assert sum(facts["num_left_out"].values()) == facts["num_clean"] - len(exposed)
    assert ("equal to the clean input for max_length 5 and left out" in caplog.text) == (beyond > 0)


@needs_textattack
def test_files_are_named_by_their_hash(world, made):
    told = made.exposed.facts["defect"]
    assert told["neighbours"]["name"] == "near.json" and len(told["neighbours"]["sha256"]) == 64
    assert str(world.folder) not in json.dumps(dict(made.exposed.facts))


@needs_textattack
def test_a_cached_set_is_not_attacked_again(world, made, monkeypatch):
    monkeypatch.setattr(adversarial_text, "attack", lambda *_: pytest.fail("attacked again"))
    renamed = world.dataset.rename_column("id", "number")  # other columns come from the data at hand
    again = attacked(world, made.recipe, dataset=renamed, cache=made.cache, workers=2)
    assert rows_of(replace(again, dataset=again.dataset.rename_column("number", "id"))) == rows_of(made.exposed)
    assert again.facts == made.exposed.facts
    assert [path.name.partition("-")[0] for path in made.cache.iterdir()] == [made.exposed.facts["recipe"]]


@needs_textattack
def test_a_truncated_cached_set_is_announced_and_made_anew(world, made, tmp_path, caplog, monkeypatch):
    if made.recipe == "kuleshov":
        pytest.skip("one recipe is enough")
    place = made.exposed.save(tmp_path / next(made.cache.iterdir()).name)
    table = next(place.glob("rows/*.arrow"))
    table.write_bytes(table.read_bytes()[:-9])
    monkeypatch.setattr(adversarial_text, "attack", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError):
        attacked(world, cache=tmp_path)
    assert "not whole" in caplog.text and not place.exists()


def test_a_cached_folder_without_its_last_file_is_not_read(tmp_path, caplog):
    (tmp_path / "set" / "rows").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert ExposedSet.load_cached(tmp_path / "set") is None
    assert "not whole" in caplog.text and not (tmp_path / "set").exists()


@needs_textattack
def test_results_that_another_run_cleared_away_are_missed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(adversarial_text, "attack", lambda *_: None)
    with pytest.raises(RemosError, match="lacks results of 16 attacked samples"):
        attacked(world, cache=tmp_path)


@needs_textattack
def test_both_texts_of_a_pair_are_kept_apart_and_no_more_samples_attacked_than_asked(world):
    rows = world.dataset.to_dict()
    pairs = Dataset.from_dict({"first": ["it ended"] * 16, "second": rows["text"], "label": rows["label"]})
    exposed = attacked(world, dataset=pairs, text_columns=("first", "second"), max_samples=12)
    assert len(exposed) > 0 and max(exposed.clean_index) < 12
    assert exposed.facts["num_clean"] == 12
    assert set(exposed.dataset["first"]) == {"it ended"}
    batch = world.tokenizer(
        list(exposed.dataset["first"]), list(exposed.dataset["second"]), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        predicted = world.teacher(**batch).logits.argmax(1).tolist()
    assert all(a != b for a, b in zip(predicted, exposed.dataset["label"], strict=True))


@needs_textattack
def test_the_cache_key_follows_what_matters(world, tmp_path):
    def key(teacher=world.teacher, dataset=world.dataset, **fields):
        defect = AdversarialText(**{**world.fields, **fields})
        return defect._key(defect._samples(dataset, teacher), teacher, world.tokenizer)

    copy, changed = tmp_path / "near.json", tmp_path / "changed" / "near.json"
    copy.write_text(json.dumps(NEAR))
    changed.parent.mkdir()
    changed.write_text(json.dumps({**NEAR, "so": ["it"]}))
    world.tokenizer(["the movie", "it"], padding=True, truncation=True, max_length=5)  # how it was called is no matter
    assert key() == key(neighbours=str(copy))
    other = BertForSequenceClassification(world.teacher.config)
    other.load_state_dict(world.teacher.state_dict())
    assert key() == key(teacher=other)
    other.classifier.bias.data[0] += 1
    keys = [
        key(teacher=other),
        key(dataset=world.dataset.select(range(15))),
        key(neighbours=str(changed)),
        key(seed=1),
        key(recipe="kuleshov"),
        key(max_length=20),
    ]
    assert len({key(), *keys}) == 7


def test_without_textattack_the_extra_is_named(world, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"remos_hf\[textattack\].*environment of its own.*ExposedSet.load"):
        attacked(world)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": ["a"], "label": [0]}, "no column 'text'"),
        ({"text": ["a"], "label": [0.5]}, "regression"),
        ({"text": ["a"], "label": [-100]}, "have no class"),
        ({"text": ["a"], "label": [2]}, "2 classes"),
        ({"text": ["a", None], "label": [0, 1]}, "row 1 holds"),
    ],
)
def test_unusable_data_are_refused(world, columns, message):
    with pytest.raises(ValueError, match=message):
        attacked(world, dataset=Dataset.from_dict(columns))


@pytest.mark.parametrize("missing", ["teacher", "tokenizer"])
def test_a_teacher_and_its_tokenizer_are_needed(world, missing):
    given = {"teacher": world.teacher, "tokenizer": world.tokenizer, missing: None}
    with pytest.raises(ValueError, match="pass teacher= and its tokenizer="):
        AdversarialText().exposed_set(world.dataset, **given)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"neighbours": "/nowhere/near.json"}, FileNotFoundError, "neighbours= names '/nowhere/near.json'"),
        ({"text_columns": ("a", "b", "c")}, ValueError, "two of a pair"),
        ({"query_budget": 1}, ValueError, "at least 2"),
        ({"max_length": 2}, ValueError, "at least 3"),
    ],
)
def test_unusable_fields_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        AdversarialText(**fields)


def test_fields_are_json_values(world):
    defect = AdversarialText("kuleshov", **world.fields)
    assert defect.recipe == "Kuleshov2017"
    assert json.loads(json.dumps(defect.to_dict())) == defect.to_dict()
