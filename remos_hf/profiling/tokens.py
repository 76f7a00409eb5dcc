"""Which tokens the student's data shows: the rows of the input embeddings that fine-tuning can reach."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.profiling.batches import unpacked
from remos_hf.profiling.processes import added_up, in_processes


def seen_tokens(model: nn.Module, batches: Iterable, *, across_processes: bool = False) -> Tensor:
    """Find the tokens that occur in the data, padding left out.

    Args:
        model: A model with input embeddings.
        batches: Batches as Trainer makes them: `input_ids`, and `attention_mask` where there is padding. Of
            encoder-decoders the decoder's tokens count too: `decoder_input_ids`, or else `labels`.
        across_processes: Every process of torch.distributed's default group gives its share of the batches, and all of
            them get what any of them saw.

    Returns:
        Bool tensor, shape (rows of the input embeddings,), True where the token occurs; on the CPU.

    Raises:
        TypeError: The model has no input embeddings, or a batch has no `input_ids`.
        ValueError: There is no batch.
        UnsupportedModelError: A mask cannot be laid on the tokens.
    """
    seen = torch.zeros(len(input_embeddings(model).weight), dtype=torch.int64)
    adapter = adapter_for(model, head=())
    for batch in unpacked(batches):
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError("Tokens are counted from batches with input_ids, as Trainer makes them of text.")
        found = adapter.sequences(batch)
        for name, sequence in found.items():
            tokens = _tokens_of(batch, name)
            if tokens is not None:
                seen[(tokens if sequence.real is None else tokens[sequence.real]).cpu()] = 1
    if across_processes and in_processes():
        seen = added_up({"seen": seen}, next(model.parameters()).device)["seen"]
    if not bool(seen.any()):
        raise ValueError("The student's data holds no sample, so no token counts as seen.")
    return seen.bool()


def _tokens_of(batch: Mapping, name: str) -> Tensor | None:
    if name == "input":
        return batch["input_ids"]
    return batch.get("decoder_input_ids", batch.get("labels")) if name == "decoder" else None


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """Give a model's input embeddings.

    Raises:
        TypeError: It has none.
    """
    find = getattr(model, "get_input_embeddings", None)
    found = find() if find is not None else None
    if not isinstance(found, nn.Embedding):
        raise TypeError(f"{type(model).__name__} has no input embeddings, so embedding_rows must be 'keep'.")
    return found
