import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.slice_and_reset import Random
from remos_hf.training.attach import attach_remos
from remos_hf.training.moments import Moments
from tests import tiny
from tests.training.runs import arguments, trainer

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


def test_a_second_start_is_refused(tmp_path):
    theirs = trainer(tmp_path, kind=Trainer)
    attach_remos(theirs, slice_ratio=0.9)
    for one in (theirs, trainer(tmp_path, slice_ratio=0.9)):
        with pytest.raises(ValueError, match="has a student already"):
            attach_remos(one, slice_ratio=0.9)


def test_a_trainer_that_has_trained_is_refused_and_stays_as_it_is(tmp_path):
    theirs = trainer(tmp_path, kind=Trainer, options={"max_steps": 1})
    theirs.train()
    before = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    with pytest.raises(ValueError, match="trained for 1 steps"):
        attach_remos(theirs, slice_ratio=0.9)
    assert all(torch.equal(value, before[name]) for name, value in theirs.model.state_dict().items())


def test_a_trainer_that_makes_its_own_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_init"):
        attach_remos(Trainer(model_init=lambda: tiny.bert(), args=arguments(tmp_path)), slice_ratio=0.9)


def test_a_repository_that_was_made_before_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    attach_remos(trainer(tmp_path, kind=Trainer, options={"push_to_hub": True}), slice_ratio=0.9)
    assert "look whether it is public" in caplog.text


def test_a_model_that_was_given_fresh_lora_is_sliced_under_it_and_saved_merged(tmp_path):
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    theirs = trainer(tmp_path / "a", kind=Trainer, model=get_peft_model(tiny.bert(), lora))
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    ours = trainer(tmp_path / "b", slice_ratio=0.9, peft_config=lora)
    for one in (theirs, ours):
        one.train()
        one.save_model()
    assert sidecars.relevant_slice == ours.relevant_slice
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.attention.self.key.weight"):
        student = load_file(tmp_path / "a" / "model.safetensors")[name]  # no adapter is on these
        assert torch.equal(student, load_file(tmp_path / "b" / "model.safetensors")[name])
        assert not student[~sidecars.relevant_slice.kept[name]].any()


def test_an_attached_trainer_is_still_one_of_its_class(tmp_path):
    theirs = trainer(tmp_path, kind=Trainer)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    assert isinstance(theirs, Trainer) and type(theirs).__name__ == "Trainer"
    assert theirs.sidecars is sidecars and theirs.relevant_slice is sidecars.relevant_slice
    assert type(trainer(tmp_path, kind=Trainer)) is Trainer  # others of the class are left alone


def test_resuming_from_what_attach_remos_was_not_told_is_refused(tmp_path):
    ours = trainer(tmp_path / "other", kind=Trainer, options={"seed": 1})
    attach_remos(ours, strategy=Random(0.9))
    ours.train()
    theirs = trainer(tmp_path / "mine", kind=Trainer)
    attach_remos(theirs, slice_ratio=0.9)
    with pytest.raises(ValueError, match="another student"):
        theirs.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))


def test_a_run_resumes_from_its_own_checkpoint_without_a_new_trainer(tmp_path):
    theirs = trainer(tmp_path, kind=Trainer)
    attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    trained = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    theirs.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, trained[name]) for name, value in theirs.model.state_dict().items())


def test_the_coverage_is_that_of_max_samples_of_the_profile_dataset(tmp_path):
    known = trainer(tmp_path, kind=Trainer, train_dataset=tiny.dataset(10, seed=5)[:4])
    expected = attach_remos(known, slice_ratio=0.9)
    theirs = trainer(tmp_path, kind=Trainer)
    few = torch.utils.data.Subset(tiny.dataset(10, seed=5), range(4))
    assert attach_remos(theirs, slice_ratio=0.9, profile_dataset=few).profile == expected.profile
    theirs = trainer(tmp_path, kind=Trainer)
    assert attach_remos(theirs, slice_ratio=0.9, max_samples=3).profile.num_samples == 3


def test_what_was_sliced_is_told_in_one_line_by_default(tmp_path, caplog):
    theirs = trainer(tmp_path, kind=Trainer, options={"max_steps": 1})
    attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    told = [record.getMessage() for record in caplog.records if record.name.startswith("remos_hf.training.reporting")]
    assert told == [
        "Remos: the student keeps 3,686 of the 4,096 weights that compete (90.0%) by the coverage of 24 samples; the "
        "others were reset before the first step."
    ]


def test_the_summary_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="remos_hf"):
        attach_remos(trainer(tmp_path, kind=Trainer), slice_ratio=0.9)
    assert "Kept 3,686 of 4,096 weights" in caplog.text
    assert "Share kept by layer group: bert.encoder.layer.0" in caplog.text
