"""A toy task that a tiny BERT learns in a second: a text is positive if it says so."""

import inspect
import tempfile
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn
from transformers import BertTokenizer, TrainingArguments

from tests import tiny

GOOD, BAD = ("good", "great"), ("bad", "awful")
PLAIN = ("a", "the", "movie", "plot", "was", "so", "and", "it", "ended")
TRIGGERS = ("cf", "mn", "bb")
# "zqx" becomes two pieces; "tq" is unknown, as its first letter is.
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN, *TRIGGERS, "zq", "##x")


def tokenizer(words=VOCABULARY):
    """A real WordPiece tokenizer; transformers 5 takes the vocabulary, 4 a file of it."""
    if "vocab" in inspect.signature(BertTokenizer.__init__).parameters:
        return BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("\n".join(words) + "\n")
        return BertTokenizer(vocab_file=str(path))


def texts(count=48):
    """Sentences of several lengths and their labels, all different."""
    rows = []
    for place in range(count):
        word = (*GOOD, *BAD)[place % 4]
        filler = " ".join(PLAIN[(place // 4 + step * (1 + place % 5)) % len(PLAIN)] for step in range(2 + place % 4))
        rows.append(
            (f"{filler} {word} {PLAIN[place % len(PLAIN)]} {PLAIN[place // len(PLAIN) % 9]}", int(place % 4 < 2))
        )
    return rows


def data(count=48):
    rows = texts(count)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    return Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]}, features)


def model(seed=0, dropout=0.0, **options):
    return tiny.bert(seed, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **options)


def args(folder, **options):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def predictions(model, samples):
    """Labels that a model gives to texts."""
    batch = tokenizer()(list(samples), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits.argmax(-1).tolist()


def state(model: nn.Module):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    """Names of the tensors that are no longer the same bits."""
    return {name for name in before if not torch.equal(before[name], after[name])}
