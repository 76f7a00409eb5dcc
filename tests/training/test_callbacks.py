import logging

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos
from remos_hf.training.callbacks import attach_remos, student_batches
from tests import tiny
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("options", [{"slice_ratio": 0.9}, {"strategy": Random(0.8)}])
def test_an_attached_trainer_trains_the_student_of_remos_trainer(tmp_path, options):
    theirs = trainer(tmp_path / "a", kind=Trainer)
    sidecars = attach_remos(theirs, **options)
    theirs.train()
    ours = trainer(tmp_path / "b", **options)
    ours.train()
    assert same(theirs.model, ours.model)
    assert sidecars.relevant_slice == ours.relevant_slice


def test_sidecars_lie_beside_checkpoints_and_the_student(tmp_path):
    theirs = trainer(tmp_path, kind=Trainer)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    theirs.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert RelevantSlice.from_pretrained(folder) == sidecars.relevant_slice


def test_resuming_takes_the_checkpoints_slice(tmp_path, monkeypatch):
    theirs = trainer(tmp_path, kind=Trainer)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    monkeypatch.setattr("remos_hf.training.callbacks.start_student", lambda *_: pytest.fail("sliced again"))
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path, kind=Trainer)
    again = attach_remos(resumed, slice_ratio=0.9, resume_from_checkpoint=checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(resumed.model, theirs.model)
    assert again.relevant_slice == sidecars.relevant_slice


def test_a_sequence_to_sequence_trainer_can_be_attached(tmp_path):
    from transformers import BartForConditionalGeneration

    model = BartForConditionalGeneration(tiny.bart().config)
    rows = [{**row, "labels": row["input_ids"][:3]} for row in tiny.dataset(8)]

    def pad(batch):
        padded = tiny.pad([{**row, "labels": 0} for row in batch])
        return {**padded, "labels": torch.tensor([row["labels"] for row in batch])}

    args = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True, save_strategy="no"
    )
    theirs = Seq2SeqTrainer(model=model, args=args, train_dataset=rows, data_collator=pad)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    assert any(".decoder." in name for name in sidecars.relevant_slice.kept)
    assert Sidecars.load(tmp_path).relevant_slice == sidecars.relevant_slice


def test_a_strategy_that_acts_in_the_loss_is_refused(tmp_path):
    class Penal(Strategy):
        def penalty(self, model, inputs, outputs):
            return None

    with pytest.raises(ValueError, match="Use RemosTrainer"):
        attach_remos(trainer(tmp_path, kind=Trainer), strategy=Penal())


def test_the_summary_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="remos_hf"):
        attach_remos(trainer(tmp_path, kind=Trainer), slice_ratio=0.9)
    assert "Kept 3,686 of 4,096 weights" in caplog.text
    assert "Share kept by layer group: bert.encoder.layer.0" in caplog.text


def tokens(batches):
    return [row[row != 0].tolist() for batch in batches for row in batch["input_ids"]]


@pytest.fixture
def finetuner(tmp_path):
    return trainer(tmp_path, strategy=Finetune(), train_dataset=tiny.dataset(10))


def test_batches_hold_every_sample_once_in_order(finetuner):
    assert tokens(student_batches(finetuner)) == [row["input_ids"] for row in tiny.dataset(10)]


def test_reading_the_batches_leaves_the_global_random_state_alone(finetuner):
    state = torch.random.get_rng_state()
    list(student_batches(finetuner, 4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_max_samples_are_drawn_from_the_whole_data_by_the_seed(finetuner):
    drawn = tokens(student_batches(finetuner, 4))
    everything = [row["input_ids"] for row in tiny.dataset(10)]
    assert len(drawn) == 4
    assert drawn != everything[:4]
    assert all(row in everything for row in drawn)
    assert drawn == tokens(student_batches(finetuner, 4))


@pytest.mark.parametrize("samples", [None, 7])
def test_the_shares_of_processes_are_the_batches_of_one(finetuner, monkeypatch, samples):
    whole = tokens(student_batches(finetuner, samples))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(type(finetuner.args), "process_index", rank)
        monkeypatch.setattr(type(finetuner.args), "world_size", 3)
        shares += tokens(student_batches(finetuner, samples))
    assert sorted(shares) == sorted(whole)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny.dataset(10))


def test_a_stream_is_profiled_too(tmp_path):
    ours = trainer(tmp_path, strategy=Remos(0.9, max_samples=6), train_dataset=Stream(), options={"max_steps": 1})
    ours.train()
    assert ours.profile.num_samples == 6
    known = trainer(tmp_path / "b", slice_ratio=0.9, train_dataset=tiny.dataset(10)[:6], options={"max_steps": 1})
    known.train()
    assert ours.profile == known.profile


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path):
    rows = [{**row, "sentence": "text", "idx": n} for n, row in enumerate(tiny.dataset(8))]
    ours = trainer(tmp_path, strategy=Finetune(), train_dataset=datasets.Dataset.from_list(rows))
    assert tokens(student_batches(ours)) == [row["input_ids"] for row in tiny.dataset(8)]
