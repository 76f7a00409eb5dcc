import warnings

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from remos_hf.auditing.labels import (
    by_name,
    check_class_numbers,
    classes_of,
    count_labels,
    label_names,
    labels_of,
)


def named(names, labels):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": [names[label] for label in labels], "label": labels}, features)


def numbered(*labels):
    return Dataset.from_dict({"text": [str(label) for label in labels], "label": list(labels)})


@pytest.mark.parametrize("values", [[1, 0, 2], ["1", "0", "2"], [" 1", "0 ", "+2"]])
def test_whole_numbers_are_labels_however_they_are_written(values):
    assert labels_of("d", values, "label") == ([1, 0, 2], ["0", "1", "2"])


@pytest.mark.parametrize(
    ("values", "names"),
    [([2, 1, 2], ["1", "2"]), (["99213", "0", "99213"], ["0", "99213"]), ([10, 9, 10], ["9", "10"])],
)
def test_numbers_that_are_codes_are_names_of_classes(values, names):
    assert labels_of("d", values, "label") == ([1, 0, 1], names)


@pytest.mark.parametrize("other", ["Good", "good ", " good", "go\tod"])
def test_names_that_differ_in_capitals_or_spaces_alone_are_refused(other):
    with pytest.raises(ValueError, match="^d: the labels .* in column 'label' differ in nothing but capitals or"):
        labels_of("d", ["go od" if "\t" in other else "good", "bad", other], "label")


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
        (["0", "9" * 5000], "sample 1 has '9+'"),
        ([0, -1], "labels are 0 or more, but one is -1 .*sample 1"),
        ([3 * number for number in range(200)], "200 different values in 200 samples.*no labels"),
        ([f"a text {number}" for number in range(200)], "200 different values in 200 samples.*no labels"),
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


def test_numbers_that_became_names_are_told():
    with pytest.warns(UserWarning, match="The labels of train.csv are 1, 2, not 0 to 1: .* names of 2 classes"):
        assert count_labels(named(["1", "2"], [1, 0]), "train.csv") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_labels(named(["0", "1"], [1, 0])) == 2
    assert label_names(named(["1", "2"], [0])) == ["1", "2"] and label_names(named(["0", "1"], [0])) is None


def test_labels_of_a_column_that_names_its_classes_are_checked():
    assert check_class_numbers("d", [1, 0], "label") == [1, 0]
    with pytest.raises(ValueError, match="d: sample 1 has the label -1, which no class has, in column 'gold'"):
        check_class_numbers("d", [0, -1], "gold")
    with pytest.raises(ValueError, match="d: sample 0 has no label in column 'gold'"):
        check_class_numbers("d", [None, 1], "gold")


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
    with pytest.raises(ValueError, match="test has the class 'zebra', which train has not .it has cat, dog., so no"):
        by_name(named(["cat", "zebra"], [0, 1]), "test", train, "train")
    assert by_name(named(["zebra", "dog"], [1, 1]), "test", train, "train")["label"][:] == [1, 1]
    with pytest.raises(ValueError, match="test has the class '2', which train has not .it has 0, 1.:?"):
        by_name(numbered(0, 2), "test", numbered(0, 1), "train")
    with pytest.raises(ValueError, match="test has the label '2', but the classes of train are cat, dog"):
        by_name(numbered(0, 2), "test", train, "train")
    with pytest.raises(ValueError, match="test has the class 'Dog', .* no student could learn it. Is it 'dog'?"):
        by_name(named(["Dog"], [0]), "test", train, "train")


def test_names_beside_numbers_are_matched_by_number_and_told():
    train = named(["cat", "dog"], [0, 1])
    with pytest.warns(UserWarning, match="one names its labels .cat, dog. and the other numbers them"):
        found = by_name(numbered(1, 0), "test", train, "train")
    assert found["label"][:] == [1, 0] and label_names(found) == ["cat", "dog"]
    with pytest.warns(UserWarning, match="matched by number"):
        assert label_names(by_name(train, "test", numbered(0, 1), "train")) is None


def test_codes_are_matched_by_what_the_file_says_not_by_their_place():
    train = named(["0", "1", "2"], [0, 1, 2])
    found = by_name(named(["1", "2"], [0, 1]), "test", train, "train")  # a file of labels 1 and 2
    assert found["label"][:] == [1, 2] and classes_of(found) == ["0", "1", "2"]
    assert by_name(numbered(1, 2), "test", train, "train")["label"][:] == [1, 2]
    assert by_name(named(["0", "2"], [0, 1]), "test", numbered(0, 1, 2), "train")["label"][:] == [0, 2]
    with pytest.raises(ValueError, match="test has the class '0', which train has not"):
        by_name(numbered(0, 1), "test", named(["1", "2"], [0, 1]), "train")
    with pytest.raises(ValueError, match="test has the label '2', but the classes of train are cat, dog"):
        by_name(named(["1", "2"], [0, 1]), "test", named(["cat", "dog"], [0, 1]), "train")


def test_the_classes_of_a_model_decide_as_those_of_data_do():
    found = by_name(named(["cat", "dog"], [0, 1]), "test", ["dog", "cat", "owl"], "the student")
    assert found["label"][:] == [1, 0] and classes_of(found) == ["dog", "cat", "owl"]


def test_an_attacker_may_know_more_classes_which_come_last():
    train = named(["cat", "dog"], [0, 1])
    found = by_name(named(["ant", "dog"], [0, 1]), "attacker", train, "train", other_task=True)
    assert found["label"][:] == [2, 1] and classes_of(found) == ["cat", "dog", "ant"]
    with pytest.raises(ValueError, match="attacker has the class 'ant', .* so they have no class in common"):
        by_name(named(["ant", "bee"], [0, 1]), "attacker", train, "train", other_task=True)


def test_the_column_of_the_labels_may_be_called_otherwise():
    test, train = (named(names, [0, 1]).rename_column("label", "gold") for names in (["b", "a"], ["a", "b"]))
    assert by_name(test, "test", train, "train", column="gold")["gold"][:] == [1, 0]


def test_numbers_of_another_task_stay_but_names_are_matched():
    train = named(["cat", "dog"], [0, 1])
    assert by_name(numbered(0, 7), "attacker", train, "train", other_task=True)["label"][:] == [0, 7]
    found = by_name(named(["dog", "cat"], [0, 1]), "attacker", train, "train", other_task=True)
    assert found["label"][:] == [1, 0]
