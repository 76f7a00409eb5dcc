"""Where a model looks: activation maps, Grad-CAM, and the share of a map that lies inside a trigger."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import repeat, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.activations import evaluating, watch
from remos_hf.adapters.classified import logits_in
from remos_hf.adapters.timm_models import check_images, timm_place
from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.evaluation.measures import bootstrap_interval

# Class, distillation and register tokens before the patches, where a model does not say how many it has.
_MOST_PREFIX_TOKENS = 9


@torch.no_grad()
def activation_map(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """Average a layer's output over its channels, position by position.

    The layer's output is read as follows.

    - Four axes: channels on axis 1 (convolutions) or on the last one (Swin), whichever leaves two axes in the image's
      proportions. If both do, or neither, the layers inside decide: `...2d` ones mean axis 1, Linear and LayerNorm the
      last axis.
    - Three axes: tokens and channels (ViT). The tokens are the patches of a grid of square patches, row by row, after
      as many class and register tokens as timm's `num_prefix_tokens` says; elsewhere after the fewest that leave a
      grid. Those are dropped.

    Args:
        model: Takes the inputs alone. It runs in eval mode, without gradients, and is left as it was.
        layer: Dotted name of the module.
        inputs: Images as the model takes them, floating point, shape (samples, channels, height, width).

    Returns:
        float32, shape (samples, rows, columns) of the layer's own grid, on its device. Means can be negative where no
        ReLU acted.

    Raises:
        TypeError: The inputs are no floating-point images.
        ValueError: They do not have four axes, or the model has no such layer.
        UnsupportedModelError: The layer does not run just once a forward pass, or its output is no map.

    Source:
        The attention maps of the Renofeation fork (backdoor/draw_attention.py): mean over the channels of layer4.
        Differs: the mean keeps its sign (there it is of magnitudes, the same after a ReLU) and is not stretched to 0-1.
    """
    module = _layer_of(model, layer)
    check_images(inputs)
    maps: list[Tensor] = []

    def see(_: str, __: Tensor, output: Tensor) -> None:
        # At once: an in-place ReLU after the layer would overwrite what it gave.
        maps.append(_channels_first(output, inputs, model, layer).float().mean(1))

    with evaluating(model), watch({layer: module}, see):
        model(inputs)
    _check_ran_once(layer, len(maps))
    return maps[0]


def grad_cam(model: nn.Module, layer: str, inputs: Tensor, labels: Tensor) -> Tensor:
    """Weight a layer's channels by their mean gradient towards a label, add them up, keep what is positive (Grad-CAM).

    Args:
        model: Takes the inputs alone, returns logits of shape (samples, labels), or an object with `logits`. It runs in
            eval mode and is left as it was; the gradients of its parameters are not touched.
        layer: Dotted name of the module, which returns one tensor, read as `activation_map` says. The last stage is
            usual. In a ViT that classifies its class token, name a norm inside the last block (timm
            `blocks.11.norm1`): after that block the other tokens reach no logit, and their map is empty.
        inputs: Images as the model takes them, floating point, shape (samples, channels, height, width).
        labels: The label whose evidence is shown: the target label, or the predicted one. Integers, shape (samples,).

    Returns:
        float32, 0 or more, shape (samples, rows, columns) of the layer's own grid, on the inputs' device.

    Raises:
        TypeError: The inputs are no floating-point images.
        ValueError: They do not have four axes, the labels do not fit, or the model has no such layer.
        UnsupportedModelError: The model gives no logits, the layer does not run just once a forward pass, its output is
            no map, or no gradient reaches it.
        ImportError: The package grad-cam is not installed.

    Source:
        Selvaraju et al., ICCV 2017, by pytorch_grad_cam.GradCAM.
        Differs: that class also takes each map's minimum away, stretches it to 0-1 and resizes it, after which a share
        of its mass would mean nothing; this is its map before that.
    """
    module = _layer_of(model, layer)
    check_images(inputs)
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"labels are integers, one an image, shape ({len(inputs)},), but got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if next(model.parameters(), None) is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameter, so nothing in it was trained to look.")

    def read(output: Any) -> Tensor:  # noqa: ANN401 - whatever the layer returns
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"Grad-CAM needs a layer that returns one tensor, but '{layer}' returns {type(output).__name__}. "
                "Name a module inside it, such as its norm."
            )
        # A copy, because an in-place ReLU after the layer would overwrite what is kept.
        return _channels_first(output, inputs, model, layer).float().clone()

    with evaluating(model), torch.enable_grad():
        cam = _library().GradCAM(model, [module], reshape_transform=read)
        try:
            # Gradients with respect to the inputs pass the layer and leave those of the parameters alone.
            probe = inputs.detach().clone().requires_grad_()
            logits = logits_in(cam.activations_and_grads(probe), model)
            _check_in_range(labels, logits)
            chosen = logits.gather(1, labels.to(logits.device, torch.int64)[:, None]).sum()
            if chosen.requires_grad:
                torch.autograd.grad(chosen, probe, allow_unused=True)
            outputs, gradients = cam.activations_and_grads.activations, cam.activations_and_grads.gradients
            _check_ran_once(layer, len(outputs))
            if not gradients:
                raise UnsupportedModelError(
                    f"No gradient of the logits reaches '{layer}'. Name a layer that they are computed from."
                )
            summed = cam.get_cam_image(probe, module, None, outputs[0].numpy(), gradients[0].numpy())
        finally:
            # Its own `with` block would print and swallow an IndexError.
            cam.activations_and_grads.release()
    return torch.from_numpy(np.maximum(summed, 0)).to(inputs.device)


def resized_mass(maps: Tensor, height: int, width: int) -> Tensor:
    """Lay the positive part of maps over their images.

    Args:
        maps: Floating point, shape (samples, rows, columns). Negative values count as 0, before resizing.
        height: Of the images, in pixels.
        width: Likewise.

    Returns:
        float64, shape (samples, height, width): bilinear between the centres of the map's cells (align_corners=False),
        constant beyond them.

    Raises:
        TypeError: The maps are no floating-point values.
        ValueError: They have another number of axes than three, or no cell.
        NonFiniteError: A value is NaN or infinite.
    """
    if not maps.is_floating_point():
        raise TypeError(f"Maps are floating-point values, but got {maps.dtype}.")
    if maps.dim() != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"Maps have the shape (samples, rows, columns), but got {tuple(maps.shape)}.")
    if not torch.isfinite(maps).all():
        raise NonFiniteError("A map holds NaN or infinity: the model's activations or gradients overflow on an image.")
    positive = maps.double().clamp_min(0)[:, None]
    return functional.interpolate(positive, size=(height, width), mode="bilinear", align_corners=False)[:, 0]


def share_in_trigger(maps: Tensor, mask: Tensor) -> Tensor:
    """Give the share of each map's mass that lies inside the trigger.

    Args:
        maps: Floating point, shape (samples, rows, columns); laid over the images by `resized_mass`.
        mask: Bool, True inside the trigger, in the pixels of the model's inputs. Shape (height, width) for all samples,
            or (samples, height, width).

    Returns:
        float64, shape (samples,), in [0, 1]; NaN for a map without mass.

    Raises:
        TypeError: The mask is not bool, or the maps are no floating-point values.
        ValueError: Shapes do not fit, or a mask is empty.
        NonFiniteError: A map holds NaN or infinity.
    """
    masks = _checked_mask(mask, len(maps)).to(maps.device)
    mass = resized_mass(maps, *masks.shape[1:])
    return (mass * masks).sum((1, 2)) / mass.sum((1, 2))


@dataclass(frozen=True)
class TriggerShare:
    """How much of the maps of a test set lies inside the trigger.

    Attributes:
        value: Mean share of the maps' mass inside the trigger, in [0, 1]; None when no map has mass.
        low: Lower end of its 95 % bootstrap interval over samples; None likewise.
        high: Upper end, likewise.
        chance: The trigger's share of the image's area, on the same samples: what a map that is the same everywhere
            has. None likewise.
        num_samples: Samples whose map has mass: those that the mean is over.
        num_without_mass: Samples whose map has none, left out.
    """

    value: float | None
    low: float | None
    high: float | None
    chance: float | None
    num_samples: int
    num_without_mass: int

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return asdict(self)


def mean_share(
    maps: Iterable[Tensor], masks: Tensor | Iterable[Tensor], *, seed: int = 0, resamples: int = 2000
) -> TriggerShare:
    """Average `share_in_trigger` over a whole test set. Maps are taken batch by batch and not kept.

        exposed = (activation_map(student, "body.layer4", batch["pixel_values"]) for batch in loader)
        print(mean_share(exposed, mask))

    Args:
        maps: Batches of maps, shape (samples, rows, columns) each.
        masks: One bool mask of shape (height, width) for all samples, or batches of masks, shape (samples, height,
            width) each, for triggers that lie elsewhere on every image.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        The mean with its interval, beside the chance level and the numbers of samples. The value does not depend on
        how samples are cut into batches.

    Raises:
        TypeError: A mask is not bool, or maps are no floating-point values.
        ValueError: There is no sample, or masks do not go with maps.
        NonFiniteError: A map holds NaN or infinity.
    """
    single = isinstance(masks, Tensor)
    if single and masks.dim() != 2:
        raise ValueError(
            f"One mask for all samples has the shape (height, width), but got {tuple(masks.shape)}. Give masks of "
            "single samples as batches, like the maps."
        )
    shares, areas = [np.empty(0)], [np.empty(0)]
    for batch, mask in zip(maps, repeat(masks), strict=False) if single else zip_longest(maps, masks):
        if batch is None or mask is None:
            raise ValueError("Every batch of maps goes with a batch of masks, but one of them ended before the other.")
        shares.append(share_in_trigger(batch, mask).cpu().numpy())
        area = mask.double().mean((-2, -1)).cpu().numpy()
        areas.append(np.broadcast_to(area, len(batch)))
    share, area = np.concatenate(shares), np.concatenate(areas)
    if not share.size:
        raise ValueError("There is no map to average. An iterator that was used up gives none: make it again.")
    held = ~np.isnan(share)
    if not held.any():
        return TriggerShare(None, None, None, None, 0, int(share.size))
    low, high = bootstrap_interval(share[held], statistic=lambda one: one.mean(-1), seed=seed, resamples=resamples)
    value, chance = float(share[held].mean()), float(area[held].mean())
    return TriggerShare(value, low, high, chance, int(held.sum()), int((~held).sum()))


def _layer_of(model: nn.Module, layer: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if not layer or layer not in modules:
        raise ValueError(
            f"layer is the dotted name of a module inside {type(model).__name__}, but got {layer!r}. Its direct "
            f"children are {[name for name, _ in model.named_children()]}."
        )
    return modules[layer]


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise ImportError("Grad-CAM needs the package grad-cam: pip install 'remos_hf[plots]'.") from error
    return pytorch_grad_cam


def _channels_first(output: Tensor, inputs: Tensor, model: nn.Module, layer: str) -> Tensor:
    """View a layer's output as (samples, channels, rows, columns)."""
    size = tuple(inputs.shape[2:])
    if len(output) == len(inputs):
        if output.dim() == 4:
            return output if _has_channels_first(output, size, model, layer) else output.permute(0, 3, 1, 2)
        place = _patches_of(output.shape[1], size, model) if output.dim() == 3 else None
        if place is not None:
            prefix, grid = place
            return output[:, prefix:].transpose(1, 2).unflatten(2, grid)
    raise UnsupportedModelError(
        f"'{layer}' gives shape {tuple(output.shape)} for {len(inputs)} images of {size[0]} x {size[1]} pixels, which "
        "is no map of them. Name a layer that gives (samples, channels, rows, columns), (samples, rows, columns, "
        "channels) or (samples, tokens, channels), where the tokens are the patches of a grid."
    )


