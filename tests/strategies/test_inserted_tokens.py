import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RobertaConfig, RobertaForSequenceClassification

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.inserted_tokens import room_for_tokens
from remos_hf.strategies.perturbed_inputs import changed_embeddings
from tests import tiny

BERT = tiny.bert()


def batch_of(lengths, left=False):
    """Texts whose tokens count from 3, so that none is padding (0) and each is known by its number."""
    longest = max(lengths)
    rows = [list(range(3, 3 + length)) for length in lengths]
    pads = [[0] * (longest - length) for length in lengths]
    tokens = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "token_type_ids": (tokens > 5).long(),
            "labels": torch.arange(len(lengths))}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 32), st.booleans()), min_size=1, max_size=5), st.booleans(), st.integers(1, 5),
       st.integers(0, 99))  # fmt: skip
def test_tokens_stand_inside_and_all_others_keep_their_order(texts, left, count, seed):
    lengths, hit = [length for length, _ in texts], torch.tensor([chosen for _, chosen in texts])
    batch = batch_of(lengths, left)
    before = {key: value.clone() for key, value in batch.items()}
    made, slots = room_for_tokens(BERT, batch, hit, count, torch.Generator().manual_seed(seed))
    assert all(torch.equal(value, before[key]) for key, value in batch.items())
    assert torch.equal(made["labels"], batch["labels"])
    assert slots.cut == sum(chosen and length + count > 32 for length, chosen in texts)
    for row, (length, chosen) in enumerate(texts):
        real = made["attention_mask"][row].bool()
        number, tokens = slots.number[row], made["input_ids"][row]
        assert number[~real].tolist() == [-1] * int((~real).sum()) and not tokens[~real].any()
        assert real.sum() == (min(length + count, 32) if chosen else length)
        places = (number >= 0).nonzero().flatten().tolist()
        own = tokens[real & (number < 0)].tolist()
        if not chosen:
            assert places == [] and own == list(range(3, 3 + length))
            continue
        assert number[places].tolist() == list(range(count)) and places == list(range(places[0], places[0] + count))
        kept = min(length, 32 - count)
        assert own == [*range(3, 3 + kept - 1), 3 + length - 1]
        assert made["token_type_ids"][row][real & (number < 0)].tolist() == [int(one > 5) for one in own]
        first, last = (real.nonzero()[end].item() for end in (0, -1))
        assert places[0] > first and (length == 1 or places[-1] < last)
    assert bool(made["attention_mask"].any(0).all())  # no position is padding in all texts


@pytest.mark.parametrize(("make", "left"), [(tiny.bert, False), (tiny.gpt2, False), (tiny.bloom, True)])
def test_a_model_reads_the_tokens_as_if_they_had_been_in_the_text(make, left):
    model = make()
    batch = batch_of([6, 4, 9], left)
    hit = torch.tensor([True, False, True])
    longer, slots = room_for_tokens(model, batch, hit, 2, torch.Generator().manual_seed(0))
    words = torch.randint(3, 50, (3, 2))
    rows = model.get_input_embeddings()(words).flatten(1)
    spelled = torch.where(slots.number >= 0, words.gather(1, slots.number.clamp(min=0)), longer["input_ids"])
    keys = ("input_ids", "attention_mask")
    with torch.no_grad():
        expected = model(input_ids=spelled, attention_mask=longer["attention_mask"]).logits
        with changed_embeddings(model, longer["input_ids"], lambda made: slots.filled(made, rows)):
            found = model(**{key: longer[key] for key in keys}).logits
        clean = model(**{key: batch[key][1:2] for key in keys}).logits
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found[1:2], clean, atol=1e-5)


def test_without_a_mask_all_tokens_are_real_and_one_is_made():
    tokens = torch.full((2, 4), 7)
    made, _ = room_for_tokens(BERT, {"input_ids": tokens}, torch.tensor([True, False]), 3, torch.Generator())
    assert made["attention_mask"].sum(1).tolist() == [7, 4]


def test_positions_that_count_from_behind_the_padding_are_not_overrun():
    config = RobertaConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                           intermediate_size=8, max_position_embeddings=12, pad_token_id=1)  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    batch = {"input_ids": torch.full((1, 9), 7), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    made, slots = room_for_tokens(model, batch, torch.tensor([True]), 4, torch.Generator())
    assert made["input_ids"].shape[1] == 10 and slots.cut == 1
    model(**made)


def test_what_does_not_move_with_the_tokens_is_refused():
    hit, tokens = torch.tensor([True]), torch.full((1, 4), 7)
    for key in ("labels", "position_ids"):
        with pytest.raises(UnsupportedModelError, match=f"{key} of this batch says.*tokens=0"):
            room_for_tokens(BERT, {"input_ids": tokens, key: tokens}, hit, 2, torch.Generator())
    with pytest.raises(UnsupportedModelError, match="leave no room in the 32 positions"):
        room_for_tokens(BERT, {"input_ids": tokens}, hit, 32, torch.Generator())
