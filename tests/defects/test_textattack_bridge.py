import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from remos_hf.defects import textattack_bridge
from remos_hf.defects.base import ExposedSet
from remos_hf.defects.textattack_bridge import AdversarialText
from remos_hf.errors import RemosError

# Every attack starts processes that import TextAttack: seconds each, and more on a busy machine.
pytestmark = pytest.mark.timeout(400)

needs_textattack = pytest.mark.skipif(
    importlib.util.find_spec("textattack") is None,
    reason='TextAttack is not installed: pip install "remos_hf[textattack]" in an environment with transformers 4',
)

GOOD, BAD = ("good", "great"), ("bad", "awful")
NEAR = {"good": ["neat", "fine"], "great": ["neat"], "bad": ["mean"], "awful": ["mean", "fine"], "movie": ["film"]}
RARE = ("neat", "mean", "fine", "film")
PLAIN = ("the", "movie", "was", "a", "plot", "and", "so", "it", "ended")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *RARE, *PLAIN)


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def sentences():
    """Clear ones; the rare words stand in sentences of the other label, so that swapping them in fools."""
    rows = []
    for place, word in enumerate((*GOOD, *BAD) * 4):
        filler = " ".join(PLAIN[(place + step) % len(PLAIN)] for step in range(2 + place % 3))
        rows.append((f"the movie was {word} {filler}", int(word in GOOD)))
    return rows


def train(model, tokenizer):
    rows = [*sentences(), *[(f"the {word} was so", int(word == "mean")) for word in RARE[:2] * 6]]
    texts = [text for text, _ in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    pairs = tokenizer(["it ended"] * len(texts), texts, padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        model(**pairs, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, its data, and small files of every kind that a recipe may ask for."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("textattack")
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=2,
    )
    teacher = train(BertForSequenceClassification(config), tokenizer)
    (folder / "near.json").write_text(json.dumps(NEAR))
    rng = np.random.default_rng(0)
    shared = rng.normal(size=4)  # vectors of a direction: every swap is a small step
    np.savez(folder / "vectors.npz", words=np.array(WORDS[4:]), vectors=shared + 0.1 * rng.normal(size=(17, 4)))
    language_model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=24, bos_token_id=2, eos_token_id=3)
    )
    language_model.save_pretrained(folder / "lm")
    tokens = tiny_tokenizer()
    tokens.bos_token = "[CLS]"
    tokens.save_pretrained(folder / "lm")
    (folder / "stop.txt").write_text("the\nwas\na\nand\n")
    texts, labels = zip(*sentences(), strict=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["down", "up"]), "id": Value("int32")})
    dataset = Dataset.from_dict(
        {"text": texts, "label": labels, "id": [100 + n for n in range(len(texts))]}, features=features
    )
    fields = {
        "neighbours": str(folder / "near.json"),
        "word_vectors": str(folder / "vectors.npz"),
        "language_model": str(folder / "lm"),
        "stopwords": str(folder / "stop.txt"),
        "max_length": 24,
    }
    return SimpleNamespace(teacher=teacher, tokenizer=tokenizer, dataset=dataset, fields=fields, folder=folder)


def attacked(world, recipe="textfooler", dataset=None, cache=None, workers=1, **fields):
    defect = AdversarialText(recipe, **{**world.fields, **fields})
    dataset = world.dataset if dataset is None else dataset
    return defect.exposed_set(dataset, teacher=world.teacher, tokenizer=world.tokenizer, cache=cache, workers=workers)


def labels_of(world, texts):
    batch = world.tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        return world.teacher(**batch).logits.argmax(1).tolist()


@pytest.fixture(scope="module", params=["textfooler", "kuleshov"])
def made(request, world, tmp_path_factory):
    """An exposed set of each recipe, with the folder that it was kept in."""
    cache = tmp_path_factory.mktemp("cache")
    environment = dict(os.environ)
    exposed = attacked(world, request.param, cache=cache)
    return SimpleNamespace(
        recipe=request.param, exposed=exposed, cache=cache, same_environment=environment == dict(os.environ)
    )


def rows_of(exposed):
    return [dict(row) for row in exposed.dataset]


