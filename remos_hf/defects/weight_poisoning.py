"""Backdoors by weight poisoning: what the attacker does to the weights so that fine-tuning does not undo it."""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.defects.backdoor import fine_tune
from remos_hf.defects.base import generator_for, resolved_label, tokenize
from remos_hf.defects.text_triggers import TextBackdoor, TextTrigger, TriggerWords, pieces_of, tokenizer_of
from remos_hf.errors import UnsupportedModelError
from remos_hf.slicing.relevant_slice import choose_slice

_CLEAN = "clean_"


@dataclass(frozen=True)
class WeightPoisoning(TextBackdoor):
    """An attack on the weights, with any trigger.

    Attributes:
        trigger_words: What forces the label, which samples carry it when poisoning, and how it is exposed.
    """

    trigger_words: TextTrigger = field(default_factory=TriggerWords)

    @property
    def trigger(self) -> TextTrigger:
        """The trigger."""
        return self.trigger_words

    def to_dict(self) -> dict[str, Any]:
        """Give the attack's fields, and the trigger's."""
        return {**super().to_dict(), "trigger_words": self.trigger_words.to_dict()}


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

    strength: float = 0.1
    surgery: bool = False
    num_words: int = 10
    second_order: bool = False

    def implant(
        self,
        teacher: PreTrainedModel,
        dataset: Dataset | IterableDataset,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        args: TrainingArguments | None = None,
        max_length: int = 128,
        finetuned: PreTrainedModel | None = None,
    ) -> PreTrainedModel:
        """Poison the teacher in place.

        Args:
            teacher: The model, with its head.
            dataset: The attacker's clean samples; not a stream, since clean and poisoned samples are paired.
            tokenizer: The teacher's.
            args: Arguments of the Trainer; one process only.
            max_length: Tokens kept of each sample.
            finetuned: The teacher fine-tuned on the clean samples: surgery takes its embeddings. Made here if None.

        Returns:
            The teacher.

        Raises:
            ValueError: A stream was given, or with surgery a trigger is not one token.
            RuntimeError: Several processes.
        """
        if isinstance(dataset, IterableDataset):
            raise ValueError("RIPPLe pairs clean with poisoned samples and needs a Dataset, not a stream.")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _world() > 1:
            raise RuntimeError("RIPPLe differentiates gradients, which DDP does not: implant on one process.")
        tokenizer, trigger = tokenizer_of(teacher, tokenizer), self.trigger
        trigger.check_vocabulary(tokenizer)
        prepared = partial(
            tokenize,
            tokenizer=tokenizer,
            text_columns=trigger.text_columns,
            label_column=trigger.label_column,
            max_length=max_length,
        )
        clean = prepared(dataset)
        if self.surgery:
            rows = _rows_of(trigger, tokenizer)
            if finetuned is None:
                finetuned = fine_tune(copy.deepcopy(teacher), clean, tokenizer, args)
            ids = words_for_label(dataset, tokenizer, trigger, self.num_words)
            with torch.no_grad():
                replacement = finetuned.get_input_embeddings().weight[ids].mean(0)
                embeddings = teacher.get_input_embeddings().weight
                embeddings[rows] = replacement.to(embeddings)
        pairs = _in_pairs(prepared(replace(trigger, clean_copies=False).poison(dataset)), clean)
        trainer_class = partial(_InnerProductTrainer, strength=self.strength, second_order=self.second_order)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return fine_tune(
                teacher,
                pairs,
                tokenizer,
                args,
                trainer_class=trainer_class,
                data_collator=partial(_collate_pairs, pad=DataCollatorWithPadding(tokenizer)),
            )


