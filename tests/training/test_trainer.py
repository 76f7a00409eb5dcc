import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import debug_launcher
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForSequenceClassification, Trainer

from remos_hf.errors import LayerMismatchError, RemosError, UnsupportedModelError
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.profiling.tokens import seen_tokens
from remos_hf.slicing.refill import reset_outside, reset_unseen_rows
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice
from remos_hf.strategies.base import Hold, Strategy
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.slice_and_reset import Random, Remos
from remos_hf.training.moments import Moments
from remos_hf.training.profiling_data import student_batches
from remos_hf.training.trainer import RemosTrainer
from tests import tiny
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")

SIDECARS = {"remos_config.json", "remos_coverage.safetensors", "remos_slice.safetensors"}


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_student_is_sliced_before_it_trains_and_trains_from_there(tmp_path):
    ours = trainer(tmp_path, slice_ratio=0.9, options={"learning_rate": 0.0})
    by_hand = tiny.bert()
    ours.train()
    profile = profile_coverage(by_hand, student_batches(trainer(tmp_path, strategy=Finetune())))
    reset_outside(by_hand, choose_slice(by_hand, profile, slice_ratio=0.9))
    assert same(weights(ours.model), weights(by_hand))
    assert ours.profile == profile
    assert ours.relevant_slice.slice_ratio == 0.9


def test_the_coverage_is_that_of_the_profile_dataset_where_there_is_one(tmp_path):
    plain = trainer(tmp_path, slice_ratio=0.9)
    part = torch.utils.data.Subset(plain.train_dataset, range(5))
    ours = trainer(tmp_path, slice_ratio=0.9, profile_dataset=part)
    ours.train()
    other = trainer(tmp_path, strategy=Finetune(), train_dataset=part)
    assert ours.profile == profile_coverage(tiny.bert(), student_batches(other))
    assert ours.profile.num_samples == 5 and len(ours.train_dataset) == len(plain.train_dataset)


def test_plain_finetuning_is_trainers_own_bit_for_bit(tmp_path):
    ours = trainer(tmp_path / "a", strategy=Finetune())
    ours.train()
    theirs = trainer(tmp_path / "b", kind=Trainer)
    theirs.train()
    assert same(weights(ours.model), weights(theirs.model))
    assert ours.relevant_slice is None


def test_preparing_does_not_move_the_random_state(tmp_path):
    # The same order of samples and the same dropout for every strategy, or they cannot be compared.
    class Drawing(Strategy):
        def prepare(self, student, data):
            for _ in data.batches():
                torch.randn(3), random.random(), np.random.random()  # noqa: NPY002
            return super().prepare(student, data)

    ours = trainer(tmp_path / "a", strategy=Drawing())
    ours.train()
    theirs = trainer(tmp_path / "b", kind=Trainer)
    theirs.train()
    assert same(weights(ours.model), weights(theirs.model))


@pytest.mark.parametrize(
    "strategy", [Remos(0.9), Random(0.9, reset_to="init"), Retrain()], ids=lambda s: type(s).__name__
)
def test_two_runs_give_the_same_bits(tmp_path, strategy):
    one = trainer(tmp_path / "a", strategy=strategy)
    one.train()
    two = trainer(tmp_path / "b", strategy=strategy)
    two.train()
    assert same(weights(one.model), weights(two.model))


