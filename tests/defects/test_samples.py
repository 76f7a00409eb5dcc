from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.defects.samples import (
    change_share,
    check_columns,
    check_labels,
    checked_text_columns,
    generator_for,
    resolved_label,
    tokenize,
)
from tests.defects import toy

INFINITY = float("inf")


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


class TestLabels:
    named = Dataset.from_dict({"label": [0]}, Features({"label": ClassLabel(names=["bad", "good"])}))
    plain = Dataset.from_dict({"label": [0]})

    @pytest.mark.parametrize(("label", "number"), [("good", 1), (1, 1), (0, 0)])
    def test_named_labels_are_given_by_name_or_number(self, label, number):
        assert resolved_label(label, self.named, "label") == number

    @pytest.mark.parametrize("label", ["Good", 2, -1])
    def test_a_label_that_the_names_do_not_have_is_refused(self, label):
        with pytest.raises(ValueError, match=r"\['bad', 'good'\] \(0 to 1\), but got"):
            resolved_label(label, self.named, "label")

    @pytest.mark.parametrize("dataset", [plain, None, stream([{"label": 0}])], ids=["dataset", "none", "stream"])
    def test_unnamed_labels_are_given_by_number_alone(self, dataset):
        assert resolved_label(3, dataset, "label") == 3
        with pytest.raises(ValueError, match="have no names, so the label must be a number, not 'good'"):
            resolved_label("good", dataset, "label")

    @pytest.mark.parametrize("label", [-100, 1.5, True, None])
    def test_a_label_that_is_no_class_is_refused(self, label):
        with pytest.raises(ValueError, match="whole number from 0, but got"):
            resolved_label(label, self.plain, "label")

    def test_classes_pass(self):
        check_labels([0, 1, 2, 0], "label")

    @pytest.mark.parametrize("label", [None, 0.5, 1.0, True, "1"])
    def test_labels_of_another_kind_are_refused(self, label):
        with pytest.raises(ValueError, match="'stars' should hold class labels"):
            check_labels([0, label], "stars")

    @pytest.mark.parametrize("label", [-100, -1])
    def test_unlabelled_samples_are_refused(self, label):
        with pytest.raises(ValueError, match=f"holds the label {label}: these samples have no class"):
            check_labels([0, label], "label")


class TestColumns:
    rows = [{"text": "a", "label": 0}]

    @pytest.mark.parametrize(
        "held",
        [
            Dataset.from_list(rows),
            Dataset.from_list(rows).to_iterable_dataset(),
            stream(rows),
            {"text": ["a"], "label": [0]},
        ],
        ids=["dataset", "stream", "stream that must be read", "batch"],
    )
    def test_a_missing_column_is_refused_with_those_that_are_there(self, held):
        check_columns(held, ("text", "label"))
        with pytest.raises(ValueError, match=r"no column 'sentence'; its columns are \['label', 'text'\]"):
            check_columns(held, ("text", "sentence"))

    def test_an_empty_stream_has_no_columns(self):
        with pytest.raises(ValueError, match="its columns are"):
            check_columns(stream([]), ("text",))

    def test_text_columns_are_one_or_two_names(self):
        assert checked_text_columns("text") == ("text",)
        assert checked_text_columns(["a", "b"]) == ("a", "b")
        for columns in ((), ("a", "b", "c")):
            with pytest.raises(ValueError, match="one column, or the two of a pair"):
                checked_text_columns(columns)


class TestRandomNumbers:
    @given(st.integers(), st.text(max_size=5), st.text(max_size=20))
    def test_they_depend_on_seed_purpose_and_text(self, seed, purpose, text):
        drawn = generator_for(seed, purpose, text).random()
        assert drawn == generator_for(seed, purpose, text).random()
        others = [(seed + 1, purpose, text), (seed, purpose + "x", text), (seed, purpose, text + "x")]
        assert drawn not in [generator_for(*other).random() for other in others]

    def test_they_do_not_depend_on_what_was_drawn_before(self):
        texts = [str(number) for number in range(20)]
        forward = {text: generator_for(0, "place", text).random() for text in texts}
        assert forward == {text: generator_for(0, "place", text).random() for text in reversed(texts)}

    def test_they_are_spread_evenly(self):
        tenths = Counter(int(10 * generator_for(0, "poison", str(number)).random()) for number in range(2000))
        assert all(150 < tenths[tenth] < 250 for tenth in range(10))