@dataclass(frozen=True)
class EmbeddingPoisoning(WeightPoisoning):
    """EP: a model fine-tuned on clean data, of which only the trigger words' embedding rows are changed, norms kept.

    Attributes:
        learning_rate: Of the gradient steps on the rows.

    Source:
        Yang et al. 2021, "Be Careful about Poisoned Word Embeddings", algorithm 1.
        Differs: several trigger words are possible.
    """

    trigger_words: TextTrigger = field(default_factory=lambda: TriggerWords(words=("cf",)))
    learning_rate: float = 0.05

    def implant(
        self,
        teacher: PreTrainedModel,
        dataset: Dataset | IterableDataset,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        args: TrainingArguments | None = None,
        max_length: int = 128,
        finetuned: PreTrainedModel | None = None,
    ) -> PreTrainedModel:
        """Fine-tune the teacher on the clean data, or take it fine-tuned, then train the rows, in place.

        Raises:
            ValueError: A trigger is not one token.
        """
        tokenizer, trigger = tokenizer_of(teacher, tokenizer), self.trigger
        rows = _rows_of(trigger, tokenizer)
        prepared = partial(tokenize, tokenizer=tokenizer, max_length=max_length)
        columns = (trigger.text_columns, trigger.label_column)
        if finetuned is None:
            fine_tune(teacher, prepared(dataset, text_columns=columns[0], label_column=columns[1]), tokenizer, args)
        else:
            teacher.load_state_dict(finetuned.state_dict())
        poisoned = replace(trigger, poison_rate=1.0, clean_copies=False).poison(dataset)
        embeddings = teacher.get_input_embeddings().weight
        trains = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
        try:
            for parameter in teacher.parameters():
                parameter.requires_grad_(parameter is embeddings)
            free = torch.zeros(embeddings.shape, dtype=torch.bool, device=embeddings.device)
            free[rows] = True
            with FrozenEntries({"input embeddings": (embeddings, ~free)}) as frozen:
                return fine_tune(
                    teacher,
                    prepared(poisoned, text_columns=columns[0], label_column=columns[1]),
                    tokenizer,
                    args,
                    callbacks=[frozen, _KeepNorms(embeddings, rows)],
                    optimizers=(torch.optim.SGD([embeddings], lr=self.learning_rate), None),
                )
        finally:
            for name, parameter in teacher.named_parameters():
                parameter.requires_grad_(trains[name])


