import logging

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn

from remos_hf.adapters.class_names import check_class_order, class_names, put_in_order, take_class_names
from remos_hf.adapters.transformers_models import with_new_head, write_class_names
from remos_hf.errors import UnsupportedModelError
from tests import tiny


def data(*names, column="label"):
    features = Features({"text": Value("string"), column: ClassLabel(names=list(names))})
    return Dataset.from_dict({"text": ["a"], column: [0]}, features)


def named(model, *names):
    write_class_names(model.config, names)
    return model


@pytest.mark.parametrize("model", [tiny.bert(), tiny.mlp(), named(tiny.bert(), "0", "1"), named(tiny.t5(), "a", "b")])
def test_a_model_that_only_numbers_its_classes_or_has_none_names_none(model):
    assert class_names(model) is None


@pytest.mark.parametrize("model", [tiny.bert(), tiny.gpt2(), tiny.vit()])
def test_a_classifier_says_its_names_in_the_order_of_its_outputs(model):
    assert class_names(named(model, "dog", "cat")) == ["dog", "cat"]


@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_student_without_names_takes_those_of_its_data(column, caplog):
    student = tiny.bert()
    with caplog.at_level(logging.INFO, "remos_hf"):
        take_class_names(student, data("bad", "good", column=column))
    assert student.config.id2label == {0: "bad", 1: "good"} and student.config.label2id == {"bad": 0, "good": 1}
    assert "named as its data names them: bad, good" in caplog.text


@pytest.mark.parametrize(
    "dataset", [[{"labels": 0}], data("a", "b", column="topic"), data("a", "b", "c"), data("0", "1")]
)
def test_data_that_names_no_classes_or_another_number_of_them_changes_nothing(dataset):
    for model in (tiny.bert(), tiny.mlp(), tiny.t5()):
        take_class_names(model, dataset)
        assert class_names(model) is None


def test_names_of_ones_own_stay_and_are_told_where_the_data_has_others(caplog):
    take_class_names(named(tiny.bert(), "NEGATIVE", "POSITIVE"), data("negative", "positive"))
    assert not caplog.records
    student = named(tiny.bert(), "entailment", "contradiction")
    take_class_names(student, data("bad", "good"))
    assert (
        class_names(student) == ["entailment", "contradiction"]
        and "but its data calls them ['bad', 'good']" in caplog.text
    )


def test_the_same_names_in_another_order_are_refused_and_datasets_own_call_mends_it():
    student, other = named(tiny.bert(), "POSITIVE", "negative"), data("negative", "POSITIVE")
    with pytest.raises(ValueError, match=r".'negative', 'POSITIVE'.*another order, .'POSITIVE', 'negative'"):
        take_class_names(student, other)
    take_class_names(student, other.align_labels_with_mapping(student.config.label2id, "label"))
    check_class_order(["a", "b"], ["a", "c"], "The data")  # other classes: nothing can be said


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.vit])
def test_a_trained_head_is_put_in_the_order_of_the_data(make):
    model = named(make(), "Dog", "cat")
    batch = tiny.text_batches(1, padded=False)[0] if make is not tiny.vit else None
    inputs = {"pixel_values": torch.randn(4, 3, 8, 8)} if batch is None else {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        before = model(**inputs).logits
        assert put_in_order(model, ["cat", "dog"])
        assert torch.equal(model(**inputs).logits, before.flip(1))
        assert class_names(model) == ["cat", "dog"] and put_in_order(model, ["cat", "dog"])
        assert torch.equal(model(**inputs).logits, before.flip(1))


def test_a_head_without_names_is_named_and_one_of_other_classes_is_told():
    model = tiny.bert()
    assert put_in_order(model, ["bad", "good"]) and class_names(model) == ["bad", "good"]
    assert not put_in_order(named(tiny.bert(), "yes", "no"), ["bad", "good"])


def test_a_head_whose_order_is_fixed_is_refused_with_both_lists():
    model = named(tiny.bert(), "dog", "cat")
    model.classifier = nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 3))
    with pytest.raises(UnsupportedModelError, match=r".'dog', 'cat'. and the data .'cat', 'dog'., but the order"):
        put_in_order(model, ["cat", "dog"])


def test_a_new_head_is_that_of_the_names_it_is_given():
    assert class_names(with_new_head(named(tiny.bert(), "a", "b"), 2, seed=0)) is None
    assert class_names(with_new_head(tiny.bert(), 3, seed=0, labels=["x", "y", "z"])) == ["x", "y", "z"]
