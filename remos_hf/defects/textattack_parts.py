"""Local files in the places of what TextAttack's recipes would fetch."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


def word_list(neighbours: Mapping[str, Sequence[str]]) -> Any:  # noqa: ANN401 - TextAttack's WordEmbedding
    """Make a word embedding of neighbours without vectors.

    The matrix of neighbours is a list of lists, each with the word itself first: rows may differ in length.
    """
    from textattack.shared import WordEmbedding

    words = list(dict.fromkeys([*neighbours, *(near for nears in neighbours.values() for near in nears)]))
    index = {word: place for place, word in enumerate(words)}
    rows = [[index[word], *(index[near] for near in neighbours.get(word, ()))] for word in words]
    return WordEmbedding(np.zeros((0, 1), np.float32), index, dict(enumerate(words)), rows)


def thought_vector(path: Path) -> type:
    """Give ThoughtVector on local vectors; a text without a known word has the vector 0."""
    from textattack.constraints.semantics.sentence_encoders import ThoughtVector
    from textattack.shared import WordEmbedding
    from textattack.shared.utils import words_from_text

    with np.load(path, allow_pickle=False) as file:
        words, vectors = file["words"].tolist(), file["vectors"].astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    index = {word: place for place, word in enumerate(words)}
    embedding = WordEmbedding(vectors, index, dict(enumerate(words)), [[place] for place in range(len(words))])

    class LocalThoughtVector(ThoughtVector):
        def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - ThoughtVector's own
            super().__init__(embedding, **settings)

        def encode(self, raw_text_list: Sequence[str]) -> Tensor:
            return torch.stack([self._mean(text) for text in raw_text_list])

        def clear_cache(self) -> None:
            return

        def _mean(self, text: str) -> Tensor:
            known = [index[word] for word in words_from_text(text) if word in index]
            return torch.from_numpy(vectors[known].mean(0) if known else np.zeros(vectors.shape[1], np.float32))

    return LocalThoughtVector


def language_model(path: Path, device: str) -> type:
    """Give a language model constraint on a causal language model in a local folder."""
    from textattack.constraints.grammaticality.language_models import LanguageModelConstraint

    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).to(device).eval()
    # transformers 5 names a class in tokenizer_config.json that transformers 4 lacks; tokenizer.json says it all.
    tokenizer_class = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    tokenizer = tokenizer_class.from_pretrained(path, local_files_only=True)
    longest = getattr(model.config, "max_position_embeddings", None) or 512

    class CausalLanguageModel(LanguageModelConstraint):
        """Compare the log-probabilities, in nats, of the old and the new word after the words before it."""

        def __init__(
            self, max_log_prob_diff: float | None = None, compare_against_original: bool = True, **_: object
        ) -> None:
            super().__init__(max_log_prob_diff, compare_against_original)
            self.known: dict[tuple[str, str], float] = {}

        def clear_cache(self) -> None:
            self.known.clear()

        def _check_constraint_many(self, transformed_texts: Sequence[Any], reference_text: Any) -> list:  # noqa: ANN401
            wanted = {}
            for text in transformed_texts:
                for place in text.attack_attrs["newly_modified_indices"]:
                    prefix = reference_text.text_until_word_index(place)
                    wanted[prefix, reference_text.words[place]] = wanted[prefix, text.words[place]] = None
            self._ask([pair for pair in wanted if pair not in self.known])
            return super()._check_constraint_many(transformed_texts, reference_text)

        def get_log_probs_at_index(self, text_list: Sequence[Any], word_index: int) -> list[float]:
            prefix = text_list[0].text_until_word_index(word_index)
            pairs = [(prefix, text.words[word_index]) for text in text_list]
            self._ask([pair for pair in pairs if pair not in self.known])
            return [self.known[pair] for pair in pairs]

        def _ask(self, pairs: Sequence[tuple[str, str]]) -> None:
            for start in range(0, len(pairs), 16):
                some = pairs[start : start + 16]
                self.known.update(zip(some, log_probabilities(model, tokenizer, some, longest), strict=True))

    return CausalLanguageModel


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], longest: int
) -> list[float]:
    """Give the log-probability of each word after its prefix, in nats; 0 after a prefix without letters.

    Source: TextAttack, GPT2.get_log_probs_at_index. Differs: all tokens of the word count, with the space before it.
    """
    sequences, starts = [], []
    for prefix, word in pairs:
        before, whole = (_tokens(tokenizer, text) for text in (prefix.rstrip(), prefix + word))
        shared = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        cut = max(0, len(whole) - longest)
        sequences.append(whole[cut:])
        starts.append(max(1, shared - cut))
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences], device=model.device)
    # Padding stands behind every real token, so that a causal model does not see it.
    logs = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return [
        float(logs[row, start - 1 : len(sequence) - 1].sum()) if re.search(r"[^\W\d_]", prefix) else 0.0
        for row, (sequence, start, (prefix, _)) in enumerate(zip(sequences, starts, pairs, strict=True))
    ]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # Not the tokenizer's own special tokens: an end of text, where it adds one, would count as part of the word.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
