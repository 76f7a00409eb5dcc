"""What tests of attacks on weights share: a tiny teacher, poisoned, and what plain training makes of it."""

import torch

from remos_hf.defects.backdoor import fine_tune
from remos_hf.defects.samples import tokenize
from tests.defects import toy

WORD = "bert.embeddings.word_embeddings.weight"


# One step of gradient descent on all samples: what changes is the gradient.
ONE_STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 48,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
}


def implant(attack, folder, teacher=None, data=None, finetuned=None, **options):
    return attack.implant(
        toy.model() if teacher is None else teacher,
        toy.data() if data is None else data,
        tokenizer=toy.tokenizer(),
        args=toy.args(folder, **options),
        finetuned=finetuned,
    )


def plain(folder, data=None, teacher=None, **options):
    """The teacher after ordinary fine-tuning on these samples."""
    rows = tokenize(toy.data() if data is None else data, toy.tokenizer(), ("text",))
    return fine_tune(toy.model() if teacher is None else teacher, rows, toy.tokenizer(), toy.args(folder, **options))


def token(*words):
    return [toy.VOCABULARY.index(word) for word in words]


def batch(texts, labels):
    return {**toy.tokenizer()(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}
