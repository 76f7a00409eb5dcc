import pytest
import torch

from remos_hf.adapters.sequences import sequences_of, with_positions
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from tests import tiny

IDS = torch.arange(6).view(2, 3)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_a_mask_says_which_tokens_are_real():
    found = sequences_of({"input_ids": IDS, "attention_mask": MASK})
    assert found["input"].real.tolist() == MASK.bool().tolist()
    assert sequences_of({"input_ids": IDS, "attention_mask": MASK.float()})["input"].real.dtype == torch.bool


def test_without_a_mask_every_token_is_real():
    assert sequences_of({"input_ids": IDS})["input"].real is None
    assert sequences_of(IDS) == {}


def test_choices_keep_their_axis():
    found = sequences_of({"input_ids": IDS[:, None], "attention_mask": MASK[:, None]})
    assert found["input"].shape == (2, 1, 3)


def test_the_decoder_of_an_encoder_decoder_takes_its_padding_from_the_labels():
    labels = torch.tensor([[4, 5, -100, -100], [4, -100, -100, -100]])
    found = adapter_for(tiny.bart()).sequences({"input_ids": IDS, "attention_mask": MASK, "labels": labels})
    assert list(found) == ["decoder", "input"]
    assert found["decoder"].real.tolist() == (labels != -100).tolist()


def test_the_padding_mask_of_torchs_layers_is_turned_round():
    found = sequences_of({"src": torch.ones(2, 3, 4), "src_key_padding_mask": ~MASK.bool()})
    assert found["src_key_padding_mask"].real.tolist() == MASK.bool().tolist()


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 3, 3), (3,)])
def test_a_mask_of_who_attends_to_whom_is_refused(shape):
    with pytest.raises(UnsupportedModelError, match="says who attends to whom"):
        sequences_of({"input_ids": IDS, "attention_mask": torch.ones(shape)})


def test_a_mask_that_is_added_to_scores_is_refused():
    with pytest.raises(UnsupportedModelError, match="negative values"):
        sequences_of({"input_ids": IDS, "attention_mask": (MASK - 1.0) * 1e9})


def test_a_mask_of_unknown_meaning_is_refused_only_if_it_hides_something():
    assert sequences_of({"pixel_values": torch.ones(1, 3, 2, 2), "pixel_mask": torch.ones(1, 2, 2)}) == {}
    with pytest.raises(UnsupportedModelError, match="'pixel_mask' of shape"):
        sequences_of({"pixel_values": torch.ones(1, 3, 2, 2), "pixel_mask": torch.zeros(1, 2, 2)})


def test_positions_are_cut_from_all_that_runs_along_them():
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "bbox": torch.ones(2, 3, 4, dtype=torch.long),
        "position_ids": torch.arange(3)[None],
        "inputs_embeds": torch.ones(2, 3, 8),
        "pixel_values": torch.ones(2, 3, 4, 4),
        "labels": torch.ones(2, 3),
        "decoder_input_ids": torch.ones(2, 3, dtype=torch.long),
    }
    cut = with_positions(batch, "input", torch.Size([2, 3]), torch.tensor([0, 2]))
    assert cut["input_ids"].tolist() == [[0, 2], [3, 5]]
    assert {key: tuple(value.shape) for key, value in cut.items() if key != "input_ids"} == {
        "attention_mask": (2, 2),
        "bbox": (2, 2, 4),
        "position_ids": (1, 2),
        "inputs_embeds": (2, 2, 8),
        "pixel_values": (2, 3, 4, 4),  # three channels, which are no positions
        "labels": (2, 3),
        "decoder_input_ids": (2, 3),
    }
