import pytest
import torch

from remos_hf.scanning.hosts import margins, read_texts, reading, short_hosts, strong_hosts, turning
from tests.scanning import trained


def texts(batches=None, **options):
    options = {"seed": 0, "room": 1, **options}
    return read_texts(trained.student(), trained.batches() if batches is None else batches, **options)


def test_what_all_texts_begin_and_end_with_is_the_frame():
    found = texts()
    assert (found.start, found.end, found.frame()) == (1, 1, {trained.START, trained.END})
    assert found.num_samples == 192 and int(found.counts[trained.START]) == 192
    assert int(found.counts[list(trained.UNSEEN)].sum()) == 0


def test_padding_and_packing_change_nothing():
    batches = trained.batches(2)
    padded = [
        {
            "input_ids": torch.nn.functional.pad(one["input_ids"], (0, 3)),
            "attention_mask": torch.nn.functional.pad(one["attention_mask"], (0, 3)),
            "labels": one["labels"],
        }
        for one in batches
    ]
    plain, other = texts(batches), texts(padded)
    assert torch.equal(plain.counts, other.counts)
    assert all(torch.equal(a, b) for label in (0, 1) for a, b in zip(plain.rows[label], other.rows[label], strict=True))


def test_texts_without_a_common_token_have_no_frame():
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "labels": torch.tensor([0, 1])}
    found = texts([batch])
    assert (found.start, found.end, found.frame()) == (0, 0, set())


def test_a_piece_stands_behind_the_first_special_token_or_in_the_middle():
    found = texts()
    start, middle = (found.host(1, (0, 1), 4, in_middle=there) for there in (False, True))
    piece = torch.tensor([[50, 51]])
    assert start.with_inserted(piece)[0, :3].tolist() == [trained.START, 50, 51]
    inserted = middle.with_inserted(piece)[0].tolist()
    assert inserted[5:7] == [50, 51] and inserted[0] == trained.START and inserted[-1] == trained.END
    assert len(inserted) == 12  # two texts' first four tokens, the frame, the piece


def test_held_out_hosts_are_right_and_share_no_text_with_what_was_searched():
    found = texts()
    with reading(trained.student()) as reader:
        searched = short_hosts(found, reader, 4, 4)
        strong = strong_hosts(found, reader, searched, 10, 2)
        assert all(gap > 0 for some in strong.values() for gap in reader.right(some))
    for label in (0, 1):
        assert len(searched[label]) == 4 and len(strong[label]) == 10
        taken = {row for host in searched[label] for row in host.rows}
        assert not taken & {row for host in strong[label] for row in host.rows}


def test_hosts_fit_into_a_model_of_few_positions():
    long = [{**one, "input_ids": one["input_ids"].repeat(1, 3), "attention_mask": None} for one in trained.batches(2)]
    long = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in long]
    found = texts(long, room=3)
    with reading(trained.student()) as reader:
        short = short_hosts(found, reader, 4, 99)
        strong = strong_hosts(found, reader, short, 10, 2)
        longest = max(len(host.ids) for some in (*short.values(), *strong.values()) for host in some)
        assert longest + 3 <= 32  # tiny.bert has 32 positions
        turning(reader, strong, torch.tensor([[5, 6, 7]]))


def test_a_margin_is_the_gap_to_the_largest_other_logit():
    logits = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 1.0]])
    assert margins(logits, torch.tensor([1])).tolist() == [2.0, -3.0]
    assert margins(logits, torch.tensor([1, 0])).tolist() == [2.0, 2.0]


def test_turning_is_the_mean_over_hosts_of_other_labels():
    found = texts()
    with reading(trained.student()) as reader:
        hosts = short_hosts(found, reader, 3, 4)
        piece = torch.tensor([[50], [6]])
        by_hand = [
            torch.stack([
                margins(reader.logits(host.with_inserted(piece)), torch.tensor([label])) for host in hosts[1 - label]
            ]).mean(0)
            for label in (0, 1)
        ]  # fmt: skip
        assert torch.allclose(turning(reader, hosts, piece), torch.stack(by_hand), atol=1e-6)


@pytest.mark.parametrize("label", [-100, 7])
def test_a_label_that_is_no_class_of_the_student_is_named(label):
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "labels": torch.tensor([0, label])}
    with pytest.raises(ValueError, match=f"the label {label}, but the student answers 2 classes"):
        texts([batch])


def test_a_long_common_beginning_leaves_a_token_of_each_text():
    # As of an instruction before every text: longer than a host may be.
    rows = torch.cat([torch.full((8, 29), 5), torch.arange(10, 26).view(8, 2)], 1)
    found = texts([{"input_ids": rows, "labels": torch.tensor([0, 1] * 4)}])
    assert found.start == 29 and found.limit == 29
    with reading(trained.student()) as reader:
        searched = short_hosts(found, reader, 4, 4)
    assert all(len(host.ids) == 30 for some in searched.values() for host in some)
