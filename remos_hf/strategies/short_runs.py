"""Short runs on the student's own data before it trains: what several rivals ask a teacher with, or change it by.

They run on a copy of the student in float32 and in eval mode, over all processes: whoever fails says so to the others.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, send_to_device
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.activations import evaluating
from remos_hf.adapters.classified import logits_in
from remos_hf.adapters.sequences import LABEL_KEYS
from remos_hf.errors import NonFiniteError, RemosError
from remos_hf.fields import check_whole
from remos_hf.layers import Layer
from remos_hf.profiling.batches import count_samples, take, unpacked
from remos_hf.profiling.processes import added_up, in_processes
from remos_hf.strategies.l2sp import head_parameters
from remos_hf.strategies.student_data import StudentData

HEAD_RATE = 1e-3
# Of so many batches at least a step takes some rows each: unshuffled data may be sorted by label.
_BATCHES_A_STEP = 4


class Samples:
    """This process's share of the student's data, held in memory in float32, to be drawn from at random.

    Args:
        data: The student's data; as many samples as a run looks at before it trains.
        device: Where what is given lies.
        seed: Of the draws.
    """

    def __init__(self, data: StudentData, device: torch.device, seed: int) -> None:
        self.batches = [convert_to_fp32(batch) for batch in unpacked(data.batches(data.max_samples))]
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def all(self) -> Iterator[Any]:
        """Give every batch, one by one, on the device."""
        return (send_to_device(batch, self.device) for batch in self.batches)

    def some(self, size: int) -> list[Any]:
        """Draw rows out of several batches, together about this process's share of `size` samples."""
        if not self.batches:
            return []
        share = math.ceil(size / (torch.distributed.get_world_size() if in_processes() else 1))
        wanted = max(_BATCHES_A_STEP, math.ceil(share / count_samples(self.batches[0])))
        chosen = torch.randperm(len(self.batches), generator=self.generator)[:wanted].tolist()
        drawn = []
        for batch in (self.batches[number] for number in chosen):
            samples = count_samples(batch)
            rows = torch.randperm(samples, generator=self.generator)[: max(1, share // len(chosen))]
            drawn.append(send_to_device(take(batch, rows, samples), self.device))
        return drawn


def together(compute: Callable[[], Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Add up what every process computes, by name; the same bits on all of them.

    Raises:
        RemosError: Another process failed.
    """
    if not in_processes():
        return dict(compute())
    mine, failure = {}, None
    try:
        mine = dict(compute())
    except Exception as error:
        failure = error
    found = added_up({**mine, "failed": torch.tensor(float(failure is not None))}, device)
    if failure is not None:
        raise failure
    if found.pop("failed"):
        raise RemosError("Another process failed while the student was started; its own message says why.")
    return found


def labelled_loss(model: Callable[..., Any], batch: Any) -> Tensor:  # noqa: ANN401 - any batch
    """Give a model's own loss of a batch with labels; of an (inputs, labels) tuple the cross-entropy. A scalar.

    Raises:
        ValueError: The batch has no labels, or such as cross-entropy knows nothing of, or the model gives no loss.
        UnsupportedModelError: The model gives no logits.
    """
    if isinstance(batch, Mapping) and LABEL_KEYS & batch.keys():
        outputs = model(**batch)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            return outputs["loss"]
        if isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor) and not outputs[0].dim():
            return outputs[0]  # of transformers' models with return_dict=False
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        return _cross_entropy(model(batch[0]), batch[1], model)
    held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        "This start asks for the loss of labelled samples before training, but of a batch of "
        f"{held} the model gives none. Give samples with labels, and a model that returns its loss."
    )


def _cross_entropy(output: Any, labels: Tensor, model: Callable[..., Any]) -> Tensor:  # noqa: ANN401 - any output
    logits = output if isinstance(output, Tensor) else logits_in(output, model)
    if not labels.is_floating_point() or (labels.shape == logits.shape[:1] and bool((labels == labels.round()).all())):
        return functional.cross_entropy(logits, labels.long())
    if labels.shape != logits.shape:
        raise ValueError(
            "This start asks for the cross-entropy of labelled samples before training: labels are whole numbers, or "
            f"probabilities of the shape {tuple(logits.shape)} of the logits, but got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. Give a model that returns its own loss of such labels."
        )
    return functional.cross_entropy(logits, labels.to(logits))


def free_copy(student: nn.Module) -> nn.Module:
    """Copy a student for a short run: float32, nothing in it trains."""
    return copy.deepcopy(student).float().requires_grad_(False)


def with_trained_head(
    student: nn.Module, samples: Samples, *, steps: int, head: tuple[str, ...] | None
) -> tuple[nn.Module, int]:
    """Copy a student and train the copy's head on a frozen body, by AdamW at `HEAD_RATE`.

    Returns:
        The copy, and how many steps were taken: 0 where the head has no parameters of its own, as a language model's
        that is tied to its embeddings.
    """
    asked = free_copy(student)
    names = head_parameters(asked, head)
    new = [parameter for name, parameter in asked.named_parameters() if name in names]
    if not new or not steps:
        return asked, 0
    optimizer = torch.optim.AdamW(new, HEAD_RATE)
    short_run(asked, samples, lambda batch: labelled_loss(asked, batch), optimizer, steps=steps)
    return asked, steps


def short_run(
    model: nn.Module,
    samples: Samples,
    loss: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int = 32,
    penalty: Callable[[], Tensor] | None = None,
    clip: float | None = None,
    until: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Train what the optimizer holds, in place.

    Args:
        model: What runs; it is put into eval mode meanwhile.
        samples: Where batches come from.
        loss: Gives the mean loss of a batch, a scalar.
        optimizer: Over the parameters that train. They do so within this call alone.
        steps: Most steps.
        batch_size: Samples of a step over all processes.
        penalty: What is added to the loss of every step.
        clip: Largest norm of a gradient.
        until: Asked after each step; the run ends when it says so.

    Returns:
        The loss of every step, the penalty apart.

    Raises:
        NonFiniteError: A loss or its gradient is NaN or infinite; that step was not taken.
        ValueError: No process has a sample.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses: list[float] = []
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            for number in range(steps):
                losses.append(_take_gradient(samples, samples.some(batch_size), loss, trained))
                if penalty is not None:
                    penalty().backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, float("inf") if clip is None else clip)
                if not math.isfinite(losses[-1]) or not bool(norm.isfinite()):
                    raise NonFiniteError(
                        f"Step {number} of the run before training has the loss {losses[-1]} and a gradient of norm "
                        f"{float(norm)}. Look for NaN in the data or the teacher, or lower the learning rate."
                    )
                optimizer.step()
                if until():
                    break
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
    return losses


def _take_gradient(
    samples: Samples, batches: Sequence[Any], loss: Callable[[Any], Tensor], trained: Sequence[nn.Parameter]
) -> float:
    """Write the gradient of the mean loss over all processes' samples; give that loss."""
    found = together(lambda: _sums(batches, loss, trained, absolute=False), samples.device)
    rows = _rows(found)
    for place, parameter in enumerate(trained):
        parameter.grad = (found[str(place)] / rows).to(parameter)
    return float(found["loss"]) / rows


def mean_gradient(
    model: nn.Module, samples: Samples, parameters: Mapping[str, nn.Parameter], *, absolute: bool = False
) -> tuple[dict[str, Tensor], int]:
    """Give the gradient of the mean labelled loss over all samples of all processes.

    Args:
        model: What runs, in eval mode meanwhile.
        samples: The data.
        parameters: Those that a gradient is asked of, by name. They want gradients within this call alone.
        absolute: Absolute values of each batch's gradient are added up, so that what pulls both ways counts too.

    Returns:
        Gradients by name, float32, of the parameters' shapes and where they lie; and the number of samples.

    Raises:
        NonFiniteError: A gradient holds NaN or infinity.
        ValueError: No process has a sample.
    """
    asked = list(parameters.values())
    for parameter in asked:
        parameter.requires_grad_(True)
    with evaluating(model), torch.enable_grad():
        found = together(
            lambda: _sums(samples.all(), lambda batch: labelled_loss(model, batch), asked, absolute=absolute),
            samples.device,
        )
    for parameter in asked:
        parameter.requires_grad_(False)
    rows = _rows(found)
    broken = next((name for place, name in enumerate(parameters) if not bool(found[str(place)].isfinite().all())), None)
    if broken is not None:
        raise NonFiniteError(
            f"The gradient of '{broken}' on the student's data holds NaN or infinity. Look for NaN in the data or the "
            "teacher."
        )
    return {name: (found[str(place)] / rows).to(asked[place]) for place, name in enumerate(parameters)}, rows


def _sums(
    batches: Iterable[Any], loss: Callable[[Any], Tensor], parameters: Sequence[nn.Parameter], *, absolute: bool
) -> dict[str, Tensor]:
    """Add up gradients and losses, each as often as its batch has samples."""
    sums = {str(place): torch.zeros_like(one) for place, one in enumerate(parameters)}
    rows, total = 0, 0.0
    for batch in batches:
        size = count_samples(batch)
        found = loss(batch)
        gradients = torch.autograd.grad(found * size, parameters, allow_unused=True)
        for known, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                known += gradient.abs() if absolute else gradient
        rows, total = rows + size, total + size * float(found.detach())
    return {**sums, "rows": torch.tensor(rows), "loss": torch.tensor(total, dtype=torch.float64)}


def _rows(found: Mapping[str, Tensor]) -> int:
    if not int(found["rows"]):
        raise ValueError("There is no sample to start the student with. Pass the student's training data.")
    return int(found["rows"])


def part_of(layer: Layer, whole: Tensor) -> Tensor:
    """Give a layer's part of what has its parameter's shape: that of one expert of a stack, or all of it."""
    return whole if layer.index is None else whole[layer.index]


def check_counts(recipe: object, **least: int) -> None:
    """Refuse fields of a recipe that are no whole numbers, or smaller than given by name.

    Raises:
        ValueError: Names the first one.
    """
    for name, smallest in least.items():
        check_whole(recipe, f"a whole number, at least {smallest}", smallest, name)
