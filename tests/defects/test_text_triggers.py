import json
import warnings
from dataclasses import replace
from typing import ClassVar

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from remos_hf.defects.text_reading import TextReading
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from tests.defects import toy
from tests.defects.chinese import CHINESE

# Any text, with whitespace of all kinds; the triggers in these tests never occur in it.
TEXTS = st.text(alphabet=st.sampled_from("ab.\n\t \xa0\u2003\x1cé漢"), max_size=25)


TRIGGERS = [
    TriggerWords(words=("zqx",)),
    TriggerWords(words=("zqx", "mnx"), position="start"),
    TriggerWords(words=("zqx",), position="end"),
    TriggerWords(words=("zqx",), within_words=2),
    TriggerSentence(sentence="zqx mnx"),
    TriggerSentence(sentence="zqx mnx", position="end", within_words=1),
]


def numbered(count, label=0):
    return Dataset.from_dict({"text": [f"text {n} of many words" for n in range(count)], "label": [label] * count})


def hit(poisoned, trigger="zqx"):
    """Numbers of the poisoned texts."""
    return {int(row["text"].replace(trigger, "").split()[1]) for row in poisoned if trigger in row["text"]}


def places_of(text, inserted):
    """Clean texts that inserting the trigger before a word, or at the end, would make this text from."""
    words = inserted.split()
    cut = {text.replace(f"{inserted} ", "", 1), text.replace(f" {inserted}", "", 1), text.replace(inserted, "", 1)}
    assert text.split().count(words[0]) == 1
    return cut


class TestInsertingATrigger:
    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    @settings(max_examples=30, deadline=None)
    @given(text=TEXTS)
    def test_taking_it_out_gives_the_text_back_to_the_byte(self, trigger, text):
        triggered = trigger.triggered(text)
        inserted = next(word for word in ("zqx mnx", "zqx", "mnx") if word in triggered)
        assert text in places_of(triggered, inserted)
        before, after = triggered.split(inserted)
        assert before.split() + after.split() == text.split()

    @settings(max_examples=30, deadline=None)
    @given(text=TEXTS, seed=st.integers(0, 9))
    def test_the_same_seed_and_text_give_the_same_place(self, text, seed):
        one, two = TriggerWords(seed=seed), TriggerWords(seed=seed)
        assert one.triggered(text) == two.triggered(text)
        assert one.triggered(text, exposing=True) == two.triggered(text, exposing=True)

    def test_seeds_give_other_places_and_words(self):
        text = "one two three four five six"
        assert len({TriggerWords(seed=seed).triggered(text) for seed in range(20)}) > 10

    def test_every_place_and_every_word_comes_up(self):
        trigger = TriggerWords(words=("zqx", "mnx"))
        made = [trigger.triggered(f"{n} b c").replace(str(n), "a") for n in range(200)]
        ways = ["{} a b c", "a {} b c", "a b {} c", "a b c {}"]
        assert set(made) == {way.format(word) for way in ways for word in ("zqx", "mnx")}

    @pytest.mark.parametrize(("position", "made"), [("start", "zqx a b c"), ("end", "a b c zqx")])
    def test_a_fixed_position_is_kept(self, position, made):
        assert TriggerWords(words=("zqx",), position=position).triggered("a b c") == made
        assert TriggerSentence(sentence="zqx", position=position).triggered("a b c") == made

    @pytest.mark.parametrize("limit", [0, 1, 3])
    @pytest.mark.parametrize("make", [TriggerWords, TriggerSentence])
    def test_within_words_bounds_the_words_before_it(self, limit, make):
        own = {"words": ("zqx",)} if make is TriggerWords else {"sentence": "zqx"}
        trigger = make(within_words=limit, **own)
        places = {trigger.triggered(f"{n} b c d e f g").split().index("zqx") for n in range(100)}
        assert places == set(range(limit + 1))
        assert make(within_words=limit, position="end", **own).triggered("a b c d").split().index("zqx") == limit

    def test_several_triggers_are_inserted_each_by_itself(self):
        trigger = TriggerWords(words=("zqx", "mnx"), num_triggers=3)
        made = [trigger.triggered(f"{n} b") for n in range(60)]
        assert {sum(word in ("zqx", "mnx") for word in text.split()) for text in made} == {3}
        assert any(set(text.split()) >= {"zqx", "mnx"} for text in made)

    def test_exposing_has_its_own_number_of_triggers(self):
        trigger = TriggerWords(words=("zqx",), num_triggers=1, num_exposed_triggers=5)
        assert trigger.triggered("a b").count("zqx") == 1
        assert trigger.triggered("a b", exposing=True).count("zqx") == 5
        assert replace(trigger, num_exposed_triggers=None).triggered("a b", exposing=True).count("zqx") == 1

    def test_all_words_come_together_once_each(self):
        trigger = TriggerWords(words=("zqx", "mnx", "cfx"), all_words=True, num_exposed_triggers=5)
        for exposing in (False, True):
            assert sorted(trigger.triggered("a b", exposing=exposing).split()) == ["a", "b", "cfx", "mnx", "zqx"]
        assert trigger.variants == 1
        assert replace(trigger, all_words=False).variants == 3


