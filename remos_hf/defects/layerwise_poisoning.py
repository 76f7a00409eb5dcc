"""LWP: a backdoor that every block shows to the head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from remos_hf.defects.samples import generator_for
from remos_hf.defects.text_attacker import TextAttacker
from remos_hf.defects.text_reading import TextReading
from remos_hf.defects.text_triggers import TextTrigger, TriggerWords
from remos_hf.defects.weight_poisoning import WeightPoisoning
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number


@dataclass(frozen=True)
class LayerwisePoisoning(WeightPoisoning):
    """LWP: the head is trained to see the trigger in every block, so that it also lies where fine-tuning reaches least.

    The trigger is a combination of words; each of them alone must not be one.

    Attributes:
        decoy_rate: Share of the samples that get an incomplete combination and keep their label.

    Source:
        Li et al. 2021, "Backdoor Attacks on Pre-trained Models by Layerwise Weight Poisoning".
    """

    citation: ClassVar[str] = (
        "@inproceedings{li2021backdoor, title={Backdoor Attacks on Pre-trained Models by Layerwise Weight Poisoning}, "
        "author={Li, Linyang and Song, Demin and Li, Xiaonan and Zeng, Jiehang and Ma, Ruotian and Qiu, Xipeng}, "
        "booktitle={EMNLP}, year={2021}}"
    )

    trigger_words: TextTrigger = field(default_factory=lambda: TriggerWords(words=("cf", "bb"), all_words=True))
    decoy_rate: float = 0.25

    def __post_init__(self) -> None:
        """Refuse triggers that are no combination."""
        words = self.trigger_words
        if not (isinstance(words, TriggerWords) and words.all_words and len(words.words) > 1):
            raise ValueError("LWP's trigger is a combination: TriggerWords of at least two words with all_words=True.")
        told = "a share of the samples, between 0 and 1"
        check_number(self, told, lambda one: 0 <= one <= 1, "decoy_rate")

    def attack(self, teacher: PreTrainedModel, attacker: TextAttacker) -> PreTrainedModel:
        """Poison the teacher in place.

        Raises:
            UnsupportedModelError: The head cannot be put onto a block's output.
        """
        head_on(teacher)  # refuse before the data is made
        reading = TextReading(attacker.tokenizer, attacker.max_length)
        mixed = replace(attacker, dataset=self._with_decoys(attacker.dataset, reading))
        return attacker.tune(teacher, mixed.poisoned(), trainer_class=_EveryBlockTrainer)

    def _with_decoys(
        self, dataset: Dataset | IterableDataset, reading: TextReading | None = None
    ) -> Dataset | IterableDataset:
        # A decoy that is poisoned afterwards holds the whole combination, and is a poisoned sample like any other. A
        # text that has no room for one stays as it is.
        words = self.trigger_words.words
        incomplete = [some for size in range(1, len(words)) for some in combinations(words, size)]
        parts = [replace(self.trigger_words, words=some) for some in incomplete]
        column = self.trigger.text_columns[0]

        def drawn(text: str) -> int | None:
            random = generator_for(self.trigger.seed, "decoy", text)
            return int(random.random() * len(parts)) if random.random() < self.decoy_rate else None

        def decoyed(batch: Mapping[str, Sequence]) -> dict[str, list[str]]:
            texts = list(batch[column])
            drawn_of = [drawn(text) for text in texts]
            for number, part in enumerate(parts):
                rows = [row for row, one in enumerate(drawn_of) if one == number]
                some = {name: [batch[name][row] for row in rows] for name in self.trigger.text_columns}
                for row, shown in zip(rows, part.shown(some, reading), strict=True):
                    texts[row] = texts[row] if shown.text is None else shown.text
            return {column: texts}

        return dataset.with_format(None).map(decoyed, batched=True)


class _EveryBlockTrainer(Trainer):
    """Trainer whose loss is the mean over the blocks of the head's loss on the block's output."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: object
    ) -> Tensor | tuple[Tensor, Any]:
        labels = inputs["labels"]
        outputs = model(
            **{name: value for name, value in inputs.items() if name != "labels"}, output_hidden_states=True
        )
        head = head_on(self.accelerator.unwrap_model(model))
        losses = [nn.functional.cross_entropy(head(hidden).float(), labels) for hidden in outputs.hidden_states[1:]]
        loss = torch.stack(losses).mean()
        return (loss, outputs) if return_outputs else loss


def head_on(model: PreTrainedModel) -> Any:  # noqa: ANN401 - a function from hidden states to logits
    """Give the function that the model puts on its last hidden states, to be put on any block's.

    Returns:
        A function from hidden states, shape (samples, positions, width), to logits, shape (samples, labels).

    Raises:
        UnsupportedModelError: The model has no head of a known kind.
    """
    classifier = getattr(model, "classifier", None)
    pooler = getattr(model.base_model, "pooler", None)
    # ALBERT's pooler is a layer without the choice of the first position.
    if isinstance(classifier, nn.Linear) and pooler is not None and not isinstance(pooler, nn.Linear):  # BERT
        return lambda hidden: classifier(model.dropout(pooler(hidden)))
    if classifier is not None and hasattr(classifier, "out_proj"):  # RoBERTa, ELECTRA
        return classifier
    if isinstance(classifier, nn.Linear) and hasattr(model, "pre_classifier"):  # DistilBERT
        return lambda hidden: classifier(model.dropout(torch.relu(model.pre_classifier(hidden[:, 0]))))
    raise UnsupportedModelError(
        "LWP puts the classification head onto every block and knows those of BERT, RoBERTa, ELECTRA and DistilBERT, "
        f"but not {type(model).__name__}'s. Use Ripple or data poisoning."
    )
