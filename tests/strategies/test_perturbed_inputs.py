import pytest
import torch

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.perturbed_inputs import (
    Inputs,
    changed_embeddings,
    drawn_rows,
    embedding_rows,
    inputs_to_perturb,
    rows_of,
    with_inputs,
)
from tests import tiny

PIXELS, WORDS = torch.zeros(2, 3, 4, 4), torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "key"),
    [
        ({"pixel_values": PIXELS, "labels": torch.zeros(2)}, "pixel_values"),
        ({"input_ids": WORDS, "attention_mask": torch.ones(2, 5)}, "input_ids"),
        ({"input_ids": WORDS, "pixel_values": PIXELS}, "pixel_values"),
        ({"sound": torch.zeros(2, 9), "labels": torch.zeros(2), "attention_mask": torch.ones(2, 9)}, "sound"),
        ((PIXELS, torch.zeros(2)), None),
        (PIXELS, None),
    ],
)
def test_what_can_be_perturbed_is_found(batch, key):
    assert inputs_to_perturb(batch).key == key


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        ({"labels": torch.zeros(2)}, r"labels: torch.float32 \(2,\)"),
        ({"left": PIXELS, "right": PIXELS}, r"left: torch.float32 \(2, 3, 4, 4\), right"),
        ({"pixel_values": PIXELS.byte()}, r"pixel_values: torch.uint8"),
        ({"input_ids": WORDS[None]}, r"input_ids: torch.int64 \(1, 2, 5\)"),
        ({}, "nothing"),
        ((WORDS, torch.zeros(2)), r"torch.int64 \(2, 5\)"),
        ([], "list"),
    ],
)
def test_other_batches_are_refused_by_what_came(batch, came):
    with pytest.raises(TypeError, match=f"perturbed.*but .*{came}"):
        inputs_to_perturb(batch)


@pytest.mark.parametrize("batch", [{"pixel_values": PIXELS, "labels": WORDS}, [PIXELS, WORDS], (PIXELS, WORDS), PIXELS])
def test_other_inputs_stand_in_another_batch_of_the_same_kind(batch):
    made = with_inputs(batch, inputs_to_perturb(batch), PIXELS + 1)
    assert type(made) is type(batch) and torch.equal(inputs_to_perturb(made).values, PIXELS + 1)
    assert torch.equal(inputs_to_perturb(batch).values, torch.zeros(2, 3, 4, 4))
    assert (
        made is PIXELS or isinstance(made, torch.Tensor) or WORDS is (made["labels"] if "labels" in made else made[1])
    )


def test_samples_are_taken_out_with_all_that_is_theirs():
    batch = tiny.text_batches(1)[0]
    taken = rows_of({**batch, "name": "any", "one": torch.ones(1)}, torch.tensor([2, 0]))
    assert all(torch.equal(taken[key], value[[2, 0]]) for key, value in batch.items())
    assert taken["name"] == "any" and len(taken["one"]) == 1
    images, labels = rows_of((PIXELS, torch.tensor([7, 8])), torch.tensor([1]))
    assert images.shape == (1, 3, 4, 4) and labels.tolist() == [8]


def test_the_share_is_exact_where_it_can_be_and_right_on_average_where_not():
    generator = torch.Generator().manual_seed(0)
    free = torch.tensor([True] * 6 + [False] * 4)
    for _ in range(20):
        drawn = drawn_rows(free, 0.5, generator)
        assert drawn.sum() == 3 and not (drawn & ~free).any()
    alone = [bool(drawn_rows(torch.tensor([True]), 0.25, generator)) for _ in range(2000)]
    assert sum(alone) / 2000 == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.bloom, tiny.bart, tiny.t5], ids=lambda make: make.__name__)
def test_embeddings_are_changed_once_wherever_a_model_makes_them(make, no_hooks_left):
    model = make()
    no_hooks_left(model)
    tokens = torch.randint(3, 30, (2, 5))
    seen = []
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if make is tiny.t5:
        given["decoder_input_ids"] = tokens
    if make is tiny.bart:
        given["input_ids"] = torch.cat([tokens[:, :-1], torch.full((2, 1), 2)], 1)  # its decoder looks for the end
    with torch.no_grad(), changed_embeddings(model, tokens, lambda made: seen.append(made) or made.flip(-1)):
        changed = model(**given).logits
    assert len(seen) == 1 and seen[0].shape[:2] == tokens.shape
    assert not torch.equal(changed, model(**given).logits)
    assert embedding_rows(model).shape[1] == seen[0].shape[2]


def test_models_that_make_no_embeddings_are_refused():
    with (
        pytest.raises(UnsupportedModelError, match="Sequential does not say which module"),
        changed_embeddings(tiny.mlp(), WORDS, lambda made: made),
    ):
        pass
    with (
        pytest.raises(UnsupportedModelError, match="did not call its input embeddings"),
        changed_embeddings(tiny.bert(), WORDS, lambda made: made),
    ):
        pass


def test_whole_numbers_are_text():
    assert Inputs("input_ids", WORDS).is_text and not Inputs("pixel_values", PIXELS).is_text