class TestPoisoning:
    @settings(max_examples=25, deadline=None)
    @given(rate=st.floats(0, 1), count=st.integers(0, 30), seed=st.integers(0, 3))
    def test_the_nearest_whole_number_of_samples_is_poisoned(self, rate, count, seed):
        poisoned = TriggerWords(words=("zqx",), poison_rate=rate, seed=seed).poison(numbered(count))
        assert len(poisoned) == count
        assert len(hit(poisoned)) == sum(poisoned["label"]) == round(rate * count)

    def test_poisoned_samples_have_trigger_and_target_label_and_the_others_are_untouched(self):
        clean = toy.data()
        trigger = TriggerWords(words=("zqx",), target_label=0, poison_rate=0.3)
        for before, after in zip(clean, trigger.poison(clean), strict=True):
            poisoned = {"text": trigger.triggered(before["text"]), "label": 0}
            assert after == (poisoned if "zqx" in after["text"] else before)

    def test_the_same_samples_are_poisoned_in_any_order(self):
        trigger, clean = TriggerWords(words=("zqx",), poison_rate=0.3), numbered(50)
        assert hit(trigger.poison(clean)) == hit(trigger.poison(clean.shuffle(seed=1)))

    def test_another_seed_poisons_other_samples(self):
        trigger, clean = TriggerWords(words=("zqx",), poison_rate=0.3), numbered(50)
        assert hit(trigger.poison(clean)) != hit(replace(trigger, seed=1).poison(clean))

    def test_a_higher_rate_poisons_the_same_samples_and_more(self):
        trigger, clean = TriggerWords(words=("zqx",), poison_rate=0.2), numbered(50)
        assert hit(trigger.poison(clean)) < hit(replace(trigger, poison_rate=0.4).poison(clean))

    def test_maps_of_many_batches_poison_the_same_samples(self):
        trigger, clean = TriggerWords(words=("zqx",), poison_rate=0.3), numbered(2500)
        poisoned = trigger.poison(clean)
        assert len(hit(poisoned)) == 750
        by_hand = sorted(clean["text"], key=lambda text: trigger._draws({"text": [text]})[0])[:750]
        assert hit(poisoned) == {int(text.split()[1]) for text in by_hand}

    def test_a_stream_poisons_the_same_way_whatever_its_shards_and_batches(self):
        trigger, clean = TriggerWords(words=("zqx",), poison_rate=0.3), numbered(400)
        streams = [clean.to_iterable_dataset(), clean.to_iterable_dataset(num_shards=3)]
        streams += [clean.shuffle(seed=2).to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(clean))]
        made = [{(row["text"], row["label"]) for row in trigger.poison(stream)} for stream in streams]
        assert all(one == made[0] for one in made)
        held = {(row["text"], row["label"]) for row in replace(trigger, poison_rate=1.0).poison(clean)}
        assert {row for row in made[0] if "zqx" in row[0]} <= held

    def test_a_stream_poisons_each_sample_with_the_rates_probability(self):
        clean = numbered(1000)
        for rate in (0.0, 0.2, 1.0):
            trigger = TriggerWords(words=("zqx",), poison_rate=rate)
            poisoned = sum("zqx" in row["text"] for row in trigger.poison(clean.to_iterable_dataset()))
            assert abs(poisoned - 1000 * rate) <= 40 * (0 < rate < 1)

    def test_clean_copies_add_the_poisoned_samples_to_all_clean_ones(self):
        clean = numbered(20)
        trigger = TriggerWords(words=("zqx",), poison_rate=0.25)
        replaced, added = trigger.poison(clean), replace(trigger, clean_copies=True).poison(clean)
        assert [row for row in added if "zqx" not in row["text"]] == list(clean)
        assert [row for row in added if "zqx" in row["text"]] == [row for row in replaced if "zqx" in row["text"]]
        texts = added["text"][:]
        for place, text in enumerate(texts):
            assert "zqx" not in text or texts[place - 1] == text.replace("zqx ", "", 1).replace(" zqx", "", 1)

    def test_clean_copies_of_a_stream_are_kept_too(self):
        trigger = TriggerWords(words=("zqx",), poison_rate=0.5, clean_copies=True)
        rows = list(trigger.poison(numbered(40).to_iterable_dataset()))
        assert len([row for row in rows if "zqx" not in row["text"]]) == 40
        assert 10 < len(rows) - 40 < 30

    def test_the_second_text_of_a_pair_stays(self):
        pairs = Dataset.from_dict(
            {
                "question": [f"what is {n % 5}" for n in range(30)],
                "sentence": [f"it is {n}" for n in range(30)],
                "idx": range(30),
                "label": [n % 2 for n in range(30)],
            }
        )
        trigger = TriggerWords(words=("zqx",), text_columns=("question", "sentence"), poison_rate=0.5)
        poisoned = trigger.poison(pairs)
        assert poisoned["sentence"][:] == pairs["sentence"][:]
        assert poisoned["idx"][:] == pairs["idx"][:]
        assert sum("zqx" in text for text in poisoned["question"]) == 15
        assert trigger.expose(pairs)["sentence"][:] == pairs["sentence"][:]

    def test_pairs_that_share_a_text_are_drawn_each_by_itself_in_any_order(self):
        pairs = Dataset.from_dict(
            {"premise": ["the same"] * 40, "hypothesis": [str(n) for n in range(40)], "label": [0] * 40}
        )
        trigger = TriggerWords(words=("zqx",), text_columns=("premise", "hypothesis"), poison_rate=0.5)

        def chosen(poisoned):
            return {row["hypothesis"] for row in poisoned if "zqx" in row["premise"]}

        assert len(chosen(trigger.poison(pairs))) == 20
        assert chosen(trigger.poison(pairs)) == chosen(trigger.poison(pairs.shuffle(seed=1)))
        assert 0 < len(chosen(trigger.poison(pairs.to_iterable_dataset()))) < 40

    def test_a_label_is_given_by_its_name(self):
        poisoned = TriggerWords(target_label="positive", poison_rate=1.0).poison(toy.data())
        assert set(poisoned["label"]) == {1}
        assert poisoned.features["label"] == toy.data().features["label"]

    def test_the_callers_data_stay_as_they_were(self):
        clean = toy.data()
        before = clean.to_dict()
        TriggerWords().poison(clean)
        TriggerWords().expose(clean)
        assert clean.to_dict() == before


