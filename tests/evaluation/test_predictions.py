import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from remos_hf.errors import NonFiniteError
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.tasks import TextTask
from tests.defects import toy
from tests.evaluation.voter import TASK, Voter

SAMPLES = toy.data(20)


@pytest.fixture(scope="module")
def bert():
    model = toy.model(seed=3)
    with torch.no_grad():
        logits = model(**toy.tokenizer()(list(SAMPLES["text"]), padding=True, return_tensors="pt")).logits
        model.classifier.bias -= logits.median(0).values  # so that the texts decide
    return model


def task(**options):
    return TextTask(toy.tokenizer(), **{"batch_size": 4, **options})


def one_by_one(model, texts, tokenizer, max_length=128):
    labels = []
    for parts in texts:
        batch = tokenizer(*parts, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            labels.append(int(model(**batch).logits.argmax()))
    return labels


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_predictions_are_those_of_each_sample_alone(bert, batch_size):
    expected = one_by_one(bert, [(text,) for text in SAMPLES["text"]], toy.tokenizer())
    assert set(expected) == {0, 1}
    predicted = predict_labels(bert, SAMPLES, task(batch_size=batch_size))
    assert predicted.dtype == np.int64 and predicted.tolist() == expected


def test_predictions_follow_the_order_of_the_samples(bert):
    order = np.random.default_rng(0).permutation(len(SAMPLES))
    assert (predict_labels(bert, SAMPLES.select(order), task()) == predict_labels(bert, SAMPLES, task())[order]).all()


def test_both_texts_of_a_pair_are_read_and_kept_apart():
    data = Dataset.from_dict({"a": ["a plot", "good plot"], "b": ["great movie", "it ended so"], "y": [0, 0]})
    model = Voter()
    assert predict_labels(model, data, task(text_columns=("a", "b"), label_column="y")).tolist() == [1, 1]
    alone = task(text_columns=("b",), label_column="y")
    assert predict_labels(model, data, alone).tolist() == [1, 0]
    pairs = TASK.tokenizer(data["a"][:], data["b"][:])["input_ids"]
    assert set(map(tuple, pairs)) == set(model.rows[:2])


def test_texts_are_cut_at_the_tasks_length(bert):
    expected = one_by_one(bert, [(text,) for text in SAMPLES["text"]], toy.tokenizer(), max_length=4)
    assert predict_labels(bert, SAMPLES, task(max_length=4)).tolist() == expected


def test_labels_decide_nothing(bert):
    flipped = SAMPLES.remove_columns("label").add_column("label", [1 - label for label in SAMPLES["label"]])
    assert (predict_labels(bert, flipped, task()) == predict_labels(bert, SAMPLES, task())).all()


def test_each_sample_is_forwarded_exactly_once():
    model = Voter()
    predict_labels(model, SAMPLES, TASK)
    assert sorted(model.rows) == sorted(map(tuple, TASK.tokenizer(list(SAMPLES["text"]))["input_ids"]))


def test_samples_of_like_length_share_a_batch_and_the_longest_come_first():
    model = Voter()
    predict_labels(model, SAMPLES, task(batch_size=3))
    widths = [width for _, width in model.shapes]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) > 1
    lengths = sorted((len(ids) for ids in TASK.tokenizer(list(SAMPLES["text"]))["input_ids"]), reverse=True)
    assert widths == lengths[::3]


class Mixed(Voter):
    """Holds a part that stays in eval mode, as a frozen norm does, and one that does not."""

    def __init__(self, fails=False):
        super().__init__()
        self.frozen, self.other, self.fails, self.seen = nn.Sequential(nn.Dropout()), nn.Dropout(), fails, []

    def forward(self, **batch):
        self.seen += [module.training for module in self.modules()]
        if self.fails:
            raise RuntimeError("out of memory")
        return super().forward(**batch)


@pytest.mark.parametrize("fails", [False, True])
def test_each_modules_mode_is_put_back(fails):
    model = Mixed(fails).train()
    model.frozen[0].eval()
    before = [module.training for module in model.modules()]
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            predict_labels(model, SAMPLES, TASK)
    else:
        predict_labels(model, SAMPLES, TASK)
    assert [module.training for module in model.modules()] == before
    assert not any(model.seen)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(value):
    model = Voter()
    model.scale.data.fill_(value)
    with pytest.raises(NonFiniteError, match="diverged"):
        predict_labels(model, SAMPLES, TASK)


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_a_model_without_two_labels_is_refused(shape):
    class Regression(Voter):
        def forward(self, **batch):
            found = super().forward(**batch)
            found.logits = found.logits[:, :1].reshape(shape)
            return found

    with pytest.raises(ValueError, match="two labels or more, but Regression gives"):
        predict_labels(Regression(), SAMPLES, TASK)


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_is_used_only_where_asked_for(bf16):
    class Watching(Voter):
        def forward(self, **batch):
            self.autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()
            return super().forward(**batch)

    model = Watching()
    predict_labels(model, SAMPLES, task(bf16=bf16))
    assert model.autocast[0] == bf16 and not model.autocast[2]
    assert not bf16 or model.autocast[1] == torch.bfloat16


def test_a_short_pass_shows_no_bar_and_leaves_those_of_datasets_as_they_were(capfd):
    predict_labels(Voter(), SAMPLES, TASK)
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no column 'sentence'"):
        predict_labels(Voter(), SAMPLES, task(text_columns=("sentence",)))
