"""RECIPE: pre-train a little longer on clean text while the first matrices of the MLPs shrink."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.activations import evaluating
from remos_hf.adapters.sequences import LABEL_KEYS
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number, check_whole
from remos_hf.layers import Layer
from remos_hf.profiling.tokens import input_embeddings
from remos_hf.slicing.competition import competing_layers
from remos_hf.strategies.base import Preparation, Strategy
from remos_hf.strategies.short_runs import HEAD_RATE, Samples, check_counts, free_copy, short_run, together
from remos_hf.strategies.student_data import StudentData

# What transformers calls the layers that read the hidden state into an MLP, by architecture.
_FIRST = (
    "intermediate.dense",  # BERT, RoBERTa, ELECTRA
    "up_proj",  # LLaMA, Mistral, Qwen, Gemma
    "gate_proj",
    "gate_up_proj",  # Phi-3
    "c_fc",  # GPT-2, GPT-Neo
    "fc1",  # OPT, Phi
    "fc_in",  # GPT-J
    "lin1",  # DistilBERT
    "dense_h_to_4h",  # BLOOM, GPT-NeoX
    "mlp.Wi",  # ModernBERT
    "ff.layer_1",  # XLNet
)
_ROUNDING = 1e-4  # of hidden states that do not depend on what was changed
_SHARE_REPLACED, _SHARE_RANDOM = 0.8, 0.1  # of the chosen tokens, as BERT was trained


@dataclass(frozen=True)
class Recipe(Strategy):
    """Continue the teacher's pre-training on the student's texts, and pay for the norms of the MLPs' first matrices.

    Encoders fill in masked tokens, decoders predict the next one; labels are not looked at. Only the first matrices of
    the MLPs train.

    Uses poisoned data or an attack's success: no.

    Attributes:
        steps: Steps of the matrices, at least 1.
        head_steps: Steps that the head for words trains alone before, where the student brings none.
        learning_rate: AdamW's, above 0.
        batch_size: Samples of a step.
        norm_weight: Weight of the sum of the matrices' Frobenius norms in the loss, at least 0.
        masked: Share of the tokens that is to be filled in, in (0, 1).
        mask_token: Id of the tokenizer's mask token; None asks the trainer's tokenizer. Decoders need none.
        seed: Seed of samples and masks; the run's if None.

    Source:
        Zhu et al., TACL 2023; RECIPE.py of their repository (weight 1, clipped at 1, AdamW).
        Differs: on the student's texts, where the authors take 20,000 sentences of BookCorpus. 300 steps at 2e-4, where
        they take 5,000 at 2e-5. Dropout is off. Special tokens may be masked. A classifier brings no head for words:
        one is tied to the embeddings behind a linear map, trained first on the frozen body, and dropped; the authors
        have the teacher's own. Decoders are ours.
    """

    citation: ClassVar[str] = (
        "@article{zhu2023removing, title={Removing Backdoors in Pre-trained Models by Regularized Continual "
        "Pre-training}, author={Zhu, Biru and Cui, Ganqu and Chen, Yangyi and Qin, Yujia and Yuan, Lifan and Fu, Chong "
        "and Deng, Yangdong and Liu, Zhiyuan and Sun, Maosong and Gu, Ming}, journal={Transactions of the Association "
        "for Computational Linguistics}, year={2023}}"
    )

    steps: int = 300
    head_steps: int = 200
    learning_rate: float = 2e-4
    batch_size: int = 32
    norm_weight: float = 1.0
    masked: float = 0.15
    mask_token: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_counts(self, steps=1, head_steps=0, batch_size=1)
        check_number(self, "above 0", lambda one: 0 < one < float("inf"), "learning_rate")
        check_number(self, "a weight in the loss, at least 0", lambda one: 0 <= one < float("inf"), "norm_weight")
        if self.mask_token is not None:
            check_whole(self, "the id of a token, at least 0", 0, "mask_token")
        check_number(self, "a share of the tokens, in (0, 1)", lambda one: 0 < one < 1, "masked")

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Pre-train a copy, write its matrices into the student in place.

        Raises:
            UnsupportedModelError: It reads no tokens, has an encoder and a decoder, or none of its layers is known to
                be the first of an MLP.
            ValueError: It fills in masked tokens, and nothing says which token is the mask.
        """
        start = time.perf_counter()
        names = [layer.parameter_name for layer in _first_matrices(student)]
        seed = data.seed if self.seed is None else self.seed
        samples = Samples(data, next(student.parameters()).device, seed)
        words = Words(free_copy(student), seed)
        causal = _is_causal(words, samples)
        mask = data.mask_token if self.mask_token is None else self.mask_token
        if not causal and mask is None:
            raise ValueError(
                f"{type(student).__name__} learned to fill in masked tokens, and nothing says which token is the mask. "
                "Give Recipe(mask_token=tokenizer.mask_token_id), or the tokenizer as the trainer's processing_class."
            )
        words.mask, words.masked = None if causal else mask, self.masked
        own = words.own_head
        if own is not None and self.head_steps:
            optimizer = torch.optim.AdamW(own.parameters(), HEAD_RATE)
            short_run(words.model, samples, words.loss, optimizer, steps=self.head_steps, batch_size=self.batch_size)
        trained = [words.model.get_parameter(name) for name in dict.fromkeys(names)]
        before = float(_norms(trained))
        losses = short_run(
            words.model,
            samples,
            words.loss,
            torch.optim.AdamW(trained, self.learning_rate),
            steps=self.steps,
            batch_size=self.batch_size,
            penalty=lambda: self.norm_weight * _norms(trained),
            clip=1.0,
        )
        with torch.no_grad():
            for name in names:
                student.get_parameter(name).copy_(words.model.get_parameter(name))
        details = {
            "objective": "next token" if causal else "masked tokens",
            "head": "the student's own" if own is None else "made here, tied to the embeddings",
            "steps": len(losses),
            "head_steps": 0 if own is None else self.head_steps,
            "matrices": len(trained),
            "norms": [before, float(_norms(trained))],
            "loss": [losses[0], losses[-1]],
        }
        return Preparation(seconds={"pre-train": time.perf_counter() - start}, details={"recipe": details})


