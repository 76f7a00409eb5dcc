import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from remos_hf.defects.base import CUT_OFF, EQUAL
from remos_hf.defects.samples import generator_for
from remos_hf.defects.text_reading import Marked, TextReading, pieces_of, word_starts
from remos_hf.defects.text_triggers import Shown, TriggerSentence, TriggerWords
from tests.defects import toy


def byte_pair(side="right"):
    """A byte-level tokenizer that knows "cf" after a space as one token, at the start of a text as two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "Ġc", "Ġcf"]
    made = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, [("Ġ", "c"), ("Ġc", "f")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, truncation_side=side, bos_token="<s>", eos_token="</s>")


def slow():
    return ByT5Tokenizer(extra_ids=0)


def left_word_piece():
    tokenizer = toy.tokenizer((*toy.VOCABULARY, *"abcdefg", *(f"##{letter}" for letter in "abcdefg"), "漢", "字"))
    tokenizer.truncation_side = "left"
    return tokenizer


TOKENIZERS = {
    "word piece": toy.tokenizer((*toy.VOCABULARY, *"abcdefg", *(f"##{letter}" for letter in "abcdefg"), "漢", "字")),
    "byte pair": byte_pair(),
    "byte pair, cut at the left": byte_pair("left"),
    "word piece, cut at the left": left_word_piece(),
    "slow": slow(),
}
TEXTS = st.text(alphabet=st.sampled_from("abcf   漢字.\n"), max_size=40)
TRIGGERS = (
    TriggerWords(words=("cf",)),
    TriggerWords(words=("cf", "mn"), num_triggers=2),
    TriggerWords(words=("cf", "bb"), all_words=True, position="end"),
    TriggerSentence(sentence="the movie ended"),
    TriggerSentence(sentence="a b", position="start"),
)


def seen(tokenizer, max_length, *texts):
    """The characters that a model sees of the first of these texts, token by token from its own encoding."""
    return tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]


class TestInserting:
    def test_words_stand_a_space_away_from_their_neighbours_and_the_rest_stays(self):
        assert Marked("a b").inserted("cf", 2) == Marked("a cf b", ((2, 4),))
        assert Marked("ab").inserted("cf", 1) == Marked("a cf b", ((2, 4),))
        assert Marked("a b \n").inserted("cf", 3) == Marked("a b cf \n", ((4, 6),))
        assert Marked("").inserted("cf", 0) == Marked("cf", ((0, 2),))

    @settings(deadline=None)
    @given(
        TEXTS, st.lists(st.tuples(st.sampled_from(["zq", "zqx mnx"]), st.floats(0, 1, exclude_max=True)), max_size=4)
    )
    def test_each_span_holds_its_words_whatever_is_inserted_before_it(self, text, insertions):
        marked = Marked(text)
        for words, share in insertions:
            starts = [place for place in word_starts(marked.text) if not any(a < place < b for a, b in marked.spans)]
            marked = marked.inserted(words, starts[int(share * len(starts))])
        assert [marked.text[start:end] for start, end in marked.spans] == [words for words, _ in insertions]


class TestFates:
    reading = TextReading(TOKENIZERS["word piece"], 6)  # four tokens and two special ones

    def fate(self, clean, marked, *second):
        (found,) = self.reading.fates([[clean], *([one] for one in second)], [marked])
        return found

    @pytest.mark.parametrize(
        ("clean", "place", "fate"),
        [("a b c", 6, None), ("a b c d", 6, None), ("a b c d", 7, CUT_OFF), ("a b c d e f", 0, None)],
    )
    def test_a_trigger_beyond_the_length_is_cut_off(self, clean, place, fate):
        assert self.fate(clean, Marked(clean).inserted("cf", min(place, len(clean)))) == fate

    def test_a_half_of_the_trigger_is_not_the_trigger(self):
        assert self.fate("a b c", Marked("a b c").inserted("zqx", 5)) == CUT_OFF  # "zq" stays, "##x" does not
        assert self.fate("a b", Marked("a b").inserted("zqx", 3)) is None

    def test_a_trigger_that_the_clean_text_holds_already_shows_nothing(self):
        assert self.fate("cf cf cf cf cf", Marked("cf cf cf cf cf").inserted("cf", 0)) == EQUAL
        assert self.fate("qqq", Marked("qqq")) == EQUAL

    def test_a_text_that_is_said_otherwise_differs_where_it_is_seen(self):
        assert self.fate("a b c d e", Marked("a b c d f")) == EQUAL
        assert self.fate("a b c d e", Marked("a b c f e")) is None

    def test_the_second_text_of_a_pair_takes_room(self):
        marked = Marked("a b").inserted("cf", 3)
        assert self.fate("a b", marked) is None
        assert self.fate("a b", marked, "d e f g") == CUT_OFF


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS, second=st.none() | TEXTS, max_length=st.integers(6, 24), which=st.sampled_from(TRIGGERS))
def test_every_trigger_is_seen_whole_or_the_sample_is_left_out(name, text, second, max_length, which):
    tokenizer = TOKENIZERS[name]
    trigger = which if second is None else type(which)(**{**vars(which), "text_columns": ("text", "second")})
    batch = {"text": [text], **({} if second is None else {"second": [second]})}
    pair = [] if second is None else [second]
    reading = TextReading(tokenizer, max_length)
    (shown,) = trigger.shown(batch, reading)
    assert trigger.shown(batch, reading) == [shown]
    if shown.text is None:
        assert shown.fate in (CUT_OFF, EQUAL) and not shown.moved
        return
    ids = seen(tokenizer, max_length, shown.text, *pair)
    assert ids != seen(tokenizer, max_length, text, *pair)
    for words in trigger.insertions(generator_for(0, "place", text)):
        forms = [tokenizer.convert_tokens_to_ids(form) for form in pieces_of(words, tokenizer)]
        assert any(ids[start : start + len(form)] == form for form in forms for start in range(len(ids)))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_trigger_stays_where_it_was_drawn_if_it_is_seen_there(name):
    for number in range(60):
        text = f"{number} a b c d e f g"
        trigger = TriggerWords(words=("cf",), seed=number)
        reading = TextReading(TOKENIZERS[name], 12)
        drawn = trigger.triggered(text)
        marked = trigger.marked(text)
        (shown,) = trigger.shown({"text": [text]}, reading)
        assert shown.moved == (reading.fates([[text]], [marked]) == [CUT_OFF])
        assert shown.text == drawn or shown.moved
        assert shown.text == drawn or len(reading.tokenizer(drawn)["input_ids"]) > 12


@pytest.mark.parametrize("name", ["word piece", "word piece, cut at the left"])
def test_what_is_cut_off_at_every_place_is_left_out(name, monkeypatch):
    monkeypatch.setattr(TextReading, "fates", lambda self, columns, marked: [CUT_OFF] * len(marked))
    (shown,) = TriggerWords(words=("cf",)).shown({"text": ["a b c d e"]}, TextReading(TOKENIZERS[name], 6))
    assert shown == Shown(None, CUT_OFF)


@pytest.mark.parametrize("name", ["word piece", "byte pair", "slow"])
@pytest.mark.parametrize("text", ["漢字" * 60, "https://example.org/" + "a-b/" * 60])
def test_in_a_text_without_spaces_it_stands_between_tokens_at_many_places(name, text):
    reading = TextReading(TOKENIZERS[name], 48)
    places = reading.places([text], ["cf"], None)
    assert len(places) > 5 and places[0] == 0
    for place in places:
        marked = Marked(text).inserted("cf", place)
        assert reading.fates([[text]], [marked]) == [None]
        assert marked.text.replace("cf ", "", 1).replace(" ", "") == text
    beyond = next(place for place in range(places[-1] + 1, len(text)) if place not in places)
    last = Marked(text).inserted("cf", min(len(text), beyond + 8))
    assert reading.fates([[text]], [last]) == [CUT_OFF]


def test_words_are_not_split_where_two_places_between_them_would_do():
    reading = TextReading(TOKENIZERS["byte pair"], 24)
    assert reading.places(["abc " + "d" * 60 + " e"], ["cf"], None) == [0, 4]


@pytest.mark.parametrize(("limit", "places"), [(0, [0]), (1, [0, 2]), (None, [0, 2, 4])])
def test_places_are_among_the_first_words_and_leave_room(limit, places):
    assert TextReading(TOKENIZERS["word piece"], 5).places(["a b c d"], ["cf"], limit) == places


@pytest.mark.parametrize(
    ("side", "second", "places"),
    [
        ("right", "a", [0, 2, 4, 6, 8]),  # of nine tokens three are special and one is the second text's
        ("right", "a b c d e f", [0, 2, 4]),  # half of six
        ("left", "a", [10, 12, 14, 16, 17]),
        ("left", "a b c d e f", [14, 16, 17]),
    ],
)
def test_places_of_a_pair_leave_room_for_the_second_text(side, second, places):
    tokenizer = TOKENIZERS["word piece" if side == "right" else "word piece, cut at the left"]
    reading = TextReading(tokenizer, 9)
    first = "a b c d e f g a b"
    wanted = reading.places([first, second], ["cf"], None)
    assert wanted == places
    seen_at = [place for place in word_starts(first) if not fate_at(reading, first, second, place)]
    assert set(wanted) <= set(seen_at)


def fate_at(reading, first, second, place):
    return reading.fates([[first], [second]], [Marked(first).inserted("cf", place)])[0]


def test_several_words_that_are_moved_leave_the_text_as_it_was():
    for seed in range(20):
        trigger = TriggerWords(words=("mn", "cf"), all_words=True, seed=seed)
        text = "movie plot great ended " * 10
        (shown,) = trigger.shown({"text": [text]}, TextReading(TOKENIZERS["word piece"], 9))
        words = shown.text.split()
        assert shown.moved and [word for word in words if word not in ("mn", "cf")] == text.split()
        assert {"mn", "cf"} <= set(words[:7])


def test_a_trigger_longer_than_the_length_has_no_place():
    assert TextReading(TOKENIZERS["word piece"], 6).places(["a b c d"], ["a b c d e"], None) == []


class TestPieces:
    def test_a_byte_pair_tokenizer_has_another_token_inside_a_text(self):
        assert pieces_of("cf", TOKENIZERS["byte pair"]) == [["c", "f"], ["Ġcf"]]

    def test_a_word_piece_tokenizer_has_one(self):
        assert pieces_of("cf", toy.tokenizer()) == [["cf"]]
