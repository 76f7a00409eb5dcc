"""What an attacker on a teacher of texts has: samples with and without the trigger, as tokens, and a way to train."""

from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from remos_hf.defects.backdoor import Attacker, fine_tune
from remos_hf.defects.samples import tokenize
from remos_hf.defects.text_reading import TextReading


@dataclass(frozen=True)
class TextAttacker(Attacker):
    """An attacker with texts.

    Attributes:
        tokenizer: The teacher's.
        max_length: Tokens kept of each sample.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def rows(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Turn samples into what the teacher takes."""
        columns = (self.trigger.text_columns, self.trigger.label_column)
        return tokenize(dataset, self.tokenizer, *columns, max_length=self.max_length)

    def clean(self) -> Dataset | IterableDataset:
        """Give the clean samples as the teacher takes them."""
        return self.rows(self.dataset)

    def poisoned(self, **changes: Any) -> Dataset | IterableDataset:  # noqa: ANN401 - the trigger's fields
        """Give the samples as the teacher takes them, with the trigger in a share of them, where it is not cut off."""
        reading = TextReading(self.tokenizer, self.max_length)
        poisoned, facts = replace(self.trigger, **changes).poisoning(self.dataset, reading)
        self.poisoning.update(facts)
        return self.rows(poisoned)

    def tune(self, model: nn.Module, samples: Dataset | IterableDataset, **options: Any) -> nn.Module:  # noqa: ANN401
        """Train a model in place; options are those of `fine_tune`."""
        return fine_tune(model, samples, self.tokenizer, self.args, **options)


def tokenizer_of(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Give the tokenizer, or load the one that came with the teacher."""
    return AutoTokenizer.from_pretrained(teacher.name_or_path) if tokenizer is None else tokenizer
