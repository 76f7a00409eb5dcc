import warnings

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from remos_hf.auditing.labels import by_name, count_labels, label_names, labels_of


def named(names, labels):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": [names[label] for label in labels], "label": labels}, features)


def numbered(*labels):
    return Dataset.from_dict({"text": [str(label) for label in labels], "label": list(labels)})


@pytest.mark.parametrize("values", [[1, 0, 2], ["1", "0", "2"], [" 1", "0 ", "+2"]])
def test_whole_numbers_are_labels_however_they_are_written(values):
    assert labels_of("d", values, "label") == ([1, 0, 2], None)


def test_names_are_numbered_in_their_order():
    assert labels_of("d", ["so so", "bad", "good", "bad"], "label") == ([2, 0, 1, 0], ["bad", "good", "so so"])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["1", "1_0"], "sample 1 has '1_0'"),
        (["1.0", "0.0"], "sample 0 has '1.0'"),
        ([1.0, 0.0], "sample 0 has 1.0"),
        ([True, False], "sample 0 has True"),
        ([None, 1], "sample 0 has None"),
        (["", "1"], "sample 0 has ''"),
        (["", "good"], "sample 0 has ''"),
        (["nan", "good"], "sample 0 has 'nan'"),
        (["1", "good"], "sample 1 has 'good'"),
        (["\u0661", "0"], "sample 0 has '\u0661'"),
        (["0", "9" * 20], "one is 9+, in column 'label'"),
        ([0, -1], "labels are 0 or more, but one is -1 .*sample 1"),
        ([f"a text {number}" for number in range(200)], "200 different texts in 200 samples.*no labels"),
    ],
)
def test_what_is_neither_a_number_nor_a_name_is_refused(values, told):
    with pytest.raises(ValueError, match=f"^d: .*{told}"):
        labels_of("d", values, "label")


def test_labels_are_counted_by_their_names_or_their_numbers():
    assert count_labels(named(["a", "b", "c"], [0, 1])) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_labels(numbered(0, 1, 1)) == 2 and count_labels(numbered(0, 0)) == 1


@pytest.mark.parametrize("code", [99_213, 730_000_000, 4])
def test_codes_are_refused_before_a_head_is_made_for_them(code):
    with pytest.raises(
        ValueError, match=rf"train.csv has 2 different labels, but they go up to {code:,}: they are codes"
    ):
        count_labels(numbered(0, code), "train.csv")


def test_a_number_that_no_sample_has_is_told():
    with pytest.warns(UserWarning, match=r"tell 3 labels apart, but no sample has label 0"):
        assert count_labels(numbered(1, 2, 1)) == 3


def test_a_class_that_a_split_lacks_keeps_its_number():
    train = named(["cat", "dog", "horse"], [0, 1, 2])
    found = by_name(named(["cat", "horse"], [1, 0, 1]), "test", train, "train")
    assert found["label"][:] == [2, 0, 2] and found["text"][:] == ["horse", "cat", "horse"]
    assert label_names(found) == ["cat", "dog", "horse"]


def test_names_in_another_order_have_the_same_numbers():
    found = by_name(named(["dog", "cat"], [0, 1]), "test", named(["cat", "dog"], [0, 1]), "train")
    assert found["label"][:] == [1, 0] and found["text"][:] == ["dog", "cat"]


def test_classes_that_were_never_trained_are_refused_but_not_names_that_no_sample_has():
    train = named(["cat", "dog"], [0, 1])
    with pytest.raises(ValueError, match="test has the class 'zebra', which train has not .it has cat, dog.:"):
        by_name(named(["cat", "zebra"], [0, 1]), "test", train, "train")
    assert by_name(named(["zebra", "dog"], [1, 1]), "test", train, "train")["label"][:] == [1, 1]
    with pytest.raises(ValueError, match="test has the label 2, but train ends at 1"):
        by_name(numbered(0, 2), "test", numbered(0, 1), "train")
    with pytest.raises(ValueError, match="test has the label 2, but train ends at 1"):
        by_name(numbered(0, 2), "test", train, "train")


def test_names_beside_numbers_are_matched_by_number_and_told():
    train = named(["cat", "dog"], [0, 1])
    with pytest.warns(UserWarning, match="one names its labels .cat, dog. and the other numbers them"):
        found = by_name(numbered(1, 0), "test", train, "train")
    assert found["label"][:] == [1, 0] and label_names(found) == ["cat", "dog"]
    with pytest.warns(UserWarning, match="matched by number"):
        assert label_names(by_name(train, "test", numbered(0, 1), "train")) is None


def test_numbers_of_another_task_stay_but_names_are_matched():
    train = named(["cat", "dog"], [0, 1])
    assert by_name(numbered(0, 7), "attacker", train, "train", other_task=True)["label"][:] == [0, 7]
    found = by_name(named(["dog", "cat"], [0, 1]), "attacker", train, "train", other_task=True)
    assert found["label"][:] == [1, 0]
