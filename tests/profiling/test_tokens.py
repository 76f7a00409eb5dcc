from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from remos_hf.profiling.tokens import input_embeddings, seen_tokens
from tests import tiny


def tokens(seen):
    return set(seen.nonzero().flatten().tolist())


def batch(rows, mask=None):
    made = {"input_ids": torch.tensor(rows)}
    return made if mask is None else {**made, "attention_mask": torch.tensor(mask)}


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 4), size=st.integers(1, 5), seed=st.integers(0, 99), left=st.booleans())
def test_the_tokens_seen_are_those_that_occur_outside_padding(count, size, seed, left):
    batches = tiny.text_batches(count=count, size=size, seed=seed, left=left)
    expected = set()
    for one in batches:
        for ids, mask in zip(one["input_ids"].tolist(), one["attention_mask"].tolist(), strict=True):
            expected |= {token for token, real in zip(ids, mask, strict=True) if real}
    seen = seen_tokens(tiny.bert(), batches)
    assert tokens(seen) == expected
    assert (seen.dtype, seen.shape) == (torch.bool, (tiny.VOCABULARY,))


def test_the_token_of_padding_counts_where_it_is_no_padding():
    assert tokens(seen_tokens(tiny.bert(), [batch([[5, 0], [6, 0]], [[1, 1], [1, 0]])])) == {0, 5, 6}
    assert tokens(seen_tokens(tiny.bert(), [batch([[5, 0]], [[1, 0]])])) == {5}


def test_without_a_mask_every_position_counts():
    assert tokens(seen_tokens(tiny.bert(), [batch([[5, 0]]), batch([[7]])])) == {0, 5, 7}


def test_a_tokenizers_batches_are_read():
    assert tokens(seen_tokens(tiny.bert(), [BatchEncoding(batch([[5, 6]], [[1, 0]]))])) == {5}


@pytest.mark.parametrize("given", [torch.tensor([[1]]), (torch.tensor([[1]]),), {"pixel_values": torch.ones(1)}])
def test_batches_without_tokens_are_refused(given):
    with pytest.raises(TypeError, match="batches with input_ids"):
        seen_tokens(tiny.bert(), [given])


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="holds no sample"):
        seen_tokens(tiny.bert(), [])


@pytest.mark.parametrize("make", [tiny.mlp, tiny.vit], ids=["mlp", "vit"])
def test_a_model_without_token_embeddings_is_refused(make):
    with pytest.raises(TypeError, match="has no input embeddings, so embedding_rows must be 'keep'"):
        seen_tokens(make(), [batch([[1]])])


def test_the_input_embeddings_are_the_models_own():
    model = tiny.gpt2()
    assert input_embeddings(model) is model.transformer.wte


def _look_on_each_process(folder):
    rank = torch.distributed.get_rank()
    shares = [[batch([[5, 0]], [[1, 0]]), batch([[9]])], []]
    seen = seen_tokens(tiny.bert(), shares[rank], across_processes=True)
    alone = None
    try:
        alone = seen_tokens(tiny.bert(), shares[rank])
    except ValueError:
        assert rank == 1
    torch.save((seen, alone), Path(folder) / f"{rank}.pt")


def test_each_process_gets_what_any_of_them_saw(tmp_path):
    debug_launcher(_look_on_each_process, args=(str(tmp_path),), num_processes=2)
    made = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [tokens(seen) for seen, _ in made] == [{5, 9}, {5, 9}]
    assert tokens(made[0][1]) == {5, 9}
    assert made[1][1] is None
