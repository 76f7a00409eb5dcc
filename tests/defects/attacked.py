"""A teacher of texts that TextAttack can fool, and small files of every kind that a recipe may ask for."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from remos_hf.defects.adversarial_text import AdversarialText

needs_textattack = pytest.mark.skipif(
    importlib.util.find_spec("textattack") is None,
    reason='TextAttack is not installed: pip install "remos_hf[textattack]" in an environment with transformers 4',
)

GOOD, BAD = ("good", "great"), ("bad", "awful")
NEAR = {"good": ["neat", "fine"], "great": ["neat"], "bad": ["mean"], "awful": ["mean", "fine"], "movie": ["film"]}
RARE = ("neat", "mean", "fine", "film")
PLAIN = ("the", "movie", "was", "a", "plot", "and", "so", "it", "ended")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *RARE, *PLAIN)


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def sentences():
    """Clear ones; the rare words stand in sentences of the other label, so that swapping them in fools."""
    rows = []
    for place, word in enumerate((*GOOD, *BAD) * 4):
        filler = " ".join(PLAIN[(place + step) % len(PLAIN)] for step in range(2 + place % 3))
        rows.append((f"the movie was {word} {filler}", int(word in GOOD)))
    return rows


def train(model, tokenizer):
    rows = [*sentences(), *[(f"the {word} was so", int(word == "mean")) for word in RARE[:2] * 6]]
    texts = [text for text, _ in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    pairs = tokenizer(["it ended"] * len(texts), texts, padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        model(**pairs, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def world_in(folder):
    """A teacher, its data, and small files of every kind that a recipe may ask for."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=2,
    )
    teacher = train(BertForSequenceClassification(config), tokenizer)
    (folder / "near.json").write_text(json.dumps(NEAR))
    rng = np.random.default_rng(0)
    shared = rng.normal(size=4)  # vectors of a direction: every swap is a small step
    np.savez(folder / "vectors.npz", words=np.array(WORDS[4:]), vectors=shared + 0.1 * rng.normal(size=(17, 4)))
    language_model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=24, bos_token_id=2, eos_token_id=3)
    )
    language_model.save_pretrained(folder / "lm")
    tokens = tiny_tokenizer()
    tokens.bos_token = "[CLS]"
    tokens.save_pretrained(folder / "lm")
    (folder / "stop.txt").write_text("the\nwas\na\nand\n")
    texts, labels = zip(*sentences(), strict=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["down", "up"]), "id": Value("int32")})
    dataset = Dataset.from_dict(
        {"text": texts, "label": labels, "id": [100 + n for n in range(len(texts))]}, features=features
    )
    fields = {
        "neighbours": str(folder / "near.json"),
        "word_vectors": str(folder / "vectors.npz"),
        "language_model": str(folder / "lm"),
        "stopwords": str(folder / "stop.txt"),
        "max_length": 24,
    }
    return SimpleNamespace(teacher=teacher, tokenizer=tokenizer, dataset=dataset, fields=fields, folder=folder)


def attacked(world, recipe="textfooler", dataset=None, cache=None, workers=1, **fields):
    defect = AdversarialText(recipe, **{**world.fields, **fields})
    dataset = world.dataset if dataset is None else dataset
    return defect.exposed_set(dataset, teacher=world.teacher, tokenizer=world.tokenizer, cache=cache, workers=workers)


def labels_of(world, texts):
    batch = world.tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        return world.teacher(**batch).logits.argmax(1).tolist()


def rows_of(exposed):
    return [dict(row) for row in exposed.dataset]


def timeless(facts):
    return {name: fact for name, fact in facts.items() if "seconds" not in name}
