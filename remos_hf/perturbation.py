"""Projected sign steps: climb an objective without leaving a budget around the inputs (PGD, L-inf and L2).

Knows neither models nor images. What found defects and adversarial training share.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from remos_hf.errors import NonFiniteError

# Gives one value for each sample. Values must not depend on the other samples, or these would influence each other.
Objective = Callable[[Tensor], Tensor]
Norm = Literal["linf", "l2"]


def ascend(
    objective: Objective,
    inputs: Tensor,
    *,
    eps: float | Tensor,
    step: float | Tensor,
    steps: int,
    norm: Norm = "linf",
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
    start: Tensor | None = None,
    keep_best: bool = False,
) -> Tensor:
    """Raise each sample's objective by steps of one size, and project after each of them.

    Each sample climbs its own objective: the gradient is of their sum, never of their mean. So the result does not
    depend on the size or the company of a batch, as far as the objective's own arithmetic does not. Models may not
    change while their inputs are searched: run inside `frozen(model)`.

    Args:
        objective: Gives one value for each sample, shape (samples,), of inputs of the shape of `inputs`. Called once
            before each step, in order; with `keep_best` once more, without gradients.
        inputs: The centre of the budget. Floating point, shape (samples, ...), for images (samples, channels, height,
            width). They stay as they are.
        eps: Largest change, at least 0: of each value for "linf", of the length of a sample's whole change for "l2".
            A number, or a tensor that broadcasts against the inputs: (channels, 1, 1) for a budget by channel,
            (samples, 1, 1, 1) for one by sample; for "l2" only the latter.
        step: Size of a step, above 0; likewise.
        steps: Number of steps; 0 gives the projected start.
        norm: "linf": step by the sign of the gradient. "l2": step along the gradient, scaled to length 1.
        low: Smallest valid value, a number or a tensor that broadcasts; None for no limit.
        high: Largest valid value, likewise.
        start: Where to begin, of the inputs' shape, such as `random_start` gives; the inputs themselves if None.
        keep_best: Give, for each sample, the earliest of the visited points with the largest objective, the start and
            the end among them; otherwise the end.

    Returns:
        A tensor of the inputs' shape and dtype. With "linf" every value lies in [inputs - eps, inputs + eps], and its
        difference from the input, taken in their dtype, is at most eps: bit by bit, not only up to rounding; with "l2"
        up to rounding. Every value lies in [low, high]. Where inputs outside [low, high] leave no value that satisfies
        both, [low, high] wins.

    Raises:
        TypeError: The inputs are whole numbers, or of a dtype too coarse for a budget (16 bits).
        ValueError: An argument is out of range or of another shape, or the objective is not one value a sample.
        NonFiniteError: A gradient is NaN or infinite; names the step and the samples.

    Source:
        PGD: Madry et al. 2018. The order of both clips is the ReMoS artifact's (DNNtest/eval_nc.py:235-343) and that of
        advertorch's LinfPGD, which the artifact's and Renofeation's eval_robustness.py use.
        Differs: the gradient is of the sum over samples instead of their mean, which loses small values in large
        batches; sums that rounding puts one bit outside the budget are put back.
    """
    _check_floating(inputs)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is 'linf' or 'l2', but got {norm!r}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps is a whole number, at least 0, but got {steps!r}.")
    if start is not None and (start.shape != inputs.shape or not start.is_floating_point()):
        raise ValueError(
            f"start has the inputs' shape {tuple(inputs.shape)} and holds floating-point values, but got "
            f"{tuple(start.shape)} of {start.dtype}."
        )
    # A caller in inference mode or without gradients gets them here, and only here.
    with torch.inference_mode(False), torch.enable_grad():
        centre = inputs.detach().clone()
        eps = _size("eps", eps, centre, norm)
        step = _size("step", step, centre, norm)
        low, high = _limits(low, high, centre)
        within = _ball(centre, eps, norm)

        def projected(point: Tensor) -> Tensor:
            return _clipped(within(point), low, high)

        point = projected(centre if start is None else start.detach().to(centre))
        best, best_value = point, point.new_full((len(point),), -torch.inf)
        first_broken = torch.full((len(point),), steps, device=point.device)
        for number in range(steps):
            values, gradient = _values_and_gradient(objective, point)
            # Looked at after the last step: to look now would make the device wait at every step.
            broken = ~gradient.flatten(1).isfinite().all(dim=1)
            first_broken = torch.where(broken, first_broken.clamp(max=number), first_broken)
            if keep_best:
                best, best_value = _better(best, best_value, point, values)
            point = projected(point + step * (gradient.sign() if norm == "linf" else _of_length_one(gradient)))
        _refuse_broken(first_broken, steps)
        if not keep_best:
            return point
        with torch.no_grad():
            values = _one_a_sample(objective(point), point)
        return _better(best, best_value, point, values)[0]


def moved(point: Tensor, gradient: Tensor, *, centre: Tensor, eps: float, step: float) -> Tensor:
    """Move each row by one step along its own gradient, and back into its ball.

    Args:
        point: Floating point, (rows, ...).
        gradient: Of the same shape. A row whose gradient is 0 stays, and so do all if any value is NaN or infinite, as
            after a step that overflowed.
        centre: Of the balls; broadcasts against the point.
        eps: Largest length of a row's distance from the centre.
        step: Length of the step.

    Returns:
        A tensor of the point's shape; each row lies in its ball up to rounding.
    """
    gradient = torch.where(gradient.isfinite().all(), gradient, 0)
    within = _ball(centre.expand_as(point), torch.as_tensor(eps, dtype=point.dtype, device=point.device), "l2")
    return within(point + step * _of_length_one(gradient))


def random_start(
    inputs: Tensor, *, eps: float | Tensor, generators: torch.Generator | Sequence[torch.Generator], norm: Norm = "linf"
) -> Tensor:
    """Draw a point of the budget around each input, uniformly; `ascend` clips it.

    Args:
        inputs: Floating point, shape (samples, ...).
        eps: As for `ascend`.
        generators: One for the batch; or one for each sample, so that a sample's start does not depend on the others.
            Numbers are drawn on the generator's own device: one on the CPU gives the same start on every device.
        norm: "linf" draws in the cube, "l2" in the ball.

    Returns:
        A tensor of the inputs' shape, dtype and device.

    Raises:
        TypeError: The inputs are whole numbers.
        ValueError: eps is negative or of another shape, or there are not as many generators as samples.
    """
    _check_floating(inputs)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is 'linf' or 'l2', but got {norm!r}.")
    eps = _size("eps", eps, inputs, norm)
    if not isinstance(generators, torch.Generator) and len(generators) != len(inputs):
        raise ValueError(
            f"There are {len(inputs)} samples, but {len(generators)} generators: one for each is expected."
        )

    def drawn(draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        if isinstance(generators, torch.Generator):
            numbers = draw((len(inputs), *shape), generator=generators, device=generators.device)
        else:
            # stack of nothing is an error, and a batch may be empty
            numbers = inputs.new_empty((0, *shape))
            if len(inputs):
                numbers = torch.stack([draw(tuple(shape), generator=g, device=g.device) for g in generators])
        return numbers.to(inputs)

    if norm == "linf":
        return inputs + eps * (2 * drawn(torch.rand, inputs.shape[1:]) - 1)
    direction = _of_length_one(drawn(torch.randn, inputs.shape[1:]))
    # In n dimensions a share r^n of the ball lies within radius r.
    radius = drawn(torch.rand, (1,) * (inputs.dim() - 1)) ** (1 / max(1, inputs[0:1].numel()))
    return inputs + eps * radius * direction


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold a model still while its inputs are searched: eval mode, no parameter takes part in gradients.

    Args:
        model: The model.

    Yields:
        Nothing. Every module's mode and every parameter's `requires_grad` are put back, whether the block returned or
        raised.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, with_gradient in wanted.items():
            parameter.requires_grad_(with_gradient)


@contextmanager
def unfrozen(model: nn.Module) -> Iterator[None]:
    """Let every parameter take part in gradients, as far as it can have any.

    Args:
        model: The model.

    Yields:
        Nothing. Every parameter's `requires_grad` is put back, whether the block returned or raised.
    """
    still = [one for one in model.parameters() if one.is_floating_point() and not one.requires_grad]
    for parameter in still:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(False)


def _values_and_gradient(objective: Objective, point: Tensor) -> tuple[Tensor, Tensor]:
    point = point.detach().requires_grad_(True)
    values = _one_a_sample(objective(point), point)
    gradient = torch.autograd.grad(values.sum(), point, allow_unused=True)[0] if values.requires_grad else None
    if gradient is None:
        raise ValueError("The objective has no gradient: it was computed without its inputs, or under torch.no_grad().")
    return values.detach(), gradient


def _one_a_sample(values: Tensor, point: Tensor) -> Tensor:
    if values.shape != point.shape[:1]:
        raise ValueError(
            f"The objective gives one value for each of {len(point)} samples, but gave a tensor of shape "
            f"{tuple(values.shape)}. Do not average over the batch."
        )
    return values


def _better(best: Tensor, best_value: Tensor, point: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    better = values > best_value
    shape = (-1, *(1,) * (point.dim() - 1))
    return torch.where(better.view(shape), point, best), torch.where(better, values.to(best_value), best_value)


def _ball(centre: Tensor, eps: Tensor, norm: Norm) -> Callable[[Tensor], Tensor]:
    """Give the projection onto the budget around the centre."""
    if norm == "l2":

        def onto_ball(point: Tensor) -> Tensor:
            change = point - centre
            length = torch.linalg.vector_norm(change, dim=tuple(range(1, change.dim())), keepdim=True)
            return torch.where(length > eps, centre + change * (eps / length), point)

        return onto_ball
    floor, ceiling = centre - eps, centre + eps
    floor = torch.where(centre - floor > eps, torch.nextafter(floor, centre), floor)
    ceiling = torch.where(ceiling - centre > eps, torch.nextafter(ceiling, centre), ceiling)
    return lambda point: torch.clamp(point, floor, ceiling)


def _clipped(point: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    point = point if low is None else torch.maximum(point, low)
    return point if high is None else torch.minimum(point, high)


def _of_length_one(gradient: Tensor) -> Tensor:
    rest = tuple(range(1, gradient.dim()))
    # Squares of small gradients underflow, so the largest value becomes 1 first. A gradient of 0 stays 0.
    largest = gradient.abs().amax(dim=rest, keepdim=True)
    scaled = gradient / torch.where(largest > 0, largest, 1)
    return scaled / torch.linalg.vector_norm(scaled, dim=rest, keepdim=True).clamp(min=1)


def _check_floating(inputs: Tensor) -> None:
    if not inputs.is_floating_point():
        raise TypeError(
            f"Inputs are floating-point values, but got a tensor of {inputs.dtype}. Divide bytes by 255 for pixels "
            "from 0 to 1; perturb a text's embeddings, not its tokens."
        )
    if inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"Inputs of {inputs.dtype} are too coarse for a budget of a few 255ths. Give float32, and convert to 16 "
            "bits inside the objective."
        )


def _size(name: str, size: float | Tensor, inputs: Tensor, norm: Norm) -> Tensor:
    value = _broadcastable(name, size, inputs)
    fits = value >= 0 if name == "eps" else value > 0
    if not bool((fits & value.isfinite()).all()):
        raise ValueError(
            f"{name} is a finite size, {'at least' if name == 'eps' else 'above'} 0, but got {_told(size)}."
        )
    by_axis = (1,) * (inputs.dim() - value.dim()) + tuple(value.shape)
    if norm == "l2" and any(length != 1 for length in by_axis[1:]):
        raise ValueError(
            f"The l2 norm is of a sample's whole change, so {name} is one number, or one for each sample with the "
            f"shape {(len(inputs), *(1,) * (inputs.dim() - 1))}, but got the shape {tuple(value.shape)}."
        )
    return value


def _limits(
    low: float | Tensor | None, high: float | Tensor | None, inputs: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    lowest = None if low is None else _broadcastable("low", low, inputs)
    highest = None if high is None else _broadcastable("high", high, inputs)
    for name, value, given in (("low", lowest, low), ("high", highest, high)):
        if value is not None and bool(value.isnan().any()):
            raise ValueError(f"{name} is a number, but got {_told(given)}.")
    if lowest is not None and highest is not None and bool((lowest > highest).any()):
        raise ValueError(f"low is at most high, but got {_told(low)} and {_told(high)}.")
    return lowest, highest


def _broadcastable(name: str, value: float | Tensor, inputs: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=inputs.dtype, device=inputs.device).detach()
    if name == "eps" and not isinstance(value, Tensor) and float(tensor) > value:
        # A number that float32 lacks: the one below it, so that the budget holds in double precision too.
        tensor = torch.nextafter(tensor, torch.zeros_like(tensor))
    try:
        fits = torch.broadcast_shapes(tensor.shape, inputs.shape) == inputs.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} is a number or a tensor that broadcasts against the inputs of shape {tuple(inputs.shape)}, but "
            f"got the shape {tuple(tensor.shape)}. One number for each channel of an image has the shape (channels, 1, "
            "1)."
        )
    return tensor


def _told(value: float | Tensor) -> str:
    return str(value.tolist() if isinstance(value, Tensor) and value.numel() <= 8 else value)


def _refuse_broken(first_broken: Tensor, steps: int) -> None:
    first = first_broken.tolist()
    step = min(first, default=steps)
    if step == steps:
        return
    samples = [place for place, number in enumerate(first) if number == step]
    named = f"{samples[:8]}{' and more' if len(samples) > 8 else ''}"
    raise NonFiniteError(
        f"The gradient of sample {named} of the batch was NaN or infinite at step {step} (counted from 0). Check these "
        "inputs, or run the model in float32: float16 overflows above 65504."
    )
