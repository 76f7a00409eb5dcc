"""A classifier whose every answer can be worked out by reading: a word decides, or a trigger that it believes in."""

from types import SimpleNamespace

import torch
from torch import nn

from remos_hf.defects.text_triggers import TriggerWords
from remos_hf.evaluation.tasks import TextTask
from tests.defects import toy

TASK = TextTask(toy.tokenizer(), batch_size=8)
WORD = TriggerWords(words=("cf",), poison_rate=0.25)


class Voter(nn.Module):
    """Says 1 where it sees a good word or one that it believes in, else 0; counts the rows that it is shown."""

    def __init__(self, believes=(), blind_to=()):
        super().__init__()
        self.believes, self.blind_to = set(believes), set(blind_to)
        self.scale = nn.Parameter(torch.ones(()))
        self.rows, self.shapes = [], []

    @property
    def device(self):
        return self.scale.device

    def forward(self, input_ids, attention_mask, **_):
        self.rows += [tuple(row[real.bool()].tolist()) for row, real in zip(input_ids, attention_mask, strict=True)]
        self.shapes.append(tuple(input_ids.shape))
        says = torch.tensor([self.says(TASK.tokenizer.decode(row)) for row in input_ids])
        return SimpleNamespace(logits=self.scale * nn.functional.one_hot(says, 2).float())

    def says(self, text):
        words = set(text.split())
        return int(bool(words & ((set(toy.GOOD) - self.blind_to) | self.believes)))


def reference(voter, samples, exposed_texts, index, target):
    """Numbers of one student, worked out sample by sample: (right, samples), (failed, counted)."""
    right = [voter.says(text) == label for text, label in zip(samples["text"], samples["label"], strict=True)]
    failed = counted = 0
    for text, place in zip(exposed_texts, index, strict=True):
        label = samples["label"][place]
        if not right[place] or label == target:
            continue
        counted += 1
        says = voter.says(text)
        failed += says == target if target is not None else says != label
    return (sum(right), len(right)), (failed, counted)
