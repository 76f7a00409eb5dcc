"""The whole way for architectures whose weights are not all plain layers: profile, slice, an epoch, save, load."""

import pytest
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.slicing.refill import reset_outside
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice
from remos_hf.training.trainer import RemosTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60, "pad_token_id": 0}
ROUTED = {**SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 32}
FAMILIES = {
    "Mixtral": ("MixtralForCausalLM", {**ROUTED, "intermediate_size": 24, "num_local_experts": 4}),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        {**ROUTED, "intermediate_size": 24, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    ),
    "DebertaV2": (
        "DebertaV2ForSequenceClassification",
        {
            **SMALL,
            "intermediate_size": 24,
            "relative_attention": True,
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
        },
    ),
    "SqueezeBert": ("SqueezeBertForSequenceClassification", {**SMALL, "intermediate_size": 32, "embedding_size": 16}),
}


TOWER = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
TOWER = {**TOWER, "intermediate_size": 24, "projection_dim": 8}
FAMILIES["Clip"] = (
    "CLIPModel",
    {
        "text_config": {**TOWER, "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 59},
        "vision_config": {**TOWER, "image_size": 8, "patch_size": 4},
        "projection_dim": 8,
    },
)


def teacher_of(family):
    name, settings = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**settings))


def texts(labelled):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(24):
        length = 3 + number % 6
        ids = torch.randint(3, 60, (length,), generator=generator).tolist() + [0] * (8 - length)
        row = {"input_ids": ids, "attention_mask": [1] * length + [0] * (8 - length)}
        rows.append({**row, "labels": number % 2} if labelled else row)
    return Dataset.from_list(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_sliced_trained_saved_and_loaded_whole(family, tmp_path):
    teacher, student = teacher_of(family), teacher_of(family)
    labelled = FAMILIES[family][0].endswith("Classification")

    def collate(rows):
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        if family == "Clip":
            pixels = batch["input_ids"][:, :3, None, None] / 60
            return {**batch, "pixel_values": pixels.expand(-1, 3, 8, 8).clone(), "return_loss": True}
        if not labelled:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    data = texts(labelled)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
    )
    trainer = RemosTrainer(student, arguments, slice_ratio=0.8, train_dataset=data, data_collator=collate)
    trainer.train()

    relevant = trainer.relevant_slice
    by_hand = profile_coverage(teacher, DataLoader(data.to_list(), batch_size=5, collate_fn=collate), progress=False)
    expected = choose_slice(teacher, by_hand, slice_ratio=0.8, progress=False)
    assert all(torch.equal(relevant.kept[name], expected.kept[name]) for name in expected.kept)
    # Routers of transformers 5 are bare parameters, and embeddings were not asked for.
    embeddings = relevant.account.left_out.get("embedding rows", 0)
    assert relevant.account.competing > 0.9 * (relevant.account.total - embeddings)

    trainer.save_model(tmp_path / "student")
    loaded = type(student).from_pretrained(tmp_path / "student").eval()
    batch = collate([data[0], data[1]])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, student.eval()(**batch).loss)
    sliced = reset_outside(teacher, RelevantSlice.from_pretrained(tmp_path / "student")) or teacher
    started = sum(int((parameter == 0).sum()) for parameter in sliced.parameters())
    trained = sum(int((parameter == 0).sum()) for parameter in loaded.parameters())
    assert started >= relevant.num_weights - relevant.num_kept and trained < started  # what was reset trains again
