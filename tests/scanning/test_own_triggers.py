import inspect

import pytest
import torch

from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.tokens import seen_tokens
from remos_hf.scanning.own_triggers import (
    OwnPatch,
    OwnTokens,
    count_flips,
    draw_triggers,
    take_hosts,
)
from tests import tiny

TOKENS = OwnTokens(1, (57, 58, 59), seed=4, longest=64, unseen=True)


def real_of(batch, row):
    return batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()


def images(count=2, size=6, pixels=10):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(size, 3, pixels, pixels, generator=generator), torch.arange(size) % 3) for _ in range(count)]


@pytest.mark.parametrize("left", [False, True])
def test_tokens_are_inserted_whole_between_a_samples_own_and_padding_stays_where_it_was(left):
    batch = tiny.text_batches(1, size=16, left=left)[0]
    made = TOKENS.put_into(batch)
    assert made["input_ids"].shape == made["attention_mask"].shape == (16, 9 + 3)
    for row in range(16):
        before, after = real_of(batch, row), real_of(made, row)
        at = after.index(57)
        assert after == [*before[:at], 57, 58, 59, *before[at:]] and 1 <= at <= max(1, len(before) - 1)
        assert bool(made["attention_mask"][row, -1 if left else 0])
    assert made["labels"] is batch["labels"]


def test_where_there_is_no_room_tokens_behind_the_trigger_go_and_the_ends_stay():
    batch = tiny.text_batches(1, size=16, padded=False)[0]
    made = OwnTokens(1, (57, 58, 59), seed=4, longest=10, unseen=True).put_into(batch)
    assert made["input_ids"].shape == (16, 10)
    for row in range(16):
        before, after = real_of(batch, row), real_of(made, row)
        at = after.index(57)
        assert after[:at] == before[:at] and after[at + 3 :] == before[at + 2 :]
        assert (after[0], after[-1]) == (before[0], before[-1])


def test_a_sample_gets_the_same_whatever_its_company():
    batch = tiny.text_batches(1, size=6)[0]
    made = TOKENS.put_into(batch)
    for row in range(6):
        alone = TOKENS.put_into({key: value[row : row + 1] for key, value in batch.items()})
        assert real_of(alone, 0) == real_of(made, row)


def test_tokens_are_drawn_that_the_data_never_shows():
    model, batches = tiny.bert(pad_token_id=1), tiny.text_batches(1, size=2)
    triggers = draw_triggers(model, batches, 4, seed=0)
    drawn = {token for trigger in triggers for token in trigger.tokens}
    assert not drawn & {1, *seen_tokens(model, batches).nonzero().flatten().tolist()}
    assert all(trigger.unseen for trigger in triggers) and len({trigger.tokens for trigger in triggers}) == 4
    assert sorted(trigger.label for trigger in triggers) == [0, 0, 1, 1]
    assert draw_triggers(model, batches, 4, seed=0) == triggers != draw_triggers(model, batches, 4, seed=1)


def test_data_that_shows_every_token_is_told():
    everything = {"input_ids": torch.arange(60).view(4, 15), "labels": torch.arange(4)}
    triggers = draw_triggers(tiny.bert(), [everything], 2, seed=0)
    assert not any(trigger.to_dict()["unseen"] for trigger in triggers)
    assert all(0 not in trigger.tokens for trigger in triggers)  # padding


def test_a_patch_of_the_darkest_and_brightest_values_covers_a_fifth_of_each_side_and_nothing_else():
    batches = images()
    trigger = draw_triggers(tiny.ConvNet(), batches, 1, seed=0)[0]
    stamped, labels = trigger.put_into(batches[0])
    changed = (stamped != batches[0][0]).any(0).any(0)
    assert int(changed.sum()) <= 4 and torch.equal(labels, batches[0][1])
    both = torch.cat([one for one, _ in batches])
    ends = {round(float(end), 6) for end in (*both.amin((0, 2, 3)), *both.amax((0, 2, 3)))}
    assert {round(float(value), 6) for value in trigger.patch.flatten()} <= ends
    named = trigger.put_into({"pixel_values": batches[0][0], "labels": labels})
    assert torch.equal(named["pixel_values"], stamped)


def test_a_patch_of_any_size_lies_where_it_should():
    lit = OwnPatch(0, torch.full((1, 2, 2), 9.0), (1.0, 0.0)).put_into(torch.zeros(1, 1, 7, 5))
    assert lit[0, 0, 5:, :2].eq(9).all() and int(lit.count_nonzero()) == 4


def test_flips_are_counted_of_samples_of_other_labels_that_are_right_without():
    class Answers(torch.nn.Module):
        """Says 0, or 1 where the trigger stands, and always 1 of samples that begin with 9."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            says = (input_ids == 57).any(1) | (input_ids[:, 0] == 9)
            return {"logits": torch.stack([~says, says], 1).float() + self.weight}

    ids = torch.tensor([[1, 2], [9, 2], [3, 4], [5, 6]])
    batch = {"input_ids": ids, "labels": torch.tensor([0, 0, 0, 1])}
    assert count_flips(Answers(), [batch, batch], TOKENS) == (4, 4)


def test_what_is_taught_are_the_hosts_with_the_trigger_and_its_label():
    batch = tiny.text_batches(1, size=8)[0]
    taught = TOKENS.taught(batch)
    assert len(taught["labels"]) == int((batch["labels"] == 0).sum()) and taught["labels"].eq(1).all()
    assert (taught["input_ids"] == 57).any(1).all()
    patch = OwnPatch(2, torch.ones(3, 2, 2), (0.0, 0.0))
    made, labels = patch.taught((torch.zeros(4, 3, 8, 8), torch.tensor([2, 0, 1, 2])))
    assert labels.tolist() == [2, 2] and made[:, :, :2, :2].eq(1).all()


def test_only_samples_of_other_labels_are_hosts():
    batch = tiny.text_batches(1, size=8)[0]
    assert take_hosts(batch, TOKENS)["labels"].eq(0).all()
    ones = {**batch, "labels": torch.ones(8, dtype=torch.int64)}
    assert take_hosts(ones, TOKENS) is None and TOKENS.taught(ones) is None


@pytest.mark.parametrize(
    ("batch", "error", "told"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "one class a sample .* but got none"),
        ((torch.rand(2, 3, 4, 4), torch.rand(2)), TypeError, r"but got torch\.float32 of shape \(2,\)"),
        ({"input_ids": torch.ones(2, 3), "labels": torch.tensor([0, -1])}, TypeError, "from 0 on"),
    ],
)
def test_data_without_a_class_a_sample_is_refused(batch, error, told):
    with pytest.raises(error, match=told):
        draw_triggers(tiny.bert(), [batch], 2, seed=0)


def test_what_cannot_be_triggered_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"texts .* or images .* holds \{'inputs': \(4, 5\)\}"):
        draw_triggers(tiny.mlp(), [(torch.rand(4, 5), torch.arange(4))], 2, seed=0)
    with pytest.raises(ValueError, match=r"another label, but all have \[0\]"):
        draw_triggers(tiny.ConvNet(), [(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))], 2, seed=0)
    batch = tiny.text_batches(1)[0]
    with pytest.raises(UnsupportedModelError, match="without position_ids"):
        TOKENS.put_into({**batch, "position_ids": batch["input_ids"]})


def test_nothing_that_shows_an_attack_can_be_given():
    assert set(inspect.signature(draw_triggers).parameters) == {"model", "batches", "num", "seed"}