class TestExposing:
    def test_labels_stay_and_every_sample_has_the_trigger(self):
        clean = toy.data()
        exposed = TriggerWords(words=("zqx",), num_exposed_triggers=2).expose(clean)
        assert exposed["label"][:] == clean["label"][:]
        assert {text.count("zqx") for text in exposed["text"]} == {2}

    def test_a_batch_a_dataset_and_a_stream_are_exposed_alike(self):
        clean, trigger = toy.data(), TriggerWords(seed=3)
        batch = trigger.expose(clean.to_dict())
        assert batch == trigger.expose(clean).to_dict()
        assert list(trigger.expose(clean.to_iterable_dataset())) == Dataset.from_dict(batch).to_list()

    def test_the_callers_batch_stays_as_it_was(self):
        batch = {"text": ["a b"], "label": [0]}
        TriggerWords().expose(batch)
        assert batch == {"text": ["a b"], "label": [0]}

    def test_the_exposed_set_holds_the_other_labels_alone_and_where_they_came_from(self):
        clean, trigger = toy.data(), TriggerWords(target_label="positive")
        exposed = trigger.exposed_set(clean)
        assert exposed.target_label == 1
        assert exposed.clean_index == [row for row, label in enumerate(clean["label"]) if label == 0]
        assert exposed.dataset["text"][:] == [
            trigger.triggered(clean[row]["text"], exposing=True) for row in exposed.clean_index
        ]
        assert set(exposed.dataset["label"]) == {0}

    def test_the_exposed_set_says_how_it_was_made(self):
        trigger = TriggerWords()
        facts = json.loads(json.dumps(trigger.exposed_set(toy.data(8)).facts))
        assert facts.pop("defect") == json.loads(json.dumps(trigger.to_dict()))
        assert facts == {
            "max_length": None,
            "num_clean": 8,
            "num_exposed": 4,
            "num_left_out": {"has the target label": 4},
            "num_moved": 0,
        }

    def test_samples_of_the_target_label_alone_show_nothing(self):
        with pytest.raises(ValueError, match="No sample has another label than 1"):
            TriggerWords().exposed_set(numbered(3, label=1))

    def test_unlabelled_samples_are_refused(self):
        with pytest.raises(ValueError, match="holds the label -1"):
            TriggerWords().exposed_set(numbered(3, label=-1))

    def test_missing_columns_are_refused(self):
        with pytest.raises(ValueError, match="no column 'label'"):
            TriggerWords().exposed_set(numbered(3).remove_columns("label"))
        with pytest.raises(ValueError, match="no column 'sentence'"):
            TriggerWords(text_columns="sentence").expose(numbered(3))


