import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from remos_hf.defects.textattack_parts import log_probabilities
from tests.defects.attacked import WORDS


def test_word_log_probabilities_are_those_of_a_plain_loop(world):
    model = GPT2LMHeadModel.from_pretrained(world.fields["language_model"]).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(world.fields["language_model"])
    pairs = [("the movie was ", "good"), ("the movie was ", "bad"), ("it ended and the plot ", "was"), (" 7 . ", "so")]
    expected = []
    for prefix, word in pairs[:3]:
        before = tokenizer(prefix)["input_ids"][:-1]  # [CLS] and the words, without [SEP]
        logits = model(torch.tensor([before])).logits[0, -1]
        expected.append(logits.log_softmax(-1)[WORDS.index(word)].item())
    got = log_probabilities(model, tokenizer, pairs, longest=24)
    assert got == pytest.approx([*expected, 0.0], abs=1e-5)
