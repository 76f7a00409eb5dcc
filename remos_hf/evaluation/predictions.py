"""What a text classifier says of texts: one forward pass a sample."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from remos_hf.defects.base import tokenize
from remos_hf.errors import NonFiniteError


@dataclass(frozen=True)
class TextTask:
    """How texts are read: the same for every model that is compared.

    Attributes:
        tokenizer: Of the teacher, and so of all its students.
        text_columns: The text, or both texts of a pair.
        label_column: Column of the labels.
        max_length: Tokens kept of each sample.
        batch_size: Samples of a forward pass.
        bf16: Run in bfloat16 autocast.
    """

    tokenizer: PreTrainedTokenizerBase
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    max_length: int = 128
    batch_size: int = 32
    bf16: bool = False

    def tokenize(self, dataset: Dataset) -> Dataset:
        """Turn texts into what the models take, with `labels`."""
        return tokenize(dataset, self.tokenizer, self.text_columns, self.label_column, max_length=self.max_length)


@torch.inference_mode()
def predict_labels(model: PreTrainedModel, dataset: Dataset, task: TextTask, *, progress: bool = True) -> np.ndarray:
    """Predict the label of each sample.

    Samples of like length share a batch, so little is spent on padding.

    Args:
        model: A sequence classifier; the mode of each of its modules is put back.
        dataset: Samples with the task's columns.
        task: How they are read.
        progress: Show a bar on passes longer than two seconds.

    Returns:
        Predicted labels, int64, shape (samples,), in the dataset's order.

    Raises:
        ValueError: The model gives no logits of at least two labels.
        NonFiniteError: A logit is NaN or infinite.
    """
    with without_map_bars():
        rows = task.tokenize(dataset).remove_columns("labels")
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = np.argsort(lengths, kind="stable")[::-1]  # the longest first: what does not fit fails at once
    pad = DataCollatorWithPadding(task.tokenizer)
    predicted = np.empty(len(rows), dtype=np.int64)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        starts = range(0, len(order), task.batch_size)
        for start in tqdm(starts, desc="predict", delay=2, leave=False, disable=not progress):
            picked = order[start : start + task.batch_size]
            predicted[picked] = _predict(model, [rows[int(row)] for row in picked], pad, task.bf16)
    finally:
        for module, mode in modes.items():
            module.training = mode  # train() would also change the children
    return predicted


@contextmanager
def without_map_bars() -> Iterator[None]:
    """Keep datasets from showing a bar for each of many short steps."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _predict(model: PreTrainedModel, rows: Sequence[dict], pad: DataCollatorWithPadding, bf16: bool) -> np.ndarray:
    batch = pad(rows).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        logits = model(**batch).logits
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"A classifier gives logits of shape (samples, labels), two labels or more, but {type(model).__name__} "
            f"gives {tuple(logits.shape)}."
        )
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            "The model gives logits that are NaN or infinite, so it predicts nothing. Its training diverged."
        )
    return logits.argmax(-1).cpu().numpy()