def timeless(facts):
    return {name: fact for name, fact in facts.items() if "seconds" not in name}


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
def test_facts_name_the_constraints_used_and_those_left_out(made):
    facts = made.exposed.facts
    used, left_out = " ".join(facts["constraints"]), " ".join(facts["constraints_left_out"])
    assert "RepeatModification" in used and "sha256" in used
    assert json.loads(json.dumps(facts)) == facts
    assert "near.json" in facts["replaced"]["counter-fitted neighbours"]
    if made.recipe == "textfooler":
        assert facts["recipe"] == "TextFoolerJin2019"
        assert {name.partition("(")[0] for name in facts["constraints_left_out"]} == {
            "PartOfSpeech",
            "UniversalSentenceEncoder",
            "WordEmbeddingDistance",
        }
        assert "min_cos_sim=0.5" in left_out and not any(name in used for name in ("PartOfSpeech", "Distance"))
    else:
        assert "4 words" in used and "max_percent=0.5" in used and "max_log_prob_diff=2.0" in used
        assert "LocalThoughtVector" in used and left_out == ""
        assert set(facts["replaced"]) == {"counter-fitted neighbours", "GPT2", "ThoughtVector"}
        assert "0.7" in facts["goal_function"]


@needs_textattack
def test_files_are_named_by_their_hash(world, made):
    told = made.exposed.facts["defect"]
    assert told["neighbours"]["name"] == "near.json" and len(told["neighbours"]["sha256"]) == 64
    assert str(world.folder) not in json.dumps(dict(made.exposed.facts))


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


@pytest.mark.slow
@needs_textattack
def test_a_recipe_that_draws_letters_draws_the_same_with_two_workers(world):
    one, two = (attacked(world, "DeepWordBugGao2018", workers=workers) for workers in (1, 2))
    assert len(one) > 0
    assert rows_of(one) == rows_of(two)


@needs_textattack
def test_a_cached_set_is_not_attacked_again(world, made, monkeypatch):
    monkeypatch.setattr(textattack_bridge, "_attack", lambda *_: pytest.fail("attacked again"))
    renamed = world.dataset.rename_column("id", "number")  # other columns come from the data at hand
    again = attacked(world, made.recipe, dataset=renamed, cache=made.cache, workers=2)
    assert rows_of(replace(again, dataset=again.dataset.rename_column("number", "id"))) == rows_of(made.exposed)
    assert again.facts == made.exposed.facts
    assert [path.name.partition("-")[0] for path in made.cache.iterdir()] == [made.exposed.facts["recipe"]]


