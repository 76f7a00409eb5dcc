"""What a classifier says of samples: one forward pass each."""

from collections.abc import Mapping

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from remos_hf.activations import evaluating
from remos_hf.errors import NonFiniteError
from remos_hf.evaluation.tasks import Task


@torch.inference_mode()
def predict_labels(model: nn.Module, dataset: Dataset, task: Task, *, progress: bool = True) -> np.ndarray:
    """Predict the label of each sample.

    Args:
        model: A classifier; the mode of each of its modules is put back.
        dataset: Samples with the task's columns.
        task: How they are read.
        progress: Show a bar on passes longer than two seconds.

    Returns:
        Predicted labels, int64, shape (samples,), in the dataset's order.

    Raises:
        ValueError: The model gives no logits of at least two labels.
        NonFiniteError: A logit is NaN or infinite.
    """
    predicted = np.empty(len(dataset), dtype=np.int64)
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    bar = tqdm(total=len(dataset), desc="predict", delay=2, leave=False, disable=not progress)
    with evaluating(model), bar:
        for rows, batch in task.batches(dataset):
            predicted[rows] = _predict(model, _moved(batch, device, dtype), task.bf16)
            bar.update(len(rows))
    return predicted


def _moved(batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give a batch on the model's device, its floating point (pixels) in the dtype of the model's weights."""
    return {name: one.to(device, dtype if one.is_floating_point() else one.dtype) for name, one in batch.items()}


def _predict(model: nn.Module, batch: Mapping[str, Tensor], bf16: bool) -> np.ndarray:
    with torch.autocast(next(iter(batch.values())).device.type, torch.bfloat16, enabled=bf16):
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
