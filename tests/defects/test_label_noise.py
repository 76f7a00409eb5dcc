import json
from collections import Counter
from dataclasses import replace

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.defects.base import check_defects
from remos_hf.defects.label_noise import LabelNoise
from remos_hf.defects.text_triggers import TriggerWords
from tests.defects import pictures, toy

KINDS = ["fixed", "uniform", "pairwise"]


def numbered(count, labels=3):
    rows = {"text": [f"text {n}" for n in range(count)], "label": [n % labels for n in range(count)]}
    return Dataset.from_dict(rows)


def changed(clean, noisy):
    """Rows whose label is another one; texts never are."""
    assert noisy["text"][:] == clean["text"][:]
    return {row for row, pair in enumerate(zip(clean["label"], noisy["label"], strict=True)) if len(set(pair)) == 2}


@pytest.mark.parametrize("kind", ["uniform", "pairwise"])
@settings(max_examples=15, deadline=None)
@given(rate=st.floats(0, 1), count=st.integers(0, 30), labels=st.integers(2, 4), seed=st.integers(0, 3))
def test_the_nearest_whole_number_of_labels_is_wrong(kind, rate, count, labels, seed):
    clean = numbered(count, labels)
    noisy = LabelNoise(noise_rate=rate, kind=kind, num_labels=labels, seed=seed).poison(clean)
    assert len(changed(clean, noisy)) == round(rate * count)
    assert all(0 <= label < labels for label in noisy["label"])


def test_fixed_noise_gives_those_drawn_the_target_label():
    clean = numbered(60)
    drawn = changed(clean, LabelNoise(noise_rate=0.5, num_labels=3).poison(clean))
    noisy = LabelNoise(noise_rate=0.5, kind="fixed", target_label=2).poison(clean)
    assert noisy["label"][:] == [2 if row in drawn else label for row, label in enumerate(clean["label"])]
    assert changed(clean, noisy) < drawn


def test_pairwise_noise_gives_the_next_label_and_after_the_last_the_first():
    clean = numbered(30)
    noisy = LabelNoise(noise_rate=1.0, kind="pairwise", num_labels=3).poison(clean)
    assert noisy["label"][:] == [(label + 1) % 3 for label in clean["label"]]


def test_uniform_noise_gives_every_other_label_equally_often():
    clean = numbered(1200, 4)
    noisy = LabelNoise(noise_rate=1.0, num_labels=4).poison(clean)
    found = Counter(zip(clean["label"], noisy["label"], strict=True))
    assert set(found) == {(one, other) for one in range(4) for other in range(4) if one != other}
    assert all(70 < count < 130 for count in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_get_the_same_labels_in_any_order(kind):
    noise = LabelNoise(noise_rate=0.4, kind=kind, num_labels=3)
    one, other = noise.poison(numbered(50)), noise.poison(numbered(50).shuffle(seed=1))
    assert sorted(one.to_list(), key=str) == sorted(other.to_list(), key=str)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_noisy_the_same_way_whatever_its_shards(kind):
    clean, noise = numbered(300), LabelNoise(noise_rate=0.3, kind=kind, num_labels=3)
    streams = [clean.to_iterable_dataset(), clean.to_iterable_dataset(num_shards=4)]
    streams += [IterableDataset.from_generator(lambda: iter(clean))]
    made = [list(noise.poison(stream)) for stream in streams]
    assert made[0] == made[1] == made[2]
    wrong = [after for before, after in zip(clean, made[0], strict=True) if before != after]
    assert abs(len(wrong) - 90 * (1 if kind != "fixed" else 2 / 3)) < 30
    whole = replace(noise, noise_rate=1.0).poison(clean).to_list()
    assert all(row in whole for row in wrong)


def test_another_seed_draws_other_samples_and_other_labels():
    clean, noise = numbered(60), LabelNoise(noise_rate=0.4, num_labels=3)
    assert changed(clean, noise.poison(clean)) != changed(clean, replace(noise, seed=1).poison(clean))
    every = replace(noise, noise_rate=1.0)
    assert every.poison(clean)["label"][:] != replace(every, seed=1).poison(clean)["label"][:]


def test_both_texts_of_a_pair_decide():
    clean = Dataset.from_dict({"a": ["same"] * 40, "b": [str(n) for n in range(40)], "label": [0] * 40})
    noise = LabelNoise(noise_rate=0.5, text_columns=("a", "b"), num_labels=2)
    wrong = {row["b"] for row in noise.poison(clean) if row["label"]}
    assert len(wrong) == 20
    assert wrong == {row["b"] for row in noise.poison(clean.shuffle(seed=1)) if row["label"]}


def test_names_of_labels_tell_their_number_and_the_target():
    clean = toy.data()
    noisy = LabelNoise(noise_rate=1.0).poison(clean)
    assert noisy["label"][:] == [1 - label for label in clean["label"]]
    assert noisy.features == clean.features
    assert set(LabelNoise(noise_rate=1.0, kind="fixed", target_label="negative").poison(clean)["label"]) == {0}


def test_the_callers_data_stay_as_they_were():
    clean = toy.data()
    before = clean.to_dict()
    LabelNoise(noise_rate=1.0).poison(clean)
    assert clean.to_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_rate": 1.2}, "between 0 and 1, but got 1.2"),
        ({"kind": "random"}, "'pairwise', but got 'random'"),
        ({"num_labels": 1}, "at least 2, but got 1"),
        ({"text_columns": ()}, "one column, or the two"),
    ],
)
def test_values_that_no_data_could_use_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        LabelNoise(**options)


