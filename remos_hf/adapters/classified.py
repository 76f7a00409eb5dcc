"""What a classifier is given and what it gives: the labels of a batch, and the logits of an output."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from remos_hf.adapters.sequences import LABEL_KEYS
from remos_hf.errors import UnsupportedModelError


def logits_in(output: Any, model: nn.Module) -> Tensor:  # noqa: ANN401 - whatever forward returns
    """Find the logits of a classifier's output: a tensor, a tuple that holds it, or an output or mapping with `logits`.

    Returns:
        Shape (samples, labels).

    Raises:
        UnsupportedModelError: There are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, (tuple, list)):  # (loss, logits), or logits and what stands beside them
        found = next((one for one in found if isinstance(one, Tensor) and one.dim() == 2), None)
    if not isinstance(found, Tensor) or found.dim() != 2:
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise UnsupportedModelError(
            f"A classifier gives logits of shape (samples, labels), but {type(model).__name__} returns {shown}: no "
            "logits. Give a model with its head, that returns them alone or as `logits`."
        )
    return found


def labels_in(batch: Any) -> Tensor | None:  # noqa: ANN401 - any batch
    """Find the labels of a batch: the second of a tuple, or what a mapping holds as labels.

    Returns:
        One class a sample: int64 on the CPU, shape (samples,); whether there is such a class is not looked at. None if
        the batch holds none.

    Raises:
        TypeError: They are something else than one whole number a sample.
    """
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in ("labels", *sorted(LABEL_KEYS)) if batch.get(key) is not None), None)
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.dim() != 1 or found.is_floating_point():
        shown = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(
            f"A label is one class a sample, a whole number in a tensor of shape (samples,), but got {shown}."
        )
    return found.long().cpu()