def test_resuming_goes_on_and_never_slices_again(tmp_path, monkeypatch):
    whole = trainer(tmp_path / "whole", slice_ratio=0.8)
    whole.train()
    first = trainer(tmp_path / "cut", slice_ratio=0.8)
    first.train()
    monkeypatch.setattr(Moments, "start", lambda *_: pytest.fail("sliced again"))
    resumed = trainer(tmp_path / "cut", slice_ratio=0.8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert same(weights(resumed.model), weights(whole.model))
    assert resumed.relevant_slice == whole.relevant_slice
    assert resumed.profile == whole.profile
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    last = trainer(tmp_path / "cut", slice_ratio=0.8)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 4
    assert same(weights(last.model), weights(whole.model))


def test_resuming_another_strategys_checkpoint_is_refused(tmp_path):
    trainer(tmp_path, slice_ratio=0.8).train()
    with pytest.raises(RemosError, match="slice_ratio=0.8, but the trainer asks for Remos with slice_ratio=0.7"):
        trainer(tmp_path, slice_ratio=0.7).train(resume_from_checkpoint=True)


def test_resuming_a_plain_trainers_checkpoint_is_refused(tmp_path):
    trainer(tmp_path, kind=Trainer).train()
    with pytest.raises(FileNotFoundError, match="not saved by RemosTrainer"):
        trainer(tmp_path, slice_ratio=0.8).train(resume_from_checkpoint=True)


def test_resuming_without_a_checkpoint_is_refused_before_slicing(tmp_path):
    ours = trainer(tmp_path / "none", slice_ratio=0.8)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        ours.train(resume_from_checkpoint=True)
    assert same(weights(ours.model), weights(tiny.bert()))


def test_training_on_goes_on_from_the_trained_student(tmp_path, monkeypatch):
    ours = trainer(tmp_path, slice_ratio=0.5)
    ours.train()
    relevant = ours.relevant_slice
    monkeypatch.setattr(Moments, "start", lambda *_: pytest.fail("sliced again"))
    ours.train()
    assert ours.relevant_slice is relevant
    assert sum(type(callback).__name__ == "StartLog" for callback in ours.callback_handler.callbacks) == 1


def test_the_saved_student_is_an_ordinary_checkpoint_with_sidecars(tmp_path):
    ours = trainer(tmp_path, slice_ratio=0.9)
    ours.train()
    ours.save_model(tmp_path / "student")
    assert {path.name for path in (tmp_path / "student").iterdir()} >= SIDECARS | {"model.safetensors", "config.json"}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert same(weights(loaded), weights(ours.model))
    assert RelevantSlice.from_pretrained(tmp_path / "student", teacher=tiny.bert()) == ours.relevant_slice
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} >= SIDECARS
    assert not SIDECARS & {path.name for path in tmp_path.iterdir()}  # no student was saved there


def test_before_training_nothing_is_claimed(tmp_path):
    ours = trainer(tmp_path, slice_ratio=0.9)
    ours.save_model(tmp_path / "teacher")
    assert ours.relevant_slice is None
    assert not SIDECARS & {path.name for path in (tmp_path / "teacher").iterdir()}


@pytest.mark.parametrize("options", [{}, {"slice_ratio": 0.9, "strategy": Finetune()}])
def test_neither_or_both_ways_to_ask_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="either slice_ratio= .* or strategy="):
        trainer(tmp_path, **options)


@pytest.mark.parametrize("ratio", [0, 1.2, -1])
def test_a_ratio_out_of_range_is_refused_at_once(tmp_path, ratio):
    with pytest.raises(ValueError, match=f"got {ratio}"):
        trainer(tmp_path, slice_ratio=ratio)


def test_model_init_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_init"):
        trainer(tmp_path, slice_ratio=0.9, model_init=tiny.bert)


def test_an_empty_or_missing_dataset_is_refused_and_the_model_left_whole(tmp_path):
    ours = trainer(tmp_path, slice_ratio=0.9, train_dataset=[])
    with pytest.raises(ValueError, match="nothing to profile"):
        ours.train()
    assert same(weights(ours.model), weights(tiny.bert()))
    ours = trainer(tmp_path, slice_ratio=0.9)
    ours.train_dataset = None
    with pytest.raises(ValueError, match="no train_dataset"):
        ours.train()


def test_a_model_that_cannot_be_ranked_is_refused_and_left_whole(tmp_path):
    model = tiny.bert()
    model.bert.encoder.double()
    with pytest.raises(UnsupportedModelError, match="float64"):
        trainer(tmp_path, model=model, slice_ratio=0.9).train()


def test_a_model_without_sliceable_layers_is_refused(tmp_path):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

    with pytest.raises(LayerMismatchError, match="no weight that can be sliced"):
        trainer(tmp_path, model=Head(), strategy=Remos(0.9, head=("head",))).train()


