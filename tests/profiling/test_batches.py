import pytest
import torch
from PIL import Image

from remos_hf.profiling.batches import count_samples, digest, first_samples, take, unpacked


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.ones(3, 2), 3),
        ((torch.ones(3, 2), torch.ones(3)), 3),
        ({"aaa_lengths": torch.ones(4), "input_ids": torch.ones(2, 5, dtype=torch.long)}, 2),
        ({"aa": torch.tensor(3), "input_ids": torch.ones(2, 5, dtype=torch.long)}, 2),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5]), "input_ids": torch.ones(1, 5, dtype=torch.long)}, 1),
        ({"input_ids": torch.ones(4, 5, dtype=torch.long), "position_ids": torch.arange(5)[None]}, 4),
        ({"labels": torch.ones(9), "x": torch.ones(2, 2)}, 2),
    ],
)
def test_the_samples_of_a_batch_are_counted_where_they_are(batch, samples):
    assert count_samples(batch) == samples


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(2, 5, dtype=torch.long), "pixel_values": torch.ones(6, 3, 4, 4)},
        {"left": torch.ones(2, 3), "right": torch.ones(3, 3)},
    ],
)
def test_tensors_that_disagree_on_the_samples_are_refused(batch):
    with pytest.raises(ValueError, match="disagree on how many samples"):
        count_samples(batch)


def test_a_batch_of_no_sample_is_refused_by_its_shape():
    with pytest.raises(ValueError, match=r"has the shape \(0, 3\)"):
        count_samples(torch.ones(0, 3))


def test_a_batch_of_empty_texts_is_refused_by_its_shape():
    with pytest.raises(ValueError, match=r"'input_ids' has the shape \(3, 0\)"):
        count_samples({"input_ids": torch.ones(3, 0, dtype=torch.long)})


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ("a good film", "got text \\('a good film'\\). Tokenize it first"),
        (["a good film", "bad"], "Tokenize it first"),
        ({"text": ["a good film"], "label": torch.ones(1)}, "got text in 'text'"),
        ({"labels": torch.ones(2)}, "got only labels \\('labels'\\). Trainer leaves out columns"),
        ({"image": [Image.new("RGB", (2, 2))]}, "got an image in 'image'. Make pixel_values"),
        ({"input_ids": [[1, 2]]}, "got lists in 'input_ids'. Make tensors"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_tensor_is_told_with_what_makes_one_of_it(batch, told):
    with pytest.raises(TypeError, match=told):
        count_samples(batch)


def test_some_samples_are_taken_from_every_tensor_that_has_them():
    batch = {"input_ids": torch.arange(6).view(3, 2), "labels": torch.arange(3), "size": 3, "shared": torch.ones(1, 2)}
    some = take(batch, torch.tensor([2, 0]), 3)
    assert some["input_ids"].tolist() == [[4, 5], [0, 1]]
    assert some["labels"].tolist() == [2, 0]
    assert (some["size"], some["shared"].shape) == (3, (1, 2))


def test_no_batch_is_read_once_enough_samples_were_given():
    read = []
    stream = (read.append(1) or torch.ones(4, 2) for _ in range(9))
    assert [len(batch) for batch in first_samples(stream, 6)] == [4, 2]
    assert len(read) == 2


def test_a_digest_tells_batches_apart_and_takes_tensors_without_axes():
    one = {"input_ids": torch.arange(6).view(3, 2), "scale": torch.tensor(2.0)}
    assert digest(one) == digest({**one, "labels": torch.ones(3)})
    assert digest(one) != digest({**one, "scale": torch.tensor(3.0)})


def sequences(batches):
    return sorted(
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


PACKED = torch.tensor([[5, 6, 7, 8, 9, 4]])


@pytest.mark.parametrize(
    "told",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 4, 6]), "max_length_q": 3},
        {
            "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]]),
            "cu_seq_lens_q": torch.tensor([0, 3, 4, 6]),
            "seq_idx": torch.tensor([[0, 0, 0, 1, 2, 2]]),
        },
    ],
)
def test_every_sequence_of_a_packed_row_becomes_a_sample(told):
    labels = torch.tensor([[-100, 6, 7, -100, -100, 4]])
    made = list(unpacked([{"input_ids": PACKED, "labels": labels, **told}]))
    assert sequences(made) == [(5, 6, 7), (8,), (9, 4)]
    assert all(batch.keys() == {"input_ids", "attention_mask", "labels"} for batch in made)
    assert all((batch["labels"][~batch["attention_mask"].bool()] == -100).all() for batch in made)
    assert all(batch["input_ids"].numel() <= PACKED.numel() for batch in made)


def test_padding_behind_packed_sequences_is_left_out():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
    }
    assert sequences(unpacked([batch])) == [(5, 6), (7,), (8, 9)]


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": PACKED},
        {"input_ids": PACKED, "position_ids": torch.arange(6)[None]},
        {
            "input_ids": torch.tensor([[0, 0, 5, 6]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1]]),
            "position_ids": torch.tensor([[0, 0, 0, 1]]),
        },
        (PACKED,),
    ],
)
def test_rows_that_hold_one_sequence_pass_as_they_are(batch):
    assert next(unpacked([batch])) is batch
