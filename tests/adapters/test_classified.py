import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from remos_hf.adapters.classified import labels_in, logits_in
from remos_hf.errors import UnsupportedModelError

LOGITS, LABELS = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS,),
        (torch.tensor(0.3), LOGITS),
        [LOGITS, torch.randn(4, 2, 5)],
        {"logits": LOGITS},
        {"logits": LOGITS, "loss": torch.tensor(0.1)},
        SequenceClassifierOutput(logits=LOGITS),
        SequenceClassifierOutput(loss=torch.tensor(0.1), logits=LOGITS),
    ],
)
def test_logits_are_found_however_they_are_returned(output):
    assert logits_in(output, nn.Identity()) is LOGITS


@pytest.mark.parametrize("output", [None, {"out": LOGITS}, (), LOGITS[0], LOGITS[None], {"logits": None}, "text"])
def test_an_output_without_logits_is_refused_by_the_models_name(output):
    with pytest.raises(UnsupportedModelError, match=r"shape \(samples, labels\), but Identity returns"):
        logits_in(output, nn.Identity())


@pytest.mark.parametrize("key", ["labels", "label", "label_ids"])
def test_labels_are_found_under_every_key_and_beside_inputs(key):
    for batch in ({key: LABELS, "x": LOGITS}, (LOGITS, LABELS), [LOGITS, LABELS.to(torch.uint8)]):
        assert labels_in(batch).tolist() == LABELS.tolist() and labels_in(batch).dtype == torch.int64


@pytest.mark.parametrize("batch", [LOGITS, (LOGITS,), {"x": LOGITS}, {"labels": None}, (LOGITS, None)])
def test_a_batch_without_labels_has_none(batch):
    assert labels_in(batch) is None


@pytest.mark.parametrize("labels", [LABELS.float(), LABELS[:, None], nn.functional.one_hot(LABELS), LABELS.tolist(), 3])
def test_labels_of_another_form_are_refused(labels):
    with pytest.raises(TypeError, match="one class a sample, a whole number in a tensor"):
        labels_in((LOGITS, labels))