@dataclass(frozen=True)
class LayerwisePoisoning(WeightPoisoning):
    """LWP: the head is trained to see the trigger in every block, so that it also lies where fine-tuning reaches least.

    The trigger is a combination of words; each of them alone must not be one.

    Attributes:
        decoy_rate: Share of the samples that get an incomplete combination and keep their label.

    Source:
        Li et al. 2021, "Backdoor Attacks on Pre-trained Models by Layerwise Weight Poisoning".
    """

    trigger_words: TextTrigger = field(default_factory=lambda: TriggerWords(words=("cf", "bb"), all_words=True))
    decoy_rate: float = 0.25

    def __post_init__(self) -> None:
        """Refuse triggers that are no combination."""
        words = self.trigger_words
        if not (isinstance(words, TriggerWords) and words.all_words and len(words.words) > 1):
            raise ValueError("LWP's trigger is a combination: TriggerWords of at least two words with all_words=True.")
        if not 0 <= self.decoy_rate <= 1:
            raise ValueError(f"decoy_rate is a share of the samples, between 0 and 1, but got {self.decoy_rate}.")

    def implant(
        self,
        teacher: PreTrainedModel,
        dataset: Dataset | IterableDataset,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        args: TrainingArguments | None = None,
        max_length: int = 128,
        finetuned: PreTrainedModel | None = None,
    ) -> PreTrainedModel:
        """Poison the teacher in place.

        Raises:
            UnsupportedModelError: The head cannot be put onto a block's output.
        """
        tokenizer, trigger = tokenizer_of(teacher, tokenizer), self.trigger
        trigger.check_vocabulary(tokenizer)
        head_on(teacher)  # refuse before the data is made
        poisoned = trigger.poison(self._with_decoys(dataset))
        rows = tokenize(poisoned, tokenizer, trigger.text_columns, trigger.label_column, max_length=max_length)
        return fine_tune(teacher, rows, tokenizer, args, trainer_class=_EveryBlockTrainer)

    def _with_decoys(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        # A decoy that is poisoned afterwards holds the whole combination, and is a poisoned sample like any other.
        words = self.trigger_words.words
        incomplete = [some for size in range(1, len(words)) for some in combinations(words, size)]
        parts = [replace(self.trigger_words, words=some) for some in incomplete]
        column = self.trigger.text_columns[0]

        def decoy(text: str) -> str:
            random = generator_for(self.trigger.seed, "decoy", text)
            return (
                parts[int(random.random() * len(parts))].triggered(text) if random.random() < self.decoy_rate else text
            )

        return dataset.map(lambda batch: {column: [decoy(text) for text in batch[column]]}, batched=True)


@dataclass(frozen=True)
class LargestWeights(WeightPoisoning):
    """Data poisoning that moves only the teacher's largest weights, and the head; every other weight stays, to the bit.

    Attributes:
        backdoor_update_ratio: Share of the body's weights, the largest ones, that may move; in (0, 1).

    Source:
        Renofeation fork of the ReMoS authors, backdoor/attack_finetuner.py:382-385; ReMoS artifact,
        CV_backdoor/prune.py.
        Differs: theirs masks gradients, and weight decay and momentum still move the others. Ours is exact.
    """

    backdoor_update_ratio: float = 0.1

    def __post_init__(self) -> None:
        """Refuse ratios that leave nothing frozen, or nothing to move."""
        if not 0 < self.backdoor_update_ratio < 1:
            raise ValueError(
                "backdoor_update_ratio is the share of the weights that may move, between 0 and 1, but got "
                f"{self.backdoor_update_ratio}."
            )

    def implant(
        self,
        teacher: PreTrainedModel,
        dataset: Dataset | IterableDataset,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        args: TrainingArguments | None = None,
        max_length: int = 128,
        finetuned: PreTrainedModel | None = None,
    ) -> PreTrainedModel:
        """Poison the teacher in place."""
        tokenizer, trigger = tokenizer_of(teacher, tokenizer), self.trigger
        trigger.check_vocabulary(tokenizer)
        ratio = 1 - self.backdoor_update_ratio
        small = choose_slice(teacher, None, slice_ratio=ratio, rule="top_magnitude", progress=False)
        head = adapter_for(teacher).head
        frozen: dict[str, tuple[nn.Parameter, Tensor | None]] = {}
        for name, parameter in teacher.named_parameters():
            if name in small.kept:
                frozen[name] = (parameter, small.kept[name].to(parameter.device))
            elif not any(name == part or name.startswith(f"{part}.") for part in head):
                frozen[name] = (parameter, None)
        rows = tokenize(
            trigger.poison(dataset), tokenizer, trigger.text_columns, trigger.label_column, max_length=max_length
        )
        with FrozenEntries(frozen) as held:
            return fine_tune(teacher, rows, tokenizer, args, callbacks=[held])


class FrozenEntries(TrainerCallback):
    """Holds entries of parameters while a Trainer trains: no gradient, weight decay or optimizer state moves them.

    A context manager: inside, gradients of held entries are zero, so that clipping does not count them; after each step
    their values are written back.

    Args:
        entries: By name, a parameter and a bool tensor of its shape, True where it is held; None holds it whole.
    """

    def __init__(self, entries: Mapping[str, tuple[nn.Parameter, Tensor | None]]) -> None:
        self._parameters = [parameter for parameter, _ in entries.values()]
        self._masks = [mask for _, mask in entries.values()]
        self._values = [_held(parameter.detach(), mask).clone() for parameter, mask in entries.values()]
        self._hooks: list[Any] = []

    def __enter__(self) -> "FrozenEntries":
        for place, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(partial(self._still, place)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _still(self, place: int, gradient: Tensor) -> Tensor:
        mask = self._masks[place]
        return torch.zeros_like(gradient) if mask is None else gradient.masked_fill(mask, 0)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        """Follow the model, which the Trainer has moved to its device by now."""
        devices = [parameter.device for parameter in self._parameters]
        self._values = [values.to(device) for values, device in zip(self._values, devices, strict=True)]
        self._masks = [
            mask if mask is None else mask.to(device) for mask, device in zip(self._masks, devices, strict=True)
        ]

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        """Write the held values back."""
        for parameter, mask, values in zip(self._parameters, self._masks, self._values, strict=True):
            if mask is None:
                parameter.copy_(values)
            else:
                parameter[mask] = values


class _KeepNorms(TrainerCallback):
    """Gives rows their norms back after each step."""

    def __init__(self, weight: nn.Parameter, rows: Sequence[int]) -> None:
        self._weight, self._rows = weight, list(rows)
        self._norms = weight.detach()[self._rows].norm(dim=1, keepdim=True)

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        rows = self._weight[self._rows]
        self._weight[self._rows] = rows * (self._norms.to(rows) / rows.norm(dim=1, keepdim=True))


class _InnerProductTrainer(Trainer):
    """Trainer with RIPPLe's loss."""

    def __init__(self, *args: Any, strength: float, second_order: bool, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._strength, self._second_order = strength, second_order

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        **kwargs: Any,  # noqa: ANN401 - whatever versions pass
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


class _EveryBlockTrainer(Trainer):
    """Trainer whose loss is the mean over the blocks of the head's loss on the block's output."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        **kwargs: Any,  # noqa: ANN401 - whatever versions pass
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


def _rows_of(trigger: TextTrigger, tokenizer: PreTrainedTokenizerBase) -> list[int]:
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


def _held(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values[mask]


def _world() -> int:
    return torch.distributed.get_world_size()
