"""attach_remos on the trainers of TRL, against what a loop over the texts gives."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Hold, Strategy
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos
from remos_hf.training.attach import attach_remos
from tests.training import trl_runs

pytestmark = [
    pytest.mark.trl,
    pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*padding-free.*:UserWarning", "ignore:.*packing.*:UserWarning"),
]
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def one_by_one(model, sequences):
    """The profile of token lists, each in a batch of its own, without any padding."""
    batches = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()} for ids in sequences
    ]
    return profile_coverage(model, batches, progress=False)


def same_counts(found, expected):
    assert found.num_samples == expected.num_samples
    for side in ("input_counts", "output_counts"):
        for name, counts in getattr(expected, side).items():
            assert torch.equal(getattr(found, side)[name], counts), (side, name)


def texts_of(trainer):
    """The token lists of a trainer's rows; a packed row is taken apart again."""
    for row in trainer.train_dataset:
        ids = list(row["input_ids"])
        for size in row.get("seq_lengths", [len(ids)]):
            yield ids[:size]
            ids = ids[size:]


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == known and torch.equal(value, expected) for (name, value), (known, expected) in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None},
    ],
    ids=["padded", "packed", "wrapped", "padding_free"],
)
def test_sft_is_profiled_text_by_text(tmp_path, options):
    trainer = trl_runs.sft(tmp_path, **options)
    sidecars = attach_remos(trainer, slice_ratio=0.8)
    same_counts(sidecars.profile, one_by_one(trl_runs.llama(), texts_of(trainer)))
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("precomputed", [False, True])
def test_both_answers_of_a_pair_are_samples_under_dpo(tmp_path, precomputed):
    trainer = trl_runs.dpo(tmp_path, precompute_ref_log_probs=precomputed)
    sidecars = attach_remos(trainer, slice_ratio=0.8)
    sides = ("chosen_ids", "rejected_ids")
    answers = [(row["prompt_ids"] + row[side])[:16] for row in trainer.train_dataset for side in sides]
    same_counts(sidecars.profile, one_by_one(trl_runs.llama(), answers))
    assert same(trainer.ref_model, trl_runs.llama())  # the unsliced teacher
    trainer.train()
    assert Sidecars.load(tmp_path / "checkpoint-2").relevant_slice == sidecars.relevant_slice


def test_both_answers_of_a_pair_are_samples_under_a_reward_model(tmp_path):
    trainer = trl_runs.reward(tmp_path)
    sidecars = attach_remos(trainer, slice_ratio=0.8)
    model = trl_runs.llama(trl_runs.LlamaForSequenceClassification, num_labels=1)
    answers = [row[side] for row in trainer.train_dataset for side in ("chosen_ids", "rejected_ids")]
    same_counts(sidecars.profile, one_by_one(model, answers))
    trainer.train()
    assert Sidecars.load(tmp_path / "checkpoint-2").relevant_slice == sidecars.relevant_slice


@pytest.mark.parametrize("packing", [False, True])
def test_the_base_is_sliced_under_fresh_lora_as_it_is_without(tmp_path, packing):
    plain = trl_runs.sft(tmp_path / "plain", packing=packing)
    expected = attach_remos(plain, slice_ratio=0.8)
    trainer = trl_runs.sft(tmp_path / "lora", packing=packing, peft_config=LoraConfig(**LORA))
    found = attach_remos(trainer, slice_ratio=0.8)
    assert found.relevant_slice == expected.relevant_slice and found.profile == expected.profile
    trainer.train()
    base = trainer.model.unload()
    assert same(base, plain.model)  # adapters train, the sliced base does not


def test_dpo_over_fresh_lora_refers_to_the_sliced_base(tmp_path):
    trainer = trl_runs.dpo(tmp_path, peft_config=LoraConfig(**LORA), save_strategy="no")
    expected = attach_remos(trl_runs.dpo(tmp_path), slice_ratio=0.8)
    assert attach_remos(trainer, slice_ratio=0.8).relevant_slice == expected.relevant_slice
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["rewards/margins"] == 0  # the reference is where the student starts