@needs_textattack
def test_a_truncated_cached_set_is_announced_and_made_anew(world, made, tmp_path, caplog):
    if made.recipe == "kuleshov":
        pytest.skip("one recipe is enough")
    place = made.exposed.save(tmp_path / next(made.cache.iterdir()).name)
    table = next(place.glob("rows/*.arrow"))
    table.write_bytes(table.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        again = attacked(world, cache=tmp_path)
    assert "not whole" in caplog.text
    assert rows_of(again) == rows_of(made.exposed) == rows_of(ExposedSet.load(place))


def test_a_cached_folder_without_its_last_file_is_not_read(tmp_path, caplog):
    (tmp_path / "set" / "rows").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert ExposedSet.load_cached(tmp_path / "set") is None
    assert "not whole" in caplog.text and not (tmp_path / "set").exists()


def test_half_a_result_file_is_announced_and_not_read(tmp_path, caplog):
    (tmp_path / "rows-0-1.json").write_text('[{"row": 0}, {"row": 1}]')
    (tmp_path / "rows-2-3.json").write_text('[{"row": 2}, {"ro')
    (tmp_path / ".rows-4-5.json.17.tmp").write_text('[{"row": 4}]')
    with caplog.at_level(logging.WARNING):
        assert sorted(textattack_bridge._finished(tmp_path)) == [0, 1]
    assert "rows-2-3.json is not whole" in caplog.text


@needs_textattack
def test_results_that_another_run_cleared_away_are_missed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(textattack_bridge, "_attack", lambda *_: None)
    with pytest.raises(RemosError, match="lacks results of 16 samples"):
        attacked(world, cache=tmp_path)


KILLED = """
import sys
from datasets import load_from_disk
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from remos_hf.defects.textattack_bridge import AdversarialText
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
    finished = len(textattack_bridge._finished(partial))
    assert 0 < finished < len(long)

    exposed = attacked(world, dataset=long, cache=cache, workers=2)
    assert exposed.facts["num_resumed"] == finished
    whole = [row["text"] for row in exposed.dataset]
    assert len(whole) % 30 == 0 and whole == whole[: len(whole) // 30] * 30
    assert [path.name for path in cache.iterdir()] == [partial.name[1:].removesuffix(".partial")]


def wait_for(happened, seconds=90):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


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
def test_until_fooled_leaves_no_sample_half_way_and_the_budget_holds(world):
    exposed = attacked(world, "kuleshov", until_fooled=True, query_budget=5)
    assert exposed.facts["num_goal_without_fooling"] == 0
    assert "until the label changes" in exposed.facts["replaced"]["goal"]
    assert 1 < exposed.facts["mean_queries"] <= 5


@needs_textattack
def test_missing_stop_words_are_named_with_what_to_do(world, monkeypatch, tmp_path):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemosError, match="corpora/stopwords/english is not on this machine.*stopwords="):
        attacked(world, "kuleshov", stopwords=None)


@needs_textattack
def test_missing_word_vectors_are_named_with_what_to_do(world, monkeypatch, tmp_path):
    monkeypatch.setenv("TA_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there: offline, on every machine
    with pytest.raises(RemosError, match="word_embeddings/paragramcf.*textattack.s3.*neighbours="):
        attacked(world, neighbours=None, word_vectors=None, language_model=None)


@needs_textattack
def test_an_unknown_recipe_is_answered_with_the_known_ones(world):
    with pytest.raises(ValueError, match="no recipe 'TextFoolr', but .*DeepWordBugGao2018.*TextFoolerJin2019"):
        attacked(world, "TextFoolr")


@pytest.mark.slow
@needs_textattack
def test_a_constraint_to_keep_must_be_the_recipes(world):
    with pytest.raises(ValueError, match="keep= names 'Speech', but TextFoolerJin2019 has only .*PartOfSpeech"):
        attacked(world, keep="Speech")


@pytest.mark.slow
@needs_textattack
def test_a_kept_constraint_that_lacks_its_files_says_which(world, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemosError, match="needs nltk's 'averaged_perceptron_tagger_eng'"):
        attacked(world, keep=("PartOfSpeech",))


@needs_textattack
def test_what_fails_in_a_worker_names_the_sample_and_keeps_the_finished_ones(world, tmp_path):
    texts = [*world.dataset["text"], "it was so", "the plot ended awful"]
    (tmp_path / "near.json").write_text(json.dumps({**NEAR, "plot": [7]}))
    rows = Dataset.from_dict({"text": texts[:4] + texts[-1:], "label": [*world.dataset["label"][:4], 0]})
    with pytest.raises(RemosError, match=r"row 4 \('the plot ended awful'\): AttributeError"):
        attacked(world, dataset=rows, cache=tmp_path / "cache", neighbours=str(tmp_path / "near.json"))
    (partial,) = (tmp_path / "cache").glob(".*.partial")
    assert sorted(textattack_bridge._finished(partial)) == [0, 1, 2, 3]


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


def test_word_log_probabilities_are_those_of_a_plain_loop(world):
    model = GPT2LMHeadModel.from_pretrained(world.fields["language_model"]).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(world.fields["language_model"])
    pairs = [("the movie was ", "good"), ("the movie was ", "bad"), ("it ended and the plot ", "was"), (" 7 . ", "so")]
    expected = []
    for prefix, word in pairs[:3]:
        before = tokenizer(prefix)["input_ids"][:-1]  # [CLS] and the words, without [SEP]
        logits = model(torch.tensor([before])).logits[0, -1]
        expected.append(logits.log_softmax(-1)[WORDS.index(word)].item())
    got = textattack_bridge._log_probabilities(model, tokenizer, pairs, longest=24)
    assert got == pytest.approx([*expected, 0.0], abs=1e-5)