def _has_channels_first(output: Tensor, size: tuple[int, int], model: nn.Module, layer: str) -> bool:
    first, last = (_is_in_proportion(grid, size) for grid in (output.shape[2:], output.shape[1:3]))
    if first != last:
        return first
    inside = list(model.get_submodule(layer).modules())
    first = any(type(module).__name__.endswith("2d") for module in inside)
    plain = (module for module in inside if not type(module).__name__.endswith("2d"))
    last = any(isinstance(module, (nn.Linear, nn.LayerNorm)) for module in plain)
    if first != last:
        return first
    raise UnsupportedModelError(
        f"'{layer}' gives shape {tuple(output.shape)}, whose channels may lie on axis 1 or on the last one. Name the "
        "convolution, Linear or norm beside it, which tells."
    )


def _is_in_proportion(grid: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether a grid could be an image's size divided by a stride and rounded up."""
    (rows, columns), (height, width) = grid, size
    return rows <= height and columns <= width and abs(rows * width - columns * height) < max(size)


def _patches_of(tokens: int, size: tuple[int, int], model: nn.Module) -> tuple[int, tuple[int, int]] | None:
    """Give the number of tokens before the patches, and the patches' rows and columns."""
    grids = {}
    for side in range(1, min(size) + 1):
        rows, columns = size[0] // side, size[1] // side
        grids[rows * columns] = rows, columns
    place = timm_place(model)
    known = getattr(place[1], "num_prefix_tokens", None) if place else None
    # What lies before the class token is put in has none yet.
    for prefix in range(_MOST_PREFIX_TOKENS + 1) if known is None else (known, 0):
        if tokens - prefix in grids and (known is not None or prefix <= tokens - prefix):
            return prefix, grids[tokens - prefix]
    return None


def _check_ran_once(layer: str, times: int) -> None:
    if times != 1:
        raise UnsupportedModelError(
            f"A map is of a layer that runs once a forward pass, but '{layer}' ran {times} times. Name another one."
        )


def _check_in_range(labels: Tensor, logits: Tensor) -> None:
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]):
        raise ValueError(
            f"labels are from 0 to {logits.shape[1] - 1} for a model with {logits.shape[1]} logits, but got "
            f"{int(labels.min())} to {int(labels.max())}."
        )


def _checked_mask(mask: Tensor, num_samples: int) -> Tensor:
    """Give masks of shape (samples or 1, height, width)."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask is bool, True inside the trigger, but got {mask.dtype}. Compare with what counts: opacity > 0."
        )
    masks = mask[None] if mask.dim() == 2 else mask
    if masks.dim() != 3 or (mask.dim() == 3 and len(masks) != num_samples):
        raise ValueError(
            f"mask has the shape (height, width), or (samples, height, width) for {num_samples} maps, but got "
            f"{tuple(mask.shape)}."
        )
    if not masks.flatten(1).any(1).all():
        raise ValueError("A mask is False everywhere: there is no trigger for a map to lie in.")
    return masks
