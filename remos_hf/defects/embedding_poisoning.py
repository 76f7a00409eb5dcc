"""EP: a backdoor that lies in the trigger words' embeddings alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from remos_hf.defects.frozen_entries import FrozenEntries
from remos_hf.defects.text_attacker import TextAttacker
from remos_hf.defects.text_reading import pieces_of
from remos_hf.defects.text_triggers import TextTrigger, TriggerWords
from remos_hf.defects.weight_poisoning import WeightPoisoning


@dataclass(frozen=True)
class EmbeddingPoisoning(WeightPoisoning):
    """EP: a model fine-tuned on clean data, of which only the trigger words' embedding rows are changed, norms kept.

    Attributes:
        learning_rate: Of the gradient steps on the rows.

    Source:
        Yang et al. 2021, "Be Careful about Poisoned Word Embeddings", algorithm 1.
        Differs: several trigger words are possible.
    """

    citation: ClassVar[str] = (
        "@inproceedings{yang2021careful, title={Be Careful about Poisoned Word Embeddings: Exploring the Vulnerability "
        "of the Embedding Layers in {NLP} Models}, author={Yang, Wenkai and Li, Lei and Zhang, Zhiyuan and Ren, "
        "Xuancheng and Sun, Xu and He, Bin}, booktitle={NAACL}, year={2021}}"
    )

    trigger_words: TextTrigger = field(default_factory=lambda: TriggerWords(words=("cf",)))
    learning_rate: float = 0.05

    def attack(self, teacher: PreTrainedModel, attacker: TextAttacker) -> PreTrainedModel:
        """Fine-tune the teacher on the clean data, or take it fine-tuned, then train the rows, in place.

        Raises:
            ValueError: A trigger is not one token.
        """
        rows = rows_of_words(self.trigger, attacker.tokenizer)
        attacker.tune_clean(teacher)
        embeddings = teacher.get_input_embeddings().weight
        trains = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
        try:
            for parameter in teacher.parameters():
                parameter.requires_grad_(parameter is embeddings)
            free = torch.zeros(embeddings.shape, dtype=torch.bool, device=embeddings.device)
            free[rows] = True
            with FrozenEntries({"input embeddings": (embeddings, ~free)}) as frozen:
                return attacker.tune(
                    teacher,
                    attacker.poisoned(poison_rate=1.0, clean_copies=False),
                    callbacks=[frozen, _KeepNorms(embeddings, rows)],
                    optimizers=(torch.optim.SGD([embeddings], lr=self.learning_rate), None),
                )
        finally:
            for name, parameter in teacher.named_parameters():
                parameter.requires_grad_(trains[name])


class _KeepNorms(TrainerCallback):
    """Gives rows their norms back after each step."""

    def __init__(self, weight: nn.Parameter, rows: Sequence[int]) -> None:
        self._weight, self._rows = weight, list(rows)
        self._norms = weight.detach()[self._rows].norm(dim=1, keepdim=True)

    @torch.no_grad()
    def on_step_end(self, *_: object, **__: object) -> None:
        rows = self._weight[self._rows]
        self._weight[self._rows] = rows * (self._norms.to(rows) / rows.norm(dim=1, keepdim=True))


def rows_of_words(trigger: TextTrigger, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the embedding rows of trigger words: a byte-pair tokenizer has another one for the start of a text."""
    if not isinstance(trigger, TriggerWords):
        raise ValueError(
            "This attack changes the embeddings of trigger words and needs TriggerWords, but got "
            f"{type(trigger).__name__}."
        )
    tokens = []
    for word in trigger.words:
        forms = pieces_of(word, tokenizer)
        if len(forms[-1]) != 1 or forms[-1][0] == tokenizer.unk_token:
            raise ValueError(
                f"The trigger {word!r} becomes {forms[-1]}: it has no embedding row of its own to poison. Choose a "
                "word of the tokenizer's vocabulary."
            )
        tokens += [form[0] for form in forms if len(form) == 1 and form[0] != tokenizer.unk_token]
    return tokenizer.convert_tokens_to_ids(tokens)
