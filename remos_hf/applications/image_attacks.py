"""The attacks that detection of adversarial images was published with, as far as maintained packages have them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.adapters.images import ImageInput, check_pixels
from remos_hf.defects.adversarial_images import logits_of
from remos_hf.evaluation.toolbox import estimator_of, toolbox
from remos_hf.perturbation import ascend, frozen, random_start
from remos_hf.randomness import own_randomness

# Published, but in no package that is maintained and can be installed (ART 1.20 has none of them for single images).
ABSENT: Mapping[str, str] = {
    "deepfool_linf": "ART's DeepFool moves along the l2 norm alone",
    "adef": "no maintained package",
    "local_search": "no maintained package; `square` is the score-based attack here",
    "pointwise": "no maintained package",
}
_BATCH = 50
_NOISE = 20  # images of noise that the walk along the boundary may start from


@dataclass(frozen=True)
class _Attacked:
    """What an attack works on: a frozen model, how it reads images, and pixels on its device."""

    model: nn.Module
    images: ImageInput
    seed: int

    def predicted(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return logits_of(self.model, self.images, pixels).argmax(1)

    def climbed(self, pixels: Tensor, eps: float, steps: int) -> Tensor:
        """Climb the loss of the model's own label: one whole step, or many from a random start."""
        labels = self.predicted(pixels)
        start = None
        if steps > 1:
            start = random_start(pixels, eps=eps, generators=torch.Generator().manual_seed(self.seed))
        return ascend(
            lambda point: functional.cross_entropy(logits_of(self.model, self.images, point), labels, reduction="none"),
            pixels,
            eps=eps,
            step=eps if steps == 1 else eps / 4,
            steps=steps,
            low=0,
            high=1,
            start=start,
        )

    def of_toolbox(
        self,
        pixels: Tensor,
        name: str,
        *,
        one_by_one: bool = False,
        given: Mapping[str, np.ndarray] | None = None,
        **options: object,
    ) -> Tensor:
        clean = pixels.cpu().numpy().astype(np.float32)
        estimator = estimator_of(self.model, self.images, clean)
        attack = partial(getattr(toolbox().attacks.evasion, name), estimator, verbose=False, **options)
        if one_by_one:  # one change that fools the model on most of what it is given first, and then is kept
            made = np.concatenate([attack().generate(one[None]) for one in clean])
        else:
            made = attack().generate(clean, **(given or {}))
        return torch.from_numpy(np.clip(made, 0, 1).astype(np.float32)).to(pixels)

    def from_others(self, pixels: Tensor, **options: object) -> Tensor:
        """Walk along the boundary from another image, or noise, of another label: ART's own start knows no seed."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.rand(_NOISE, *pixels.shape[1:], generator=generator).to(pixels)
        starts = torch.cat([pixels, noise])
        there, own = self.predicted(starts), self.predicted(pixels)
        gaps = torch.cdist(pixels.flatten(1), starts.flatten(1))
        nearest = gaps.masked_fill(there == own[:, None], torch.inf).min(1)
        able, made = nearest.values.isfinite().nonzero()[:, 0], pixels.clone()
        if len(able):
            given = {"x_adv_init": starts[nearest.indices[able]].cpu().numpy().astype(np.float32)}
            made[able] = self.of_toolbox(pixels[able], "BoundaryAttack", given=given, **options)
        return made

    def blurred(self, pixels: Tensor) -> Tensor:
        """Blur each image as little as it takes, up to an eighth of its height."""
        made, left = pixels.clone(), torch.arange(len(pixels))
        labels = self.predicted(pixels)
        for sigma in np.linspace(0, pixels.shape[2] / 8, 33)[1:]:
            tried = gaussian_filter(pixels[left].cpu().numpy(), (0, 0, sigma, sigma))
            made[left] = torch.from_numpy(tried).to(pixels).clamp(0, 1)
            left = left[(self.predicted(made[left]) == labels[left]).cpu()]
            if not len(left):
                break
        return made


_Run = Callable[[_Attacked, Tensor], Tensor]


def _fgsm(levels: int) -> _Run:
    return lambda it, pixels: it.climbed(pixels, levels / 255, 1)


def _pgd(levels: int) -> _Run:
    return lambda it, pixels: it.climbed(pixels, levels / 255, 10)


def _art(name: str, **options: object) -> _Run:
    return lambda it, pixels: it.of_toolbox(pixels, name, **options)


_SHIFTS = {"max_translation": 10.0, "num_translations": 3, "max_rotation": 30.0, "num_rotations": 7}
_CARLINI = {"max_iter": 15, "binary_search_steps": 2, "initial_const": 1.0, "max_halving": 2, "max_doubling": 2}
_WALK = {"targeted": False, "max_iter": 30, "num_trial": 3, "sample_size": 10, "batch_size": _BATCH}
_ATTACKS: Mapping[str, _Run] = {
    **{f"fgsm_{levels}": _fgsm(levels) for levels in (2, 4, 8)},
    **{f"pgd_{levels}": _pgd(levels) for levels in (2, 4, 8)},
    "deepfool_l2": _art("DeepFool", max_iter=10, nb_grads=5, batch_size=_BATCH),
    "jsma": _art("SaliencyMapMethod", theta=1.0, gamma=0.05, batch_size=_BATCH),
    "cw_l2": _art("CarliniL2Method", batch_size=_BATCH, **_CARLINI),
    "single_pixel": _art("PixelAttack", th=1, es=1, max_iter=2),
    "square": _art("SquareAttack", eps=8 / 255, max_iter=100, batch_size=_BATCH),
    "boundary": lambda it, pixels: it.from_others(pixels, **_WALK),
    "spatial": _art("SpatialTransformation", one_by_one=True, **_SHIFTS),
    "blur": lambda it, pixels: it.blurred(pixels),
}
ATTACKS: tuple[str, ...] = tuple(_ATTACKS)


def attack_images(model: nn.Module, images: ImageInput, pixels: Tensor, name: str, *, seed: int = 0) -> Tensor:
    """Attack images on a model, which is seen from inside where the attack needs that.

    Args:
        model: A classifier of images; its modes are put back.
        images: How it reads images.
        pixels: Values from 0 to 1, shape (samples, channels, height, width), on the model's device.
        name: One of `ATTACKS`: fgsm_2, _4, _8 and pgd_2, _4, _8 (levels of 255; 10 steps), deepfool_l2, jsma, cw_l2,
            single_pixel, square, boundary, spatial or blur. `ABSENT` holds those that were published and are not here.
        seed: Of random starts and directions.

    Returns:
        As many images, in the same order. Where an attack failed the model's label is what it was: these are no
        adversarial inputs.

    Raises:
        ImportError: The extra `robustness` is not installed; the fgsm, pgd and blur attacks do without.
        ValueError: There is no such attack, or the pixels are none.

    Source:
        The attacks of NNSlicer, ESEC/FSE 2020, section 6.1, by the Adversarial Robustness Toolbox; FGSM, PGD and blur
        are ours.
        Differs: iterations are fewer than published, told in this module, so that hundreds of images take minutes. The
        toolbox's spatial attack turns images and shifts them along one axis: where channels come first it takes their
        number for the size of the other.
    """
    if name not in _ATTACKS:
        why = f": {ABSENT[name]}" if name in ABSENT else ""
        raise ValueError(f"There is no attack {name!r} here{why}. There are {', '.join(ATTACKS)}.")
    check_pixels(pixels)
    with frozen(model), own_randomness(seed):
        return _ATTACKS[name](_Attacked(model, images, seed), pixels).detach()


def shuffled_changes(clean: Tensor, attacked: Tensor, *, seed: int = 0) -> Tensor:
    """Give noise of exactly the size of an attack: the change of every image, its places in another order.

    A detector that flags these sees that something was added, not that it was adversarial.

    Args:
        clean: Pixels from 0 to 1, shape (samples, channels, height, width).
        attacked: The same images, attacked.
        seed: Of the orders.

    Returns:
        Pixels from 0 to 1: clipped, so that a change may become smaller.

    Raises:
        ValueError: Shapes are not alike.
    """
    if clean.shape != attacked.shape:
        raise ValueError(f"Give the same images, clean and attacked, but got {clean.shape} and {attacked.shape}.")
    changes = (attacked - clean).flatten(2)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(changes.shape[2], generator=generator) for _ in range(len(changes))]
    moved = [one[:, order.to(one.device)] for one, order in zip(changes, orders, strict=True)]
    return (clean + torch.stack(moved).view_as(clean)).clamp(0, 1) if moved else clean.clone()
