import torch

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.profiling.unpadded import without_padding
from tests import tiny


def sentences(batches):
    return sorted(
        (tuple(ids[mask.bool()].tolist()), int(label))
        for batch in batches
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    )


def test_every_sample_is_there_once_with_its_label_and_without_padding():
    for left in (False, True):
        given = tiny.text_batches(left=left)
        found = without_padding(adapter_for(tiny.bert()), given)
        assert all(bool(batch["attention_mask"].all()) for batch in found)
        assert sentences(found) == sentences(given)
        assert len(found) == len({len(ids) for ids, _ in sentences(given)})


def test_batches_without_padding_stay_as_they_are():
    for given in (tiny.text_batches(padded=False), tiny.image_batches()):
        model = tiny.bert() if isinstance(given[0], dict) else tiny.ConvNet()
        found = without_padding(adapter_for(model, ()), given)
        assert all(one is other for one, other in zip(found, given, strict=True))


def test_a_sample_of_padding_alone_is_left_out():
    batch = tiny.text_batches(1)[0]
    batch["attention_mask"][1] = 0
    found = without_padding(adapter_for(tiny.bert()), [batch])
    assert sum(len(one["input_ids"]) for one in found) == len(batch["input_ids"]) - 1


def test_a_batch_is_cut_where_it_would_hold_too_many_positions():
    batch = {"input_ids": torch.ones(500, 9, dtype=torch.int64), "attention_mask": torch.ones(500, 9)}
    batch["attention_mask"][:, -1] = 0
    found = without_padding(adapter_for(tiny.bert()), [batch])
    assert [len(one["input_ids"]) for one in found] == [500]
    found = without_padding(adapter_for(tiny.bert()), [{key: one[:250] for key, one in batch.items()}] * 4)
    assert [len(one["input_ids"]) for one in found] == [281, 281, 281, 157]