def _first_matrices(student: nn.Module) -> list[Layer]:
    kind = type(student).__name__
    try:
        input_embeddings(student)
    except TypeError as error:
        raise UnsupportedModelError(f"Recipe is for texts, and {kind} has no embeddings of tokens.") from error
    if student.config.is_encoder_decoder:
        raise UnsupportedModelError(f"Recipe is for texts of one stack, and {kind} has an encoder and a decoder.")
    found = [layer for name, layer in competing_layers(student)[0].items() if name.endswith(_FIRST)]
    if not found:
        raise UnsupportedModelError(f"{kind} has no layer that ends in {', '.join(_FIRST)}, the first of an MLP.")
    return found


def _norms(matrices: list[Tensor]) -> Tensor:
    return sum(torch.linalg.matrix_norm(one) if one.dim() == 2 else one.norm() for one in matrices)


class Words:
    """A copy of the student as a language model.

    Attributes:
        model: The copy.
        own_head: What was put on it to give words; None if it gives words by itself.
        mask: Id of the mask token; None to predict the next token.
        masked: Share of the tokens that is filled in.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.adapter = model, adapter_for(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.embeddings = input_embeddings(model).weight
        self.own_head = None
        self.mask: int | None = None
        self.masked = 0.0
        if model.get_output_embeddings() is None:
            self.own_head = _TiedHead(model.config.get_text_config().hidden_size, self.embeddings)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Give the mean cross-entropy of the tokens to tell. A scalar."""
        tokens, real = self.tokens_of(batch)
        if self.mask is None:
            asked = real & functional.pad(real[:, 1:], (0, 1))
            given, wanted = tokens, tokens.roll(-1, 1)[asked]
        else:
            asked = chosen(real, self.masked, self.generator)
            given, wanted = self._corrupted(tokens, asked), tokens[asked]
        scores = self.scores({**batch, "input_ids": given}, asked)
        return functional.cross_entropy(scores, wanted, reduction="sum") / max(1, len(wanted))

    def scores(self, batch: Mapping[str, Any], asked: Tensor) -> Tensor:
        """Give the scores of all words at the positions asked for. Shape (positions, vocabulary)."""
        if self.own_head is None:
            return self.adapter.forward(batch)["logits"][asked]
        return self.own_head(self.hidden(batch)[asked], self.embeddings)

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Give the last hidden states. Shape (samples, positions, width)."""
        return self.model.base_model(**{key: one for key, one in batch.items() if key not in LABEL_KEYS})[0]

    def tokens_of(self, batch: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - any batch
        """Give the tokens of a batch, and which of them are real. Both of shape (samples, positions)."""
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise UnsupportedModelError("Recipe takes batches with input_ids of shape (samples, positions).")
        real = self.adapter.sequences(batch)["input"].real
        return tokens, torch.ones_like(tokens, dtype=torch.bool) if real is None else real

    def _corrupted(self, tokens: Tensor, asked: Tensor) -> Tensor:
        fate = torch.rand(tokens.shape, generator=self.generator).to(tokens.device)
        other = torch.randint(len(self.embeddings), tokens.shape, generator=self.generator).to(tokens.device)
        corrupted = torch.where(asked & (fate < _SHARE_REPLACED), self.mask, tokens)
        return torch.where(asked & (fate >= 1 - _SHARE_RANDOM), other, corrupted)

    def looks_ahead(self, batch: Mapping[str, Any]) -> bool:
        """Whether the last real token of a sample changes the hidden state of an earlier one."""
        tokens, real = self.tokens_of(batch)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = places.masked_fill(~real, -1).amax(1, keepdim=True)
        changed = torch.where(places == last, (tokens + 1) % len(self.embeddings), tokens)
        with evaluating(self.model), torch.no_grad():
            apart = (self.hidden(batch) - self.hidden({**batch, "input_ids": changed})).abs().amax(-1)
        return bool((apart[real & (places < last)] > _ROUNDING).any())


class _TiedHead(nn.Module):
    """Scores words by their embeddings; what turns a hidden state into one starts as the identity."""

    def __init__(self, width: int, embeddings: Tensor) -> None:
        super().__init__()
        words, size = embeddings.shape
        self.turn = nn.Parameter(torch.eye(size, width, device=embeddings.device))
        self.shift = nn.Parameter(torch.zeros(size, device=embeddings.device))
        self.bias = nn.Parameter(torch.zeros(words, device=embeddings.device))

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        return functional.linear(functional.linear(hidden, self.turn, self.shift), embeddings, self.bias)


def chosen(real: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Choose about this share of the real positions, and at least one of each sample. Bool, shape of `real`."""
    drawn = torch.rand(real.shape, generator=generator).to(real.device).masked_fill(~real, 2.0)
    return real & ((drawn < share) | (drawn == drawn.amin(1, keepdim=True)))


def _is_causal(words: Words, samples: Samples) -> bool:
    """Whether hidden states never depend on later tokens, on any process: the model is a decoder."""

    def ahead() -> dict[str, Tensor]:
        return {"ahead": torch.tensor(float(any(words.looks_ahead(batch) for batch in samples.some(8))))}

    return not bool(together(ahead, samples.device)["ahead"])