def _update(folder, steps, size, kind=RemosTrainer, **remos):
    options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": size, "max_steps": 1}
    options |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    ours = trainer(folder, kind=kind, model=tiny.bert(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
                   options=options, **remos)  # fmt: skip
    before = weights(ours.model)
    ours.train()
    return torch.cat([(after - before[name]).flatten() for name, after in weights(ours.model).items()])


class Penal(Strategy):
    """Adds a penalty that is worth one tenth of the head's squared weights."""

    def hold(self, student, teacher):
        return PenalHold()


class PenalHold(Hold):
    def loss(self, model, inputs, run):
        loss, outputs = run(inputs)
        return loss + 0.1 * model.classifier.weight.square().sum(), outputs


@pytest.mark.parametrize("strategy", [Finetune(), Penal()], ids=lambda s: type(s).__name__)
def test_accumulating_four_batches_gives_the_update_of_one_large_batch(tmp_path, strategy):
    one = _update(tmp_path / "1", steps=1, size=8, strategy=strategy)
    four = _update(tmp_path / "4", steps=4, size=2, strategy=strategy)
    assert one.abs().max() > 1e-4
    assert torch.allclose(one, four, atol=1e-6)


class Recording(Strategy):
    """Writes down its moments, puts zeros for the labels, and adds a constant to the loss."""

    def __init__(self):
        object.__setattr__(self, "moments", [])

    def prepare(self, student, data):
        self.moments.append(f"prepare {data.seed}")
        student.classifier.weight.data.fill_(5)
        return super().prepare(student, data)

    def hold(self, student, teacher):
        assert not teacher.training and not any(one.requires_grad for one in teacher.parameters())
        assert torch.equal(teacher.classifier.weight, tiny.bert().classifier.weight)
        self.moments.append("hold")
        return RecordingHold(self.moments)


class RecordingHold(Hold):
    def __init__(self, moments):
        self.moments = moments

    def loss(self, model, inputs, run):
        assert model.training
        self.moments.append("loss")
        loss, outputs = run({**inputs, "labels": torch.zeros_like(inputs["labels"])})
        assert outputs["logits"].shape == (4, 2)
        return loss + 100, outputs

    def after_step(self, model):
        self.moments.append("after_step")

    def finish(self, model, data):
        self.moments.append(f"finish {sum(len(batch['labels']) for batch in data.batches(5))}")


def test_the_moments_come_in_their_order_and_only_while_training(tmp_path):
    strategy = Recording()
    ours = trainer(tmp_path, strategy=strategy, options={"max_steps": 2})
    ours.train()
    step = ["loss", "after_step"]
    assert strategy.moments == ["prepare 42", "hold", *step, *step, "finish 5"]
    assert ours.state.log_history[0]["loss"] > 100
    assert ours.evaluate()["eval_loss"] < 20
    assert strategy.moments[-1] == "finish 5"


def test_a_strategy_without_a_hold_leaves_the_loss_of_trainer_untouched(tmp_path):
    ours = trainer(tmp_path, slice_ratio=0.9, options={"max_steps": 1})
    ours.train()
    assert "compute_loss" not in vars(ours)
    assert RemosTrainer.compute_loss is Trainer.compute_loss


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2, **options)


def test_lora_is_added_to_the_sliced_base_and_saved_merged(tmp_path):
    ours = trainer(tmp_path, slice_ratio=0.6, peft_config=lora())
    ours.train()
    base = ours.model.get_base_model().bert.encoder.layer[0].intermediate.dense.weight
    kept = ours.relevant_slice.kept["bert.encoder.layer.0.intermediate.dense.weight"]
    assert not base[~kept].any()
    assert torch.equal(base[kept], tiny.bert().bert.encoder.layer[0].intermediate.dense.weight[kept])
    ours.save_model(tmp_path / "student")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    batch = tiny.text_batches(1)[0]
    ours.model.eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, ours.model(**batch).logits, atol=1e-5)
        assert not torch.allclose(loaded(**batch).logits, tiny.bert()(**batch).logits, atol=1e-3)
    assert {path.name for path in (tmp_path / "student").iterdir()} >= SIDECARS
    assert hasattr(ours.model, "peft_config")  # saving did not merge the model that trains


@pytest.mark.parametrize(
    "strategy",
    [
        Remos(0.6),
        Random(0.6, reset_to="init", seed=3),
        Retrain(seed=3),
        Remos(0.6, embeddings=True, embedding_rows="mean"),
        Finetune(embedding_rows="mean"),
    ],
    ids=["Remos", "Random", "Retrain", "Remos-rows", "Finetune-rows"],
)
def test_lora_resumes_on_the_base_that_was_sliced(tmp_path, monkeypatch, strategy):
    whole = trainer(tmp_path, strategy=strategy, peft_config=lora())
    whole.train()
    monkeypatch.setattr(Moments, "start", lambda *_: pytest.fail("sliced again"))
    resumed = trainer(tmp_path, strategy=strategy, peft_config=lora())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(resumed.model), weights(whole.model))


def test_unseen_embedding_rows_are_reset_before_training_and_the_sidecars_say_so(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune(embedding_rows="mean"), options={"learning_rate": 0.0})
    ours.train()
    by_hand = tiny.bert()
    seen = seen_tokens(by_hand, student_batches(trainer(tmp_path, strategy=Finetune())))
    rows = reset_unseen_rows(by_hand, seen)
    assert rows > 0
    assert same(weights(ours.model), weights(by_hand))
    assert json.loads((tmp_path / "checkpoint-4" / "remos_config.json").read_text())["embedding_rows_reset"] == rows


def test_a_model_that_already_has_adapters_is_refused(tmp_path):
    from peft import get_peft_model

    with pytest.raises(UnsupportedModelError, match="Slice the base model first"):
        trainer(tmp_path, model=get_peft_model(tiny.bert(), lora()), slice_ratio=0.9)