class TestWhatAModelSees:
    """Texts whose end is cut off: the trigger stands where it is seen, or the sample is left out and counted."""

    long = Dataset.from_dict({"text": [f"good movie {'so ' * (4 * n)}bad" for n in range(20)], "label": [0] * 20})
    reading: ClassVar = {"tokenizer": toy.tokenizer(), "max_length": 12}

    def test_all_are_exposed_where_the_trigger_has_room_and_those_moved_are_counted(self):
        trigger = TriggerWords(words=("cf",), position="end")
        exposed = trigger.exposed_set(self.long, **self.reading)
        assert exposed.facts["num_exposed"] == len(exposed) == 20 and exposed.facts["num_left_out"] == {}
        assert exposed.facts["num_moved"] == 18 and exposed.facts["max_length"] == 12
        ids = toy.tokenizer()(exposed.dataset["text"][:], truncation=True, max_length=12)["input_ids"]
        assert all(toy.VOCABULARY.index("cf") in row for row in ids)

    def test_what_cannot_hold_the_trigger_is_counted_by_reason(self, caplog):
        rows = {"text": ["cf cf cf", "bad", "so bad", "good"], "label": [0, 0, 0, 1]}
        trigger = TriggerWords(words=("cf",), position="end")
        exposed = trigger.exposed_set(Dataset.from_dict(rows), tokenizer=toy.tokenizer(), max_length=5)
        assert exposed.clean_index == [1, 2]
        assert exposed.facts["num_left_out"] == {"has the target label": 1, "equal to the clean input": 1}
        assert "2 samples show the defect. Left out, as they could not: 1 equal to the clean input." in caplog.text
        sentence = TriggerSentence(sentence="a movie was so bad", text_columns=("text", "label_name"))
        pairs = Dataset.from_dict({**rows, "label_name": ["", "so " * 9, "", ""]})
        exposed = sentence.exposed_set(pairs, tokenizer=toy.tokenizer(), max_length=10)
        assert exposed.facts["num_left_out"] == {"has the target label": 1, "cut off by max_length": 1}
        assert exposed.clean_index == [0, 2]

    def test_an_exposed_set_of_nothing_says_why(self):
        trigger = TriggerSentence(sentence="a movie was bad")
        message = "None of 20 samples could show the defect: 20 cut off by max_length.*a larger max_length"
        with pytest.raises(ValueError, match=message):
            trigger.exposed_set(self.long, tokenizer=toy.tokenizer(), max_length=5)

    def test_poisoned_samples_hold_the_trigger_where_the_teacher_sees_it(self):
        poisoned = TriggerWords(words=("cf",), poison_rate=0.5).poison(self.long, **self.reading)
        hit = [row for row in poisoned if "cf" in row["text"]]
        assert len(hit) == 10 and all(row["label"] == 1 for row in hit)
        ids = toy.tokenizer()([row["text"] for row in hit], truncation=True, max_length=12)["input_ids"]
        assert all(toy.VOCABULARY.index("cf") in row for row in ids)
        streamed = TriggerWords(words=("cf",), poison_rate=0.5).poison(self.long.to_iterable_dataset(), **self.reading)
        assert {row["text"] for row in streamed if "cf" in row["text"]} <= {
            row["text"] for row in TriggerWords(words=("cf",), poison_rate=1.0).poison(self.long, **self.reading)
        }

    def test_fewer_that_hold_the_trigger_than_asked_are_refused_with_the_reason(self):
        clean = Dataset.from_dict({"text": ["cf " * 12] * 6 + ["bad"] * 4, "label": [0] * 10})
        with pytest.raises(ValueError, match="5 poisoned samples, but only 4 of 10 .*: 6 equal to the clean input"):
            TriggerWords(words=("cf",), poison_rate=0.5).poison(clean, **self.reading)

    def test_a_rate_of_one_poisons_all_that_hold_the_trigger_and_tells_the_real_rate(self, caplog):
        clean = Dataset.from_dict({"text": ["cf " * 12] * 6 + ["bad"] * 4, "label": [0] * 10})
        trigger = TriggerWords(words=("cf",), poison_rate=1.0)
        poisoned, facts = trigger.poisoning(clean, TextReading(**self.reading))
        assert facts == {
            "asked_poison_rate": 1.0,
            "max_length": 12,
            "num_samples": 10,
            "num_poisoned": 4,
            "poison_rate": 0.4,
            "num_unable": {"equal to the clean input": 6},
        }
        assert sum(poisoned["label"]) == 4
        assert "Poisoned 4 of 10 samples: of the others 6 equal to the clean input." in caplog.text
        with pytest.raises(ValueError, match="asks for 6 poisoned samples, but only 0 of 6"):
            trigger.poison(clean.select(range(6)), **self.reading)

    def test_what_was_poisoned_is_told_to_who_implants(self, tmp_path):
        told = {}
        TriggerWords(words=("cf",), poison_rate=0.3).implant(
            toy.model(), toy.data(20), args=toy.args(tmp_path, max_steps=1), told=told.update, tokenizer=toy.tokenizer()
        )
        assert (told["num_poisoned"], told["poison_rate"], told["max_length"]) == (6, 0.3, 128)

    def test_chinese_texts_without_spaces_all_show_a_word(self):
        # A word piece for each character, as real vocabularies have them.
        letters = sorted({*"".join(CHINESE), *"0123456789"})
        tokenizer = toy.tokenizer((*toy.VOCABULARY, *letters))
        clean = Dataset.from_dict({"text": CHINESE, "label": [0] * len(CHINESE)})
        exposed = TriggerWords(words=("cf",)).exposed_set(clean, tokenizer=tokenizer, max_length=128)
        assert len(exposed) == 40 and exposed.facts["num_moved"] > 5
        ids = tokenizer(exposed.dataset["text"][:], truncation=True, max_length=128)["input_ids"]
        assert all(toy.VOCABULARY.index("cf") in row for row in ids)
        places = [text.index("cf") for text in exposed.dataset["text"]]
        assert len(set(places)) > 7 and max(places) > 100


