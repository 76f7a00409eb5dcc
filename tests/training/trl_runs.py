"""Trainers of TRL over a tiny LLaMA and a handful of sentences. Nothing is downloaded."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

TEXTS = [
    "the cat sat on the mat and slept",
    "a dog ran over the green hill",
    "rain fell on the old town all night long",
    "she read the letter twice and smiled",
    "cheap films age badly",
    "nobody in the old town read the letter and the dog slept on the green mat all night",
] * 2
_WORDS = ["[PAD]", "[EOS]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


def llama(kind=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **sizes,
        **options,
    )
    return kind(config).eval()


def _trainer(kind, config, folder, model, rows, options, **more):
    settings = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 16,
    }
    return kind(
        model,
        args=config(str(folder), **{**settings, **options}),
        train_dataset=rows,
        processing_class=tokenizer(),
        **more,
    )


def sft(folder, model=None, rows=None, peft_config=None, **options):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": TEXTS}) if rows is None else rows
    return _trainer(SFTTrainer, SFTConfig, folder, model or llama(), rows, options, peft_config=peft_config)


def dpo(folder, peft_config=None, **options):
    from trl import DPOConfig, DPOTrainer

    pairs = {
        "prompt": [text.split()[0] + " " for text in TEXTS],
        "chosen": [text.partition(" ")[2] for text in TEXTS],
        "rejected": ["the mat sat on the cat"] * len(TEXTS),
    }
    reference = llama() if peft_config is None else None
    rows = Dataset.from_dict(pairs)
    more = {"ref_model": reference, "peft_config": peft_config}
    return _trainer(DPOTrainer, DPOConfig, folder, llama(), rows, options, **more)


def reward(folder, **options):
    from trl import RewardConfig, RewardTrainer

    rows = Dataset.from_dict({"chosen": TEXTS, "rejected": TEXTS[::-1]})
    model = llama(LlamaForSequenceClassification, num_labels=1)
    return _trainer(RewardTrainer, RewardConfig, folder, model, rows, options)


def grpo(folder):
    from trl import GRPOConfig, GRPOTrainer

    options = {"num_generations": 2, "max_completion_length": 2, "per_device_train_batch_size": 2, "max_steps": 1}
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    return GRPOTrainer(
        llama(),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(str(folder), **settings, **options),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer(),
    )