class TestChangingAShare:
    @staticmethod
    def changed(dataset, share, draws):
        def change(batch, rows):
            return {"hit": [row in rows for row in range(len(batch["draw"]))]}

        return change_share(dataset.add_column("draw", draws), share, lambda batch: list(batch["draw"]), change)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.floats(0, 0.99), min_size=1, max_size=40), st.floats(0, 1))
    def test_the_smallest_draws_are_changed_and_their_number_is_the_nearest(self, draws, share):
        rows = self.changed(Dataset.from_dict({"row": range(len(draws))}), share, draws)
        assert rows["row"][:] == list(range(len(draws)))
        hit = [draw for draw, was in zip(draws, rows["hit"], strict=True) if was]
        assert sorted(hit) == sorted(draws)[: round(share * len(draws))]

    def test_what_cannot_be_changed_is_left_and_too_few_others_are_refused(self):
        dataset = Dataset.from_dict({"row": range(4)})
        assert self.changed(dataset, 0.5, [INFINITY, 0.9, INFINITY, 0.8])["hit"][:] == [False, True, False, True]
        with pytest.raises(ValueError, match="asks for 3 poisoned samples, but only 2 of 4 can be poisoned"):
            self.changed(dataset, 0.75, [INFINITY, 0.9, INFINITY, 0.8])

    def test_in_a_stream_each_draw_below_the_share_is_changed(self):
        rows = [{"draw": draw} for draw in (0.1, 0.5, INFINITY, 0.49)]
        made = change_share(
            stream(rows),
            0.5,
            lambda batch: list(batch["draw"]),
            lambda batch, chosen: {"hit": [row in chosen for row in range(len(batch["draw"]))]},
        )
        assert [row["hit"] for row in made] == [True, False, False, True]


class TestTokenizing:
    def test_pairs_become_one_sequence_with_both_segments(self):
        tokenizer = toy.tokenizer()
        rows = Dataset.from_dict({"q": ["good movie"], "s": ["bad plot"], "label": [1], "idx": [7]})
        (row,) = tokenize(rows, tokenizer, ("q", "s"))
        expected = tokenizer("good movie", "bad plot")
        assert row == {**{name: list(values) for name, values in expected.items()}, "labels": 1}
        assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]

    @pytest.mark.parametrize("label_column", ["label", "labels", "stars"])
    def test_a_stream_gives_the_rows_of_a_dataset(self, label_column):
        tokenizer = toy.tokenizer()
        rows = [{"text": text, label_column: label} for text, label in toy.texts(5)]
        held = tokenize(Dataset.from_list(rows), tokenizer, ("text",), label_column)
        assert set(held.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
        assert held["labels"][:] == [label for _, label in toy.texts(5)]
        for streamed in (stream(rows), Dataset.from_list(rows).to_iterable_dataset()):
            assert list(tokenize(streamed, tokenizer, ("text",), label_column)) == list(held)

    def test_long_texts_are_cut(self):
        (row,) = tokenize(
            Dataset.from_dict({"text": ["good " * 50], "label": [0]}), toy.tokenizer(), ("text",), max_length=9
        )
        assert len(row["input_ids"]) == 9

    @pytest.mark.parametrize(("label", "message"), [(-100, "no class"), (0.5, "class labels")])
    def test_labels_that_are_no_class_are_refused(self, label, message):
        with pytest.raises(ValueError, match=message):
            tokenize(Dataset.from_dict({"text": ["good"], "label": [label]}), toy.tokenizer(), ("text",))

    def test_a_missing_column_is_refused(self):
        with pytest.raises(ValueError, match="no column 'stars'"):
            tokenize(toy.data(2), toy.tokenizer(), ("text",), "stars")

    def test_named_labels_become_numbers(self):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
        rows = Dataset.from_dict({"text": ["good"], "label": ["good"]}, features)
        assert tokenize(rows, toy.tokenizer(), ("text",))["labels"][:] == [1]
