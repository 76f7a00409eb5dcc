import datasets
import pytest
import torch

from remos_hf.defects.text_triggers import TextTrigger, TriggerWords
from remos_hf.evaluation import tasks
from remos_hf.evaluation.tasks import TextTask, without_map_bars
from tests.defects import toy

DATA = toy.data(12)
WORD = TriggerWords(words=("cf",))


def task(**options):
    return TextTask(toy.tokenizer(), **{"batch_size": 5, **options})


def test_batches_hold_each_row_once_with_its_own_text():
    reader = task()
    seen = {}
    for rows, batch in reader.batches(DATA):
        assert "labels" not in batch and len(rows) <= 5
        for row, ids, real in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            seen[int(row)] = ids[real.bool()].tolist()
    assert seen == dict(enumerate(reader.tokenizer(list(DATA["text"]))["input_ids"]))


def test_defects_are_given_the_tokenizer_and_the_length():
    reader = task(max_length=7)
    assert reader.exposing == reader.implanting == {"tokenizer": reader.tokenizer, "max_length": 7}


def test_only_what_decides_numbers_is_named():
    named = task(max_length=9, bf16=True, text_columns=("a", "b"), label_column="y").to_dict()
    assert named == {"text_columns": ["a", "b"], "label_column": "y", "max_length": 9, "bf16": True}


def test_poisoned_samples_come_last_with_trigger_and_target_and_the_rest_stays():
    mixed = task().with_trigger(DATA, WORD, [3, 1], 1)
    clean = [row for row in range(len(DATA)) if row not in (1, 3)]
    assert mixed["text"][: len(clean)] == [DATA["text"][row] for row in clean]
    assert mixed["text"][len(clean) :] == [WORD.triggered(DATA["text"][row]) for row in (3, 1)]
    assert mixed["label"][:] == [*(DATA["label"][row] for row in clean), 1, 1]
    assert mixed.features == DATA.features


@pytest.mark.parametrize("poisoned", [(), (2,)])
def test_training_sees_the_tokenized_samples(monkeypatch, poisoned):
    seen = {}

    def fine_tune(model, tokenized, tokenizer, args):
        seen.update(rows=tokenized["input_ids"][:], labels=tokenized["labels"][:], args=args)
        return model

    monkeypatch.setattr(tasks, "fine_tune", fine_tune)
    reader, model = task(), torch.nn.Linear(1, 1)
    assert reader.train(model, DATA, "args", trigger=WORD, poisoned=poisoned, target_label=1) is model
    expected = reader.with_trigger(DATA, WORD, poisoned, 1) if poisoned else DATA
    assert seen["rows"] == reader.tokenizer(expected["text"][:])["input_ids"]
    assert seen["labels"] == expected["label"][:] and seen["args"] == "args"


def test_keys_tell_texts_apart_and_able_asks_the_trigger():
    class Picky(TextTrigger):
        def triggered(self, text, *, exposing=False):
            return None if "great" in text or not exposing else f"{text} cf"

    assert task().keys(DATA) == DATA["text"][:]
    assert task().able(Picky(), DATA) == ["great" not in text for text in DATA["text"]]
    assert task(max_length=3).able(Picky(), DATA) == [False] * len(DATA)


@pytest.mark.parametrize("shown", [True, False])
def test_bars_are_as_they_were_afterwards(shown):
    was = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        with pytest.raises(RuntimeError), without_map_bars():
            assert datasets.are_progress_bars_disabled()
            raise RuntimeError
        assert datasets.are_progress_bars_disabled() != shown
    finally:
        (datasets.disable_progress_bars if was else datasets.enable_progress_bars)()
