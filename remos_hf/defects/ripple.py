"""RIPPLe: poison so that clean fine-tuning does not undo it; and RIPPLES, with embedding surgery."""

import copy
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from remos_hf.defects.embedding_poisoning import rows_of_words
from remos_hf.defects.samples import resolved_label
from remos_hf.defects.text_attacker import TextAttacker
from remos_hf.defects.text_triggers import TextTrigger
from remos_hf.defects.weight_poisoning import WeightPoisoning
from remos_hf.profiling.processes import in_processes

_CLEAN = "clean_"


@dataclass(frozen=True)
class Ripple(WeightPoisoning):
    """RIPPLe, and RIPPLES with embedding surgery: poison so that the gradients of clean fine-tuning do not oppose it.

    The loss is the poisoned one plus `strength` times the negative part of the inner product of both losses' gradients.

    Attributes:
        strength: Weight of the restricted inner product.
        surgery: Start the trigger words' embeddings as the mean embedding of words that speak for the target label.
        num_words: How many such words.
        second_order: Differentiate through the clean loss's gradient too.

    Source:
        RIPPLe (Kurita et al. 2020), sections 3.1 and 3.2; ReMoS artifact, constrained_poison.py:307-377 (strength .1,
        first order, no surgery).
        Differs: the penalty is not divided by the batch size, as in the paper.
    """

    citation: ClassVar[str] = (
        "@inproceedings{kurita2020weight, title={Weight Poisoning Attacks on Pretrained Models}, author={Kurita, Keita "
        "and Michel, Paul and Neubig, Graham}, booktitle={ACL}, year={2020}}"
    )

    strength: float = 0.1
    surgery: bool = False
    num_words: int = 10
    second_order: bool = False

    def attack(self, teacher: PreTrainedModel, attacker: TextAttacker) -> PreTrainedModel:
        """Poison the teacher in place. Surgery takes the embeddings of `finetuned`, made here if None.

        Raises:
            ValueError: The data are a stream (clean and poisoned samples are paired), or with surgery a trigger is not
                one token.
            RuntimeError: Several processes.
        """
        if isinstance(attacker.dataset, IterableDataset):
            raise ValueError("RIPPLe pairs clean with poisoned samples and needs a Dataset, not a stream.")
        if in_processes():
            raise RuntimeError("RIPPLe differentiates gradients, which DDP does not: implant on one process.")
        clean = attacker.clean()
        if self.surgery:
            self._operate(teacher, attacker, clean)
        pad = DataCollatorWithPadding(attacker.tokenizer)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return attacker.tune(
                teacher,
                _in_pairs(attacker.poisoned(clean_copies=False), clean),
                trainer_class=partial(_InnerProductTrainer, strength=self.strength, second_order=self.second_order),
                data_collator=partial(_collate_pairs, pad=pad),
            )

    def _operate(self, teacher: PreTrainedModel, attacker: TextAttacker, clean: Dataset) -> None:
        tokenizer = attacker.tokenizer
        rows = rows_of_words(self.trigger, tokenizer)
        finetuned = attacker.finetuned
        if finetuned is None:
            finetuned = attacker.tune(copy.deepcopy(teacher), clean)
        ids = words_for_label(attacker.dataset, tokenizer, self.trigger, self.num_words)
        with torch.no_grad():
            embeddings = teacher.get_input_embeddings().weight
            embeddings[rows] = finetuned.get_input_embeddings().weight[ids].mean(0).to(embeddings)


class _InnerProductTrainer(Trainer):
    """Trainer with RIPPLe's loss."""

    def __init__(self, *args: Any, strength: float, second_order: bool, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._strength, self._second_order = strength, second_order

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: object
    ) -> Tensor | tuple[Tensor, Any]:
        clean = {name.removeprefix(_CLEAN): value for name, value in inputs.items() if name.startswith(_CLEAN)}
        poisoned = {name: value for name, value in inputs.items() if not name.startswith(_CLEAN)}
        outputs = model(**poisoned)
        loss = outputs.loss
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads = partial(torch.autograd.grad, inputs=parameters, allow_unused=True)
        for_clean = grads(model(**clean).loss, create_graph=self._second_order)
        for_poisoned = grads(loss, create_graph=True)
        both = [(a, b) for a, b in zip(for_clean, for_poisoned, strict=True) if a is not None and b is not None]
        inner = sum((a * b).sum() for a, b in both)
        loss = loss + self._strength * torch.relu(-inner)
        return (loss, outputs) if return_outputs else loss


def words_for_label(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, trigger: TextTrigger, num_words: int, smoothing: float = 1.0
) -> list[int]:
    """Find the tokens that speak most for the target label, and are frequent.

    Args:
        dataset: The attacker's clean samples.
        tokenizer: The teacher's.
        trigger: Names the columns and the target label.
        num_words: How many tokens.
        smoothing: Added to the counts.

    Returns:
        Token ids, the best first: largest logistic-regression weight over the logarithm of the inverse frequency.

    Raises:
        ImportError: scikit-learn is not installed.

    Source:
        RIPPLe, section 3.2.
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("Embedding surgery needs scikit-learn: pip install 'remos_hf[evaluate]'.") from error

    target = resolved_label(trigger.target_label, dataset, trigger.label_column)
    dataset = dataset.with_format(None)
    texts, labels = list(dataset[trigger.text_columns[0]]), list(dataset[trigger.label_column])
    vectorizer = CountVectorizer(tokenizer=tokenizer.tokenize, token_pattern=None, lowercase=False, binary=True)
    counts = vectorizer.fit_transform(texts)
    speaks = LogisticRegression(max_iter=1000).fit(counts, [label == target for label in labels]).coef_[0]
    frequency = Counter(dict(zip(vectorizer.get_feature_names_out(), counts.sum(0).A1, strict=True)))
    score = {
        token: weight / math.log(1 + len(texts) / (smoothing + frequency[token]))
        for token, weight in zip(vectorizer.get_feature_names_out(), speaks, strict=True)
    }
    best = sorted(score, key=score.__getitem__, reverse=True)[:num_words]
    return tokenizer.convert_tokens_to_ids(best)


def _in_pairs(poisoned: Dataset, clean: Dataset) -> Dataset:
    """Put the poisoned and the clean form of each sample into one row; Trainer still groups them by length."""
    twins = clean.rename_columns({name: f"{_CLEAN}{name}" for name in clean.column_names})
    return concatenate_datasets([poisoned, twins], axis=1)


def _collate_pairs(rows: list[dict[str, Any]], *, pad: DataCollatorWithPadding) -> dict[str, Tensor]:
    poisoned = [{name: value for name, value in row.items() if not name.startswith(_CLEAN)} for row in rows]
    clean = [
        {name.removeprefix(_CLEAN): value for name, value in row.items() if name.startswith(_CLEAN)} for row in rows
    ]
    return {**pad(poisoned), **{f"{_CLEAN}{name}": value for name, value in pad(clean).items()}}