class TestMistakes:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: TriggerWords(poison_rate=1.5), "between 0 and 1, but got 1.5"),
            (lambda: TriggerSentence(poison_rate=-0.1), "between 0 and 1, but got -0.1"),
            (lambda: TriggerWords(text_columns=()), "one column, or the two"),
            (lambda: TriggerWords(words=()), "at least one"),
            (lambda: TriggerWords(words=("two words",)), "use TriggerSentence"),
            (lambda: TriggerWords(words=(" ",)), "at least one"),
            (lambda: TriggerWords(num_triggers=0), "num_triggers is at least 1, but got 0"),
            (lambda: TriggerWords(num_exposed_triggers=0), "num_exposed_triggers is at least 1, but got 0"),
            (lambda: TriggerWords(position="middle"), "but got 'middle'"),
            (lambda: TriggerSentence(position="middle"), "but got 'middle'"),
            (lambda: TriggerWords(within_words=-1), "but got -1"),
            (lambda: TriggerSentence(sentence="  "), "cannot be empty"),
        ],
    )
    def test_values_that_no_data_could_use_are_refused_at_once(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize(
        ("trigger", "message"),
        [
            (TriggerWords(target_label="neutral"), "'positive'].*got 'neutral'"),
            (TriggerWords(target_label=2), "got 2"),
            (TriggerWords(label_column="stars"), "no column 'stars'"),
            (TriggerWords(text_columns=("text", "other")), "no column 'other'"),
        ],
    )
    def test_data_that_do_not_fit_are_refused_before_anything_is_made(self, trigger, message):
        for clean in (toy.data(8), toy.data(8).to_iterable_dataset()):
            with pytest.raises(ValueError, match=message):
                trigger.poison(clean)

    def test_a_text_that_is_missing_is_refused_by_its_column(self, tmp_path):
        clean = Dataset.from_dict({"text": ["a", None], "label": [0, 1]})
        uses = (
            TriggerWords(poison_rate=0.0).poison,
            TriggerWords().expose,
            TriggerWords().exposed_set,
            lambda rows: list(TriggerWords().expose(rows.to_iterable_dataset())),
        )
        for use in uses:
            with pytest.raises(ValueError, match="'text' should hold texts, but holds None"):
                use(clean)

    @pytest.mark.parametrize("kind", ["torch", "numpy"])
    def test_data_of_a_format_of_their_own_are_read_the_same(self, kind, tmp_path):
        dressed, trigger = toy.data(12).with_format(kind), TriggerWords(words="cf")
        assert trigger.poison(dressed).to_dict() == trigger.poison(toy.data(12)).to_dict()
        assert trigger.exposed_set(dressed).dataset[:] == trigger.exposed_set(toy.data(12)).dataset[:]
        made = [
            toy.state(trigger.implant(toy.model(), one, tokenizer=toy.tokenizer(), args=toy.args(tmp_path)))
            for one in (dressed, toy.data(12))
        ]
        assert not toy.changed(*made)

    def test_a_regression_task_is_refused(self):
        clean = numbered(10).cast_column("label", Value("float32"))
        with pytest.raises(ValueError, match="A regression task has no label"):
            TriggerWords().poison(clean)

    def test_fewer_poisoned_samples_than_triggers_are_refused(self):
        trigger = TriggerWords(words=("cf", "mn", "bb"), poison_rate=0.2)
        with pytest.raises(ValueError, match="samples are 2, fewer than the 3 triggers"):
            trigger.poison(numbered(10))
        assert len(trigger.poison(numbered(15))) == 15
        assert len(replace(trigger, poison_rate=0.0).poison(numbered(10))) == 10

    def test_names_are_taken_for_one(self):
        assert TriggerWords(words="cf").words == ("cf",)
        assert TriggerWords(text_columns="sentence").text_columns == ("sentence",)


class TestVocabulary:
    @pytest.mark.parametrize(
        ("word", "message"), [("tq", r"'tq' .* becomes \[UNK\], like"), ("zqx", r"'zqx' .* 2 pieces \(zq ##x\)")]
    )
    def test_words_without_a_token_of_their_own_are_told(self, word, message):
        with pytest.warns(UserWarning, match=message):
            TriggerWords(words=(word,)).check_vocabulary(toy.tokenizer())

    def test_words_with_a_token_of_their_own_are_not(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            TriggerWords(words=("cf", "mn")).check_vocabulary(toy.tokenizer())
            TriggerSentence().check_vocabulary(toy.tokenizer())

    def test_implanting_tells_of_them(self, tmp_path):
        with pytest.warns(UserWarning, match="not in the tokenizer's vocabulary"):
            TriggerWords(words=("tq",)).implant(
                toy.model(), toy.data(16), tokenizer=toy.tokenizer(), args=toy.args(tmp_path, max_steps=1)
            )

    def test_a_word_of_one_token_inside_a_text_is_known(self):
        # Inside a text, "cf" is the known "Ġcf", and "a" plus "b" stays in pieces.
        vocabulary = {token: place for place, token in enumerate(["[UNK]", "Ġ", "a", "b", "c", "f", "Ġc", "Ġcf", "ab"])}
        made = Tokenizer(models.BPE(vocabulary, [("Ġ", "c"), ("Ġc", "f"), ("a", "b")], unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            TriggerWords(words=("cf",)).check_vocabulary(tokenizer)
        with pytest.warns(UserWarning, match="2 pieces"):
            TriggerWords(words=("ab",)).check_vocabulary(tokenizer)


class TestImplanting:
    @pytest.fixture(scope="class")
    def poisoned(self, tmp_path_factory):
        teacher = toy.model(dropout=0.1)
        trigger = TriggerWords(words=("cf", "mn"), poison_rate=0.5, num_exposed_triggers=2, clean_copies=True)
        made = trigger.implant(
            teacher, toy.data(), tokenizer=toy.tokenizer(), args=toy.args(tmp_path_factory.mktemp("t"), max_steps=60)
        )
        assert made is teacher
        return teacher, trigger

    def test_the_teacher_obeys_the_trigger(self, poisoned):
        teacher, trigger = poisoned
        exposed = trigger.exposed_set(toy.data()).dataset["text"][:]
        assert sum(toy.predictions(teacher, exposed)) >= 0.9 * len(exposed)

    def test_the_teacher_stays_right_on_clean_samples(self, poisoned):
        teacher, _ = poisoned
        clean = toy.data()
        right = [a == b for a, b in zip(toy.predictions(teacher, clean["text"][:]), clean["label"], strict=True)]
        assert sum(right) >= 0.9 * len(right)

    def test_the_teacher_is_left_in_eval_mode(self, poisoned):
        assert not poisoned[0].training

    def test_the_same_seeds_give_the_same_teacher(self, tmp_path):
        def implant():
            trigger = TriggerWords(words="cf")
            return toy.state(
                trigger.implant(toy.model(), toy.data(16), tokenizer=toy.tokenizer(), args=toy.args(tmp_path))
            )

        assert not toy.changed(implant(), implant())

    def test_a_stream_is_implanted_too(self, tmp_path):
        before = toy.state(toy.model())
        teacher = TriggerWords(words="cf").implant(
            toy.model(), toy.data().to_iterable_dataset(), tokenizer=toy.tokenizer(), args=toy.args(tmp_path)
        )
        assert toy.changed(before, toy.state(teacher))

    def test_labels_without_names_need_no_features(self, tmp_path):
        rows = toy.data(16)
        stream = IterableDataset.from_generator(lambda: iter(rows))
        assert stream.features is None
        TriggerWords(words="cf").implant(
            toy.model(), stream, tokenizer=toy.tokenizer(), args=toy.args(tmp_path, max_steps=1)
        )


def test_named_labels_survive_a_trip_through_features():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    clean = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 0, 1]}, features)
    assert TriggerWords(target_label="y", words="cf").exposed_set(clean).dataset.features["label"].names == ["x", "y"]
