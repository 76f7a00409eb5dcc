"""For every class of a student the smallest change of images, one for all of them, that turns them into this class.

A class that a much smaller change reaches than the others has a shortcut, as a backdoor is one.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from remos_hf.adapters.base import inputs_of
from remos_hf.adapters.classified import labels_in, logits_in
from remos_hf.adapters.images import ImageInput, image_input_of
from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.perturbation import frozen
from remos_hf.scanning.suspects import Effect, Scan, Suspect

PATCH_CITATION = (
    "@inproceedings{wang2019neural, title={Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural "
    "Networks}, author={Wang, Bolun and Yao, Yuanshun and Shan, Shawn and Li, Huiying and Viswanath, Bimal and Zheng, "
    "Haitao and Zhao, Ben Y.}, booktitle={IEEE Symposium on Security and Privacy}, pages={707--723}, year={2019}}"
)
# How fast the weight of the size follows the rate of images that turn, and how long that rate remembers.
_HEAVIER, _LIGHTER, _MEMORY = 1.2, 1 / 1.3, 0.7
_OUTSIDE = 0.02  # how far rounding may bring a pixel out of the range from 0 to 1
_FEWEST_IMAGES = 4
_PICTURES, _SIDE = 20, 96  # that a scan keeps, and the longest side of one, so that its file stays small


@dataclass(frozen=True)
class Change:
    """A change of images, the same for all of them.

    Attributes:
        size: Of a patch, the sum of the mask over the number of pixels; of a perturbation, the root mean square of what
            is added to the values. 1 if none was found that turns enough images.
        mask: Share of each pixel that the pattern covers, shape (height, width); None of a perturbation.
        pattern: The colours under the mask, from 0 to 1, or what is added, from -1 to 1; shape (channels, height,
            width). None if no change was found.
    """

    size: float
    mask: Tensor | None = None
    pattern: Tensor | None = None

    def on(self, pixels: Tensor) -> Tensor:
        """Put the change onto images: values from 0 to 1, shape (..., channels, height, width)."""
        if self.pattern is None:
            return pixels
        if self.mask is None:
            return (pixels + self.pattern).clamp(0, 1)
        return pixels + self.mask * (self.pattern - pixels)

    def kept(self) -> "Change":
        """Give it apart from what goes on changing."""
        parts = [one if one is None else one.detach().clone() for one in (self.mask, self.pattern)]
        return Change(self.size, *parts)


def scan_patches(
    student: nn.Module,
    data: Iterable[Any],
    *,
    labels: Sequence[str] | None = None,
    images: ImageInput | None = None,
    reference: nn.Module | None = None,
    mode: Literal["patch", "perturbation"] = "patch",
    flip_rate: float = 0.95,
    steps: int = 200,
    batch_size: int = 32,
    max_samples: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> Scan:
    """Search, for every class, for the smallest change that turns images of the other classes into it.

    A mask and a pattern (or what is added to every value) follow the gradient of the cross-entropy towards the class
    plus a weight times the size. The weight grows while enough images turn and falls while they do not; the smallest
    change at which enough of the last images had turned is kept. Images that the student gets right are hosts. Half of
    them are searched on, the rates are of the other half.

    Args:
        student: Gives logits for normalised images, alone or as `logits`: of transformers, of timm or a plain module.
            It stays as it is: no dropout acts, no norm statistics move.
        data: Batches of clean images as the student takes them: (images, labels), or mappings with `pixel_values` and
            `labels`; shape (samples, channels, height, width), one size. Without labels the student's own answers are
            taken for right.
        labels: Names of the classes, in their order; numbers if None.
        images: How the student's images are normalised; needed where the model does not say it.
        reference: A clean student of the same classes, scanned the same way: its sizes stand beside, and what each
            change does to it.
        mode: "patch" for a mask with a pattern, "perturbation" for small values added everywhere.
        flip_rate: Share of the searched images that have to turn, in (0, 1].
        steps: For each class.
        batch_size: Images of a step.
        max_samples: Images that are read: the first ones.
        seed: Decides the halves, the start and the order of the images.
        progress: Show a bar on what takes over two seconds.

    Returns:
        One suspect a class, whatever its size: `judged_scan` says what is suspicious. Its settings hold `sizes`,
        `reference_sizes`, which classes were `not_reached` in the steps, and pictures of the smallest changes.

    Raises:
        ValueError: A number is out of range, there are too few images, they have several sizes, their values are not
            normalised as `images` says, some have a label and some none, a label does not exist, or names or the
            reference's classes are not as many as the student's.
        TypeError: The batches hold no images, or labels that are not one whole number an image.
        UnsupportedModelError: A model gives no logits, or nothing says how images are normalised.
        NonFiniteError: A model gives NaN or infinity for clean images.

    Source:
        Neural Cleanse (Wang et al. 2019), section 4.
        Differs: the weight moves at every step, by a running rate, so that few steps suffice; rates are of images that
        were not searched on.
    """
    settings = {"mode": mode, "flip_rate": flip_rate, "steps": steps, "batch_size": batch_size, "seed": seed}
    _check(**settings, max_samples=max_samples)
    images = image_input_of(student) if images is None else images
    pixels, given = _read(data, images, max_samples)
    search = _Search(pixels, given, images, mode, flip_rate, steps, batch_size, seed, progress)
    with frozen(student):
        answers = search.logits(student, pixels)
        if labels is not None and len(labels) != answers.shape[1]:
            raise ValueError(f"labels has {len(labels)} names, but the student tells {answers.shape[1]} classes apart.")
        wrong = given[(given < 0) | (given >= answers.shape[1])] if given is not None else ()
        if len(wrong):
            raise ValueError(
                f"An image has the label {int(wrong[0])}, but the student tells {answers.shape[1]} classes apart."
            )
        hosts = search.hosts(answers)
        changes = search.changes(student, hosts)
        effects = [
            [search.effect(student, change, rows, label) for rows in hosts[label]]
            for label, change in enumerate(changes)
        ]
    beside, reference_sizes = [None] * len(changes), None
    if reference is not None:
        with frozen(reference):
            beside, reference_sizes = search.beside(reference, changes, hosts)
    suspects = [
        Suspect(label, _where(change), searched.margin or 0.0, held_out, beside[label], size=change.size)
        for label, (change, (searched, held_out)) in enumerate(zip(changes, effects, strict=True))
    ]
    drawn = sorted((one for one in suspects if changes[one.label].pattern is not None), key=lambda one: one.size)
    settings |= {
        "max_samples": max_samples,
        "num_images": len(pixels),
        "images": images.to_dict(),
        "accuracy": None if given is None else float((answers.argmax(1) == given).float().mean()),
        "sizes": [change.size for change in changes],
        "not_reached": [label for label, change in enumerate(changes) if change.pattern is None],
        "reference_sizes": reference_sizes,
        "pictures": {one.label: _picture(changes[one.label]) for one in drawn[:_PICTURES]},
    }
    named = map(str, range(len(changes))) if labels is None else labels
    return Scan("patch", tuple(suspects), tuple(named), len(changes), settings=settings)


@dataclass(frozen=True)
class _Search:
    """The images, and how every class is searched on them."""

    pixels: Tensor
    given: Tensor | None
    images: ImageInput
    mode: str
    flip_rate: float
    steps: int
    batch_size: int
    seed: int
    progress: bool

    def _run(self, model: nn.Module, pixels: Tensor) -> Tensor:
        weight = next((one for one in model.parameters() if one.is_floating_point()), pixels)
        output = model(self.images.normalised(pixels.to(weight.device)).to(weight.dtype))
        logits = logits_in(output, model)
        if logits.shape[1] < 2:
            raise UnsupportedModelError(f"{type(model).__name__} gives logits of {logits.shape[1]} class, not of two.")
        return logits.float()

    @torch.no_grad()
    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Give the logits of images, on the CPU."""
        logits = torch.cat([self._run(model, one).cpu() for one in pixels.split(self.batch_size)])
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"{type(model).__name__} gives NaN or infinity for clean images: nothing to scan.")
        return logits

    def hosts(self, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Give, for each class, the images of others that are right: to search on, and held out."""
        answers = logits.argmax(1)
        truth = answers if self.given is None else self.given
        order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(self.seed))
        order = order[(answers == truth)[order]]
        return [(rows[::2], rows[1::2]) for rows in (order[truth[order] != one] for one in range(logits.shape[1]))]

    def changes(self, model: nn.Module, hosts: Sequence[tuple[Tensor, Tensor]]) -> list[Change]:
        """Give the smallest change that was found for each class."""
        bar = tqdm(hosts, desc="scan classes", delay=2, leave=False, disable=not self.progress)
        return [self._smallest(model, label, self.pixels[rows]) for label, (rows, _) in enumerate(bar)]

    def effect(self, model: nn.Module, change: Change, rows: Tensor, label: int) -> Effect:
        """Show a model images with a change."""
        if not len(rows):
            return Effect(0, 0, None)
        logits = self.logits(model, change.on(self.pixels[rows]))
        flipped = int((logits.argmax(1) == label).sum())
        others = logits.clone()
        others[:, label] = -torch.inf
        return Effect(flipped, len(rows), float((logits[:, label] - others.amax(1)).mean()))

    def beside(
        self, reference: nn.Module, changes: Sequence[Change], hosts: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[list[Effect], list[float]]:
        """Show the changes to a clean reference, on held-out hosts that it gets right; scan it too."""
        logits = self.logits(reference, self.pixels)
        if logits.shape[1] != len(changes):
            raise ValueError(
                f"The reference tells {logits.shape[1]} classes apart, and the student {len(changes)}: give a clean "
                "student of the same task."
            )
        own = self.hosts(logits)
        seen = [rows[torch.isin(rows, torch.cat(mine))] for (_, rows), mine in zip(hosts, own, strict=True)]
        effects = [self.effect(reference, one, seen[label], label) for label, one in enumerate(changes)]
        return effects, [one.size for one in self.changes(reference, own)]

    def _smallest(self, model: nn.Module, label: int, pixels: Tensor) -> Change:
        best = Change(1.0)
        generator = torch.Generator().manual_seed(self.seed)
        parameters, change_of, rate = self._start(pixels.shape[1:], generator)
        optimizer = torch.optim.Adam(parameters, rate, betas=(0.5, 0.9))
        weight, turned = 1.0, 0.0
        with torch.enable_grad():
            for rows in self._batches(len(pixels), generator):
                size, change = change_of()
                logits = self._run(model, change.on(pixels[rows]))
                hit = logits.argmax(1) == label
                turned = _MEMORY * turned + (1 - _MEMORY) * float(hit.float().mean())
                if turned >= self.flip_rate and change.size < best.size:
                    best = change.kept()
                loss = functional.cross_entropy(logits, torch.full_like(hit, label, dtype=torch.long))
                for parameter, gradient in zip(
                    parameters, torch.autograd.grad(loss + weight * size.to(loss.device), parameters), strict=True
                ):
                    parameter.grad = gradient
                optimizer.step()
                weight *= _HEAVIER if turned >= self.flip_rate else _LIGHTER
        return best

    def _start(self, shape: torch.Size, generator: torch.Generator) -> tuple[list[Tensor], Any, float]:
        """Give what is searched, what makes a change of it, and the size of the steps."""
        if self.mode == "perturbation":
            added = (0.02 * torch.randn(shape, generator=generator)).requires_grad_()

            def perturbation() -> tuple[Tensor, Change]:
                size = added.square().mean().sqrt()
                return size, Change(float(size.detach()), None, added)

            return [added], perturbation, 0.02
        free = [(0.1 * torch.randn(one, generator=generator)).requires_grad_() for one in (shape[1:], shape)]

        def patch() -> tuple[Tensor, Change]:
            mask, pattern = (one.sigmoid() for one in free)
            return mask.mean(), Change(float(mask.detach().mean()), mask, pattern)

        return free, patch, 0.2

    def _batches(self, number: int, generator: torch.Generator) -> Iterable[Tensor]:
        """Give the rows of each step, all images once before any comes again."""
        rows = torch.empty(0, dtype=torch.long)
        for _ in range(self.steps if number else 0):
            if len(rows) < self.batch_size:
                rows = torch.cat([rows, torch.randperm(number, generator=generator)])
            taken, rows = rows[: self.batch_size], rows[self.batch_size :]
            yield taken


def _where(change: Change) -> str:
    """Say where on the image a change is."""
    if change.pattern is None:
        return "no change that turns enough images was found"
    if change.mask is None:
        return f"every value changed, by {change.size:.3f} (root mean square) of the range from 0 to 1"
    strong = change.mask >= change.mask.max() / 2
    sides = [strong.any(1 - axis).nonzero().flatten() + 1 for axis in (0, 1)]
    rows, columns = (f"{int(one.min())} to {int(one.max())}" for one in sides)
    height, width = change.mask.shape
    return f"{100 * change.size:.1f} % of the image, strongest in rows {rows} of {height}, columns {columns} of {width}"


def _picture(change: Change) -> str:
    """Draw a change as a PNG, in base64: a patch on what is transparent, a perturbation around grey."""
    if change.mask is None:
        values = 0.5 + change.pattern / (2 * change.pattern.abs().max().clamp(min=1e-12))
    else:
        values = torch.cat([change.pattern.expand(3, -1, -1), change.mask[None]])
    levels = (255 * values).round().byte().permute(1, 2, 0)
    picture = Image.fromarray((levels.expand(-1, -1, 3) if levels.shape[2] == 1 else levels).numpy())
    picture.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    picture.save(content, "png")
    return base64.b64encode(content.getvalue()).decode()


def _check(mode: str, flip_rate: float, **numbers: int) -> None:
    if mode not in ("patch", "perturbation"):
        raise ValueError(f"mode is 'patch' or 'perturbation', but got {mode!r}.")
    if not 0 < flip_rate <= 1:
        raise ValueError(f"flip_rate is a share of images, in (0, 1], but got {flip_rate}.")
    for name, number in numbers.items():
        least = {"seed": 0, "max_samples": _FEWEST_IMAGES}.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} is a whole number, at least {least}, but got {number!r}.")


def _read(data: Iterable[Any], images: ImageInput, most: int) -> tuple[Tensor, Tensor | None]:
    """Read images as pixels, on the CPU, and their labels if all have one."""
    taken: list[Tensor] = []
    labels: list[Tensor | None] = []
    for batch in data:
        inputs, given = _parted(batch)
        if taken and inputs.shape[1:] != taken[0].shape[1:]:
            raise ValueError(
                f"One patch is laid on all images, so they have one size, but got {tuple(taken[0].shape[1:])} and "
                f"{tuple(inputs.shape[1:])} (channels, height, width). Resize or crop them alike."
            )
        taken.append(inputs.detach().float().cpu())
        labels.append(given)
        if sum(map(len, taken)) >= most:
            break
    inputs = torch.cat(taken)[:most] if taken else torch.empty(0)
    if len(inputs) < _FEWEST_IMAGES:
        raise ValueError(f"A scan takes {_FEWEST_IMAGES} images or more, half of them held out, but got {len(inputs)}.")
    pixels = images.denormalised(inputs)
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):
        raise ValueError(
            f"With the normalisation undone the images hold values from {low:.3g} to {high:.3g}, and pixels go from 0 "
            f"to 1: they were not normalised by mean {images.mean} and std {images.std}, as images= says."
        )
    given = [one for one in labels if one is not None]
    if given and len(given) < len(labels):
        raise ValueError(f"All images have labels or none has, but of {len(labels)} batches {len(given)} have labels.")
    return pixels.clamp(0, 1), torch.cat(given)[:most] if given else None


def _parted(batch: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401 - any batch
    """Give the images of a batch, and its labels if there are any."""
    inputs, given = inputs_of(batch), labels_in(batch)
    if isinstance(inputs, Mapping):
        inputs = inputs.get("pixel_values")
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
        told = f"{tuple(inputs.shape)} of {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(
            "data gives normalised images, floating-point tensors of shape (samples, channels, height, width), alone, "
            f"as (images, labels) or as pixel_values, but got {told}."
        )
    if given is not None and len(given) != len(inputs):
        raise ValueError(f"A label is one class an image, but a batch of {len(inputs)} images has {len(given)} labels.")
    return inputs, given