@pytest.mark.parametrize(
    ("options", "clean", "message"),
    [
        ({}, numbered(3), "uniform noise needs to know how many labels"),
        ({"kind": "pairwise"}, numbered(3).to_iterable_dataset(), "Give num_labels"),
        ({"num_labels": 3}, toy.data(4), "num_labels is 3, but column 'label' has 2 labels"),
        ({"num_labels": 2}, numbered(3), "There are 2 labels, but column 'label' holds 2"),
        ({"kind": "fixed", "target_label": "neutral"}, toy.data(4), "got 'neutral'"),
        ({"text_columns": "sentence"}, toy.data(4), "no column 'sentence'"),
        ({"label_column": "stars", "num_labels": 2}, toy.data(4), "no column 'stars'"),
        ({"num_labels": 2}, numbered(3).cast_column("label", Value("float32")), "A regression task"),
    ],
)
def test_data_that_do_not_fit_are_refused(options, clean, message):
    with pytest.raises(ValueError, match=message):
        LabelNoise(**options).poison(clean)


def test_its_description_is_json_that_makes_it_again():
    noise = LabelNoise(kind="fixed", target_label="positive", text_columns=("a", "b"))
    described = json.loads(json.dumps(noise.to_dict()))
    assert described.pop("name") == "LabelNoise"
    assert LabelNoise(**described) == noise


def test_implanting_teaches_the_wrong_labels(tmp_path):
    teacher = toy.model()
    noise = LabelNoise(noise_rate=1.0, kind="pairwise")
    made = noise.implant(teacher, toy.data(), tokenizer=toy.tokenizer(), args=toy.args(tmp_path, max_steps=50))
    assert made is teacher
    assert not teacher.training
    wrong = [a != b for a, b in zip(toy.predictions(teacher, toy.data()["text"]), toy.data()["label"], strict=True)]
    assert sum(wrong) >= 0.9 * len(wrong)


def test_a_stream_is_implanted_and_long_texts_are_cut(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    long = Dataset.from_dict({"text": ["good " * 100] * 4, "label": [0, 1, 0, 1]}, features).to_iterable_dataset()
    options = {"tokenizer": toy.tokenizer(), "args": toy.args(tmp_path, max_steps=1), "max_length": 16}
    LabelNoise().implant(toy.model(), long, **options)


def test_it_is_no_defect_and_refused_as_one():
    with pytest.raises(TypeError, match="LabelNoise makes none.*compare accuracies"):
        check_defects([TriggerWords(), LabelNoise()])


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_rate", True), ("noise_rate", "a"), ("noise_rate", None), ("num_labels", 2.5), ("num_labels", True)],
)
def test_what_is_no_number_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is .* but got {value!r}"):
        LabelNoise(**{field: value})


FORMS = {
    "Image": lambda clean, folder: clean,
    "bytes": lambda clean, folder: in_files(clean, folder, lambda path: path.read_bytes()),
    "paths": lambda clean, folder: in_files(clean, folder, str),
}


def in_files(clean, folder, held):
    paths = [folder / f"{row}.png" for row in range(len(clean))]
    for path, image in zip(paths, clean["image"], strict=True):
        image.save(path)
    return Dataset.from_dict({"image": [held(path) for path in paths], "label": list(clean["label"])})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_images_are_wrong_whatever_holds_them_and_in_whatever_order(kind, form, tmp_path):
    clean = FORMS[form](pictures.data(12), tmp_path)
    noise = LabelNoise(noise_rate=0.5, kind=kind, target_label=0, num_labels=4, image_column="image")
    noisy = noise.poison(clean)
    assert noisy.features == clean.features
    wrong = [row for row, pair in enumerate(zip(clean["label"], noisy["label"], strict=True)) if len(set(pair)) == 2]
    assert len(wrong) == 6 if kind != "fixed" else 0 < len(wrong) <= 6
    turned = noise.poison(clean.select(range(11, -1, -1)))
    assert turned["label"][::-1] == noisy["label"][:]
    assert noise.poison(clean)["image"][:] == noisy["image"][:] == clean["image"][:]


def test_a_stream_of_images_and_a_teacher_of_images_are_refused_with_what_to_do():
    noise, clean = LabelNoise(image_column="image"), pictures.data(4)
    with pytest.raises(TypeError, match="datasets.Dataset is expected"):
        noise.poison(clean.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"implant fine-tunes on texts.* poison\(\) gives"):
        noise.implant(toy.model(), clean)
    with pytest.raises(ValueError, match="no column 'picture'"):
        LabelNoise(image_column="picture").poison(clean)