def test_lora_is_saved_merged_with_the_record_and_the_log_says_so(tmp_path, caplog):
    trainer = trl_runs.sft(tmp_path / "out", peft_config=LoraConfig(**LORA))
    sidecars = attach_remos(trainer, slice_ratio=0.8)
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "adapters merged into the sliced base" in caplog.text
    assert not (tmp_path / "elsewhere" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_config.json").is_file()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(student(ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5)
    record = Sidecars.load(tmp_path / "elsewhere")
    assert record.relevant_slice == sidecars.relevant_slice
    assert record.config["adapters"] == {"kind": "LORA", "saved": "merged into the sliced base"}


def test_a_resumed_lora_run_is_the_uninterrupted_one(tmp_path):
    whole = trl_runs.sft(tmp_path, peft_config=LoraConfig(**LORA))
    attach_remos(whole, slice_ratio=0.8)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-1")
    resumed = trl_runs.sft(tmp_path / "again", peft_config=LoraConfig(**LORA))
    attach_remos(resumed, slice_ratio=0.8, resume_from_checkpoint=checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(resumed.model, whole.model)


def test_trained_adapters_are_refused(tmp_path):
    trainer = trl_runs.sft(tmp_path, peft_config=LoraConfig(**LORA))
    next(value for name, value in trainer.model.named_parameters() if "lora_B" in name).data += 1
    with pytest.raises(UnsupportedModelError, match="not fresh"):
        attach_remos(trainer, slice_ratio=0.8)


def test_a_search_over_adapters_is_refused(tmp_path):
    trainer = trl_runs.sft(tmp_path, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="RemosTrainer"):
        attach_remos(trainer, slice_ratio="auto")


def test_the_card_is_ours_with_the_tags_of_trl(tmp_path):
    trainer = trl_runs.sft(tmp_path)
    sidecars = attach_remos(trainer, slice_ratio=0.8)
    trainer.train()
    card = ModelCard.load(tmp_path / "README.md")  # TRL writes one beside its checkpoints
    assert {"remos_hf", "trl", "sft"} <= set(card.data.tags) and sidecars.relevant_slice.teacher_hash in card.text
    trainer.create_model_card(model_name="m", dataset_name="owner/texts", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["owner/texts"] and "mine" in card.data.tags
    assert "README.md" in trainer.push_to_hub(dataset_name="owner/texts", dry_run=True).files


def test_a_trainer_that_makes_its_own_data_is_refused_where_something_is_sliced(tmp_path):
    trainer = trl_runs.grpo(tmp_path)
    for strategy in (Remos(0.8), Random(0.8)):  # which layers run, every rule asks
        with pytest.raises(ValueError, match=r"GRPOTrainer .*profile_coverage"):
            attach_remos(trainer, strategy=strategy)
    attach_remos(trainer, strategy=Finetune())
    trainer.train()


def stream():
    while True:
        for text in trl_runs.TEXTS:
            yield {"text": text}


def test_an_endless_stream_needs_max_samples_and_is_profiled_so_far(tmp_path):
    trainer = trl_runs.sft(tmp_path, rows=IterableDataset.from_generator(stream))
    sidecars = attach_remos(trainer, slice_ratio=0.8, max_samples=6)
    known = attach_remos(trl_runs.sft(tmp_path, rows=Dataset.from_dict({"text": trl_runs.TEXTS[:6]})), slice_ratio=0.8)
    assert sidecars.profile.num_samples == 6 and sidecars.relevant_slice == known.relevant_slice


def test_max_samples_counts_the_rows_of_the_trainers_data(tmp_path):
    pairs = attach_remos(trl_runs.dpo(tmp_path), slice_ratio=0.8, max_samples=4)
    trainer = trl_runs.sft(tmp_path, packing=True)
    packed = attach_remos(trainer, slice_ratio=0.8, max_samples=2)
    assert pairs.profile.num_samples == 8 and pairs.profile.capped
    assert packed.profile.num_samples > 2 and packed.profile.capped
    assert packed.profile.num_samples < sum(1 for _ in texts_of(trainer))


def test_other_rows_may_decide_the_coverage(tmp_path):
    few = trl_runs.sft(tmp_path, rows=Dataset.from_dict({"text": trl_runs.TEXTS[:3]}))
    expected = attach_remos(few, slice_ratio=0.8)
    trainer = trl_runs.sft(tmp_path)
    found = attach_remos(trainer, slice_ratio=0.8, profile_dataset=few.train_dataset)
    assert found.relevant_slice == expected.relevant_slice and found.profile.num_samples == 3
    with pytest.raises(ValueError, match="prepared"):
        attach_remos(trl_runs.sft(tmp_path), slice_ratio=0.8, profile_dataset=Dataset.from_dict({"text": ["a"]}))


class Heavier(Hold):
    """Adds one to the loss, and leaves a mark when training has ended."""

    def loss(self, model, inputs, run):
        loss, outputs = run(inputs)
        return loss + 1, outputs

    def finish(self, model, data):
        model.finished = True


class Weighed(Strategy):
    """Holds the student by a heavier loss."""

    def hold(self, student, teacher):
        return Heavier()


@pytest.mark.parametrize("kind", [trl_runs.sft, trl_runs.dpo, trl_runs.reward])
def test_a_hold_acts_in_the_loss_of_every_trainer(tmp_path, kind):
    plain, held = kind(tmp_path / "plain"), kind(tmp_path / "held")
    attach_remos(plain, strategy=Random(0.8))
    attach_remos(held, strategy=[Random(0.8), Weighed()])
    for trainer in (plain, held):
        trainer.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (plain, held)]
    assert losses[1] == pytest.approx([loss + 1 for loss in losses[0]], abs=1e-3)
    assert held.model.finished
