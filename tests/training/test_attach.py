import logging

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.slice_and_reset import Random
from remos_hf.training.attach import attach_remos
from remos_hf.training.moments import Moments
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
    monkeypatch.setattr(Moments, "start", lambda *_: pytest.fail("sliced again"))
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


def test_the_summary_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="remos_hf"):
        attach_remos(trainer(tmp_path, kind=Trainer), slice_ratio=0.9)
    assert "Kept 3,686 of 4,096 weights" in caplog.text
    assert "Share kept by layer group: bert.encoder.layer.0" in caplog.text
