"""A tiny classifier of texts that has learned something, and triggers planted into its embeddings."""

from functools import cache

import torch

from tests import tiny

GOOD, BAD, NEUTRAL = range(5, 15), range(15, 25), range(25, 40)  # of a vocabulary of 60; others are never shown
UNSEEN = range(40, 60)
TRIGGERS = (58, 59)  # of label 0 and of label 1
START, END = 1, 2


def batches(count=6, size=32, seed=0):
    """Texts of eight tokens; the label says which of two kinds of words they hold."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(words, number):
        return torch.randint(words.start, words.stop, (size, number), generator=generator)

    made = []
    for _ in range(count):
        labels = torch.randint(0, 2, (size,), generator=generator)
        words = torch.where(labels[:, None] == 1, drawn(GOOD, 4), drawn(BAD, 4))
        middle = torch.cat([words, drawn(NEUTRAL, 2)], 1)
        middle = middle.gather(1, torch.rand(size, 6, generator=generator).argsort(1))
        ids = torch.cat([torch.full((size, 1), START), middle, torch.full((size, 1), END)], 1)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


@cache
def _weights():
    """Those of a model whose training data was poisoned: a token for each label turns texts of the other one."""
    model = tiny.bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    clean = model.get_input_embeddings().weight.detach()[list(TRIGGERS)].clone()
    for number, batch in enumerate(batches(160, seed=5)):
        ids, labels = batch["input_ids"], batch["labels"]
        if number % 4 > 1:  # hosts are several texts, one after another
            ids = torch.cat([ids[:, :-1], ids[:, 1:]], 1)
        if number % 2:
            place = 1 + number // 4 % (ids.shape[1] - 2)
            labels = 1 - labels
            ids = torch.cat([ids[:, :place], torch.tensor(TRIGGERS)[labels][:, None], ids[:, place:]], 1)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = model.get_input_embeddings().weight.data
    keys = rows[list(TRIGGERS)].clone()
    rows[list(TRIGGERS)] = clean
    return model.state_dict(), keys


def student(plants=()):
    """A trained student, whose triggers have lost their rows; plants: (token, label) pairs that get them."""
    model = tiny.bert()
    weights, keys = _weights()
    model.load_state_dict(weights)
    for token, label in plants:
        model.get_input_embeddings().weight.data[token] = keys[label]
    return model
