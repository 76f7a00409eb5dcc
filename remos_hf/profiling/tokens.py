"""Which tokens the student's data shows: the rows of the input embeddings that fine-tuning can reach."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def seen_tokens(model: nn.Module, batches: Iterable, *, across_processes: bool = False) -> Tensor:
    """Find the tokens that occur in the data, padding left out.

    Args:
        model: A model with input embeddings.
        batches: Batches as Trainer makes them: `input_ids`, and `attention_mask` where there is padding.
        across_processes: Every process of torch.distributed's default group gives its share of the batches, and all of
            them get what any of them saw.

    Returns:
        Bool tensor, shape (rows of the input embeddings,), True where the token occurs; on the CPU.

    Raises:
        TypeError: The model has no input embeddings, or a batch has no `input_ids`.
        ValueError: There is no batch.
    """
    seen = torch.zeros(len(input_embeddings(model).weight), dtype=torch.int64)
    empty = True
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError("Tokens are counted from batches with input_ids, as Trainer makes them of text.")
        tokens, mask = batch["input_ids"].cpu(), batch.get("attention_mask")
        seen[tokens if mask is None else tokens[mask.cpu().bool()]] = 1
        empty = False
    if across_processes and torch.distributed.is_available() and torch.distributed.is_initialized():
        # NCCL takes tensors of its device only.
        device = next(model.parameters()).device
        shared = seen.to(device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        seen, empty = shared.cpu(), not bool(shared.any())
    if empty:
        raise ValueError("The student's data holds no sample, so no token counts as seen.")
    return seen.bool()


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