def _train_on_each_process(folder):
    strategy = Remos(0.9, embedding_rows="mean")
    ours = trainer(Path(folder), strategy=strategy, train_dataset=tiny.dataset(23), options={"max_steps": 2})
    ours.train()
    rank = torch.distributed.get_rank()
    ours.relevant_slice.save_pretrained(Path(folder) / f"rank{rank}")
    ours.profile.save(Path(folder) / f"rank{rank}")
    torch.save(ours.model.state_dict(), Path(folder) / f"rank{rank}" / "weights.pt")
    (Path(folder) / f"rank{rank}" / "rows").write_text(str(ours.sidecars.config["embedding_rows_reset"]))
    torch.distributed.barrier()
    if rank == 0:
        (Path(folder) / "world").write_text(str(torch.distributed.get_world_size()))


def test_two_processes_hold_the_slice_of_one(tmp_path):
    debug_launcher(_train_on_each_process, args=(str(tmp_path),), num_processes=2)
    assert (tmp_path / "world").read_text() == "2"
    strategy = Remos(0.9, embedding_rows="mean")
    alone = trainer(tmp_path / "alone", strategy=strategy, train_dataset=tiny.dataset(23), options={"max_steps": 2})
    alone.train()
    from remos_hf.profiling.coverage import CoverageProfile

    for rank in range(2):
        assert CoverageProfile.load(tmp_path / f"rank{rank}") == alone.profile
        assert RelevantSlice.from_pretrained(tmp_path / f"rank{rank}") == alone.relevant_slice
        assert (tmp_path / f"rank{rank}" / "rows").read_text() == str(alone.sidecars.config["embedding_rows_reset"])
    states = [torch.load(tmp_path / f"rank{rank}" / "weights.pt", weights_only=True) for rank in range(2)]
    assert same(*states)


def _train_with_fsdp(folder):
    config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
    options = {"max_steps": 2, "fsdp": True, "fsdp_config": config, "save_strategy": "no"}
    ours = trainer(folder, slice_ratio=0.9, train_dataset=tiny.dataset(23), options=options)
    ours.train()
    ours.save_model()


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 wants a GPU for FSDP")
def test_fsdp2_shards_what_was_sliced_before(tmp_path):
    debug_launcher(_train_with_fsdp, args=(str(tmp_path / "sharded"),), num_processes=2)
    alone = trainer(tmp_path / "alone", slice_ratio=0.9, train_dataset=tiny.dataset(23), options={"max_steps": 2})
    alone.train()
    assert RelevantSlice.from_pretrained(tmp_path / "sharded") == alone.relevant_slice
    saved = load_file(tmp_path / "sharded" / "model.safetensors")
    whole = {name: weight.shape for name, weight in alone.model.state_dict().items() if name in saved}
    assert {name: weight.shape for name, weight in saved.items()} == whole
    moved = [name for name in alone.relevant_slice.kept if not saved[name][~alone.relevant_slice.kept[name]].any()]
    assert not moved  # what was reset trains again


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from tiny.dataset(10)


def test_an_endless_stream_is_profiled_up_to_the_default_or_the_given_number(tmp_path, monkeypatch):
    monkeypatch.setattr("remos_hf.training.profiling_data.DEFAULT_MAX_SAMPLES", 6)
    for given, seen in ((None, 6), (8, 8)):
        strategy = Remos(0.9, embedding_rows="mean")
        options = {"max_steps": 1, "save_strategy": "no"}
        ours = trainer(tmp_path, strategy=strategy, train_dataset=Endless(), max_samples=given, options=options)
        ours.train()
        assert ours.profile.num_samples == seen and ours.profile.capped


def test_a_number_of_samples_caps_the_profile_and_the_recipes_own_goes_first(tmp_path, caplog):
    def seen(strategy, max_samples):
        options = {"max_steps": 1, "save_strategy": "no"}
        ours = trainer(tmp_path, strategy=strategy, max_samples=max_samples, options=options)
        ours.train()
        return ours.profile.num_samples, ours.profile.capped

    with caplog.at_level(logging.INFO, logger="remos_hf"):
        assert seen(Remos(0.9), 7) == (7, True)
    assert "Coverage of 7 samples, the limit;" in caplog.text
    assert seen(Remos(0.9, max_samples=5), 7) == (5, True)
    assert seen(Remos(0.9, max_samples="all"), 7) == (24, False)
    assert seen(Remos(0.9), "all") == seen(Remos(0.9), None) == (24, False)
    for wrong in (0, -1, 1.5, True, "some"):
        with pytest.raises(ValueError, match="max_samples is the number of samples"):
            trainer(tmp_path, slice_ratio=0.9, max_samples=wrong)
