"""Neuron-coverage-guided adversarial images: steps that activate neurons which a strategy picks anew each time.

All images of a batch, all layers and all neurons are picked among at once, on the device. What is random is a function
of the seed, the image, the step and the neuron, computed and not drawn in turn: no image influences another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from remos_hf.activations import capture
from remos_hf.adapters.images import ImageInput
from remos_hf.defects.adversarial_images import AdversarialImages, Search, outputs_of, seeds_of
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_whole
from remos_hf.profiling.criteria import (
    ActivationStatistics,
    Criterion,
    strong_coverage,
    threshold_coverage,
    top_k_coverage,
)

_HOOKED = (nn.Conv2d, nn.BatchNorm2d)
# Share of the neurons, those with the largest mean weights, among which DLFuzz's third rule draws.
_HEAVY_SHARE = 0.1
_EXCLUDED = torch.iinfo(torch.int64).min
# Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64), as signed 64-bit numbers.
_GOLDEN, _MIX_1, _MIX_2 = (one - 2**64 for one in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class CoverageGuided(AdversarialImages):
    """Images that raise, at each step, the mean activation of neurons picked by what the image has covered so far.

    Neurons are the channels that Conv2d and BatchNorm2d give, read when the whole forward pass is through: where a
    model adds or applies ReLU in place, as torchvision's and timm's ResNets do, a BatchNorm's output is by then the
    block's activation; where a model does neither in place, it is what BatchNorm gave. Coverage is each image's own,
    from the clean image and every point that it visits.

    Attributes:
        criterion: When a neuron counts as covered: "nc" (threshold on the scaled mean), "tknc" (among the top of its
            layer) or "snac" (in the upper part of its layer's range).
        selection: "deepxplore": random among those never covered. "dlfuzz": those covered at most steps.
            "dlfuzz_rr": in turn those covered at most steps, those covered at fewest, and random among the tenth with
            the largest mean weights (signed; BatchNorm's weight for its channels).
        neurons: Neurons picked for each image and step; fewer where fewer can be picked.
        threshold: Of "nc", in [0, 1).
        top_k: Of "tknc": neurons covered in each layer.
        strong_k: Of "snac": the upper 1/k of the range is covered.

    Source:
        DeepXplore (Pei et al. 2017), DLFuzz (Guo et al. 2018), after Adapt (Lee et al. 2020); ReMoS artifact,
        DNNtest/eval_nc.py:235-343, strategy/deepxplore.py, strategy/dlfuzz.py. `paper()` has its numbers; "dlfuzz" is
        its `dlfuzzfirst` and "dlfuzz_rr" its `dlfuzz`.
        Differs: each image picks `neurons` of its own; in the artifact's DeepXplore, an image with fewer uncovered
        neurons lowers the number for all images after it in the batch. The cycle of "dlfuzz_rr" begins anew with each
        image; in the artifact it runs on from batch to batch. Among equal counts the first neuron is picked; the
        artifact leaves it to a partial sort. Teacher and coverage are read in one forward pass, not two.
    """

    citation: ClassVar[str] = (
        "@inproceedings{pei2017deepxplore, title={{DeepXplore}: Automated Whitebox Testing of Deep Learning Systems}, "
        "author={Pei, Kexin and Cao, Yinzhi and Yang, Junfeng and Jana, Suman}, booktitle={SOSP}, year={2017}}\n"
        "@inproceedings{guo2018dlfuzz, title={{DLFuzz}: Differential Fuzzing Testing of Deep Learning Systems}, "
        "author={Guo, Jianmin and Jiang, Yu and Zhao, Yue and Chen, Quan and Sun, Jiaguang}, booktitle={ESEC/FSE}, "
        "year={2018}}"
    )

    criterion: Literal["nc", "tknc", "snac"] = "nc"
    selection: Literal["deepxplore", "dlfuzz", "dlfuzz_rr"] = "deepxplore"
    neurons: int = 20
    threshold: float = 0.5
    top_k: int = 10
    strong_k: float = 2.0

    def __post_init__(self) -> None:
        """Refuse values that no teacher could use."""
        super().__post_init__()
        if self.criterion not in ("nc", "tknc", "snac"):
            raise ValueError(f"criterion is 'nc', 'tknc' or 'snac', but got {self.criterion!r}.")
        if self.selection not in ("deepxplore", "dlfuzz", "dlfuzz_rr"):
            raise ValueError(f"selection is 'deepxplore', 'dlfuzz' or 'dlfuzz_rr', but got {self.selection!r}.")
        check_whole(self, "the number picked for each image and step, at least 1", 1, "neurons")
        self.coverage_criterion()

    @classmethod
    def paper(cls, **changes: object) -> "CoverageGuided":
        """Give the published setting: budget 0.1 and steps of 0.01 in normalised units, clipped to valid pixels.

        Args:
            **changes: Fields to set otherwise.
        """
        return cls(**{"eps": 0.1, "step": 0.01, "units": "normalised", **changes})

    def coverage_criterion(self) -> Criterion:
        """Give the rule that decides which neurons are covered."""
        if self.criterion == "nc":
            return threshold_coverage(self.threshold)
        return top_k_coverage(self.top_k) if self.criterion == "tknc" else strong_coverage(self.strong_k)

    def search(self, teacher: nn.Module, images: ImageInput, keys: Sequence[str]) -> "CoverageSearch":
        """Start the search of one batch.

        Raises:
            UnsupportedModelError: The teacher has neither Conv2d nor BatchNorm2d.
        """
        return CoverageSearch(self, teacher, images, keys)

    def described(self, teacher: nn.Module) -> dict[str, Any]:
        """Give the number of layers that are looked at."""
        return {"num_layers": len(hooked_layers(teacher))}


def hooked_layers(teacher: nn.Module) -> dict[str, nn.Module]:
    """Give the layers whose outputs are neurons, by name in registration order.

    Raises:
        UnsupportedModelError: There is none.
    """
    found = {name: module for name, module in teacher.named_modules() if isinstance(module, _HOOKED)}
    if not found:
        raise UnsupportedModelError(
            f"CoverageGuided looks at Conv2d and BatchNorm2d, but {type(teacher).__name__} has neither. FeatureAttack "
            "needs only a head."
        )
    return found


class CoverageSearch(Search):
    """Climbs one batch's objective, and keeps each image's coverage.

    Args:
        attack: How neurons are covered and picked.
        teacher: The teacher.
        images: How it reads images.
        keys: What tells the samples apart.
    """

    def __init__(self, attack: CoverageGuided, teacher: nn.Module, images: ImageInput, keys: Sequence[str]) -> None:
        self.attack, self.teacher, self.images = attack, teacher, images
        self.layers = hooked_layers(teacher)
        self.criterion = attack.coverage_criterion()
        self.seeds = torch.tensor(seeds_of(attack.seed, "neurons", keys), dtype=torch.int64)
        self.step = 0
        self._covered_at: Tensor | None = None  # int64 (samples, neurons): at how many of the visited points
        self._first_share: Tensor | None = None
        self._heavy: Tensor | None = None  # bool (neurons,)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Give the sum of the picked neurons' means, shape (samples,)."""
        with capture(self.layers) as outputs:
            outputs_of(self.teacher, self.images, pixels)
        # Only now: the rest of the pass may have written into these tensors, and that is what counts.
        ran = {name: outputs[name] for name in self.layers if name in outputs}
        means, covered = self._read(ran, len(pixels))
        if self._covered_at is None:
            self._covered_at = torch.zeros_like(covered, dtype=torch.int64)
            self._first_share = covered.float().mean(1)
            self._heavy = _heavy_neurons(self.layers[name] for name in ran).to(covered.device)
        self._covered_at = self._covered_at + covered
        picked, able = self.pick(self._covered_at)
        self.step += 1
        return means.gather(1, picked).masked_fill(~able, 0).sum(1)

    def pick(self, covered_at: Tensor) -> tuple[Tensor, Tensor]:
        """Pick each image's neurons for this step.

        Args:
            covered_at: At how many of the visited points each neuron was covered. int64, shape (samples, neurons).

        Returns:
            The picked neurons, int64, shape (samples, picked); and which of these places hold one, bool.
        """
        total = covered_at.shape[1]
        place = torch.arange(total, device=covered_at.device)
        rule = self.attack.selection
        if rule == "dlfuzz_rr":
            rule = ("dlfuzz", "rare", "heavy")[self.step % 3]
        if rule == "dlfuzz":  # no two are equal, so that no sort decides
            priority = covered_at * total + (total - 1 - place)
        elif rule == "rare":
            priority = -(covered_at * total + place)
        else:
            among = covered_at == 0 if rule == "deepxplore" else self._heavy
            priority = lots(self.seeds.to(covered_at.device), self.step, total).masked_fill(~among, _EXCLUDED)
        best, picked = priority.topk(min(self.attack.neurons, total), dim=1)
        return picked, best > _EXCLUDED

    def _read(self, outputs: dict[str, Tensor], samples: int) -> tuple[Tensor, Tensor]:
        means, covered = [], []
        for name, output in outputs.items():
            if output.dim() != 4 or len(output) != samples:
                raise UnsupportedModelError(
                    f"'{name}' gave an output of shape {tuple(output.shape)} for {samples} images, so their neurons "
                    "cannot be told apart."
                )
            mean = output.float().mean(dim=(2, 3))
            values = output.detach().float()
            statistics = ActivationStatistics(values.amin((1, 2, 3)), values.amax((1, 2, 3)), mean.detach())
            means.append(mean)
            covered.append(self.criterion(statistics))
        return torch.cat(means, dim=1), torch.cat(covered, dim=1)

    def measured(self) -> dict[str, Tensor]:
        """Give the share of neurons that the first point covers, and that any visited point covers."""
        return {"covered_first": self._first_share, "covered_ever": (self._covered_at > 0).float().mean(1)}


def lots(seeds: Tensor, step: int, count: int) -> Tensor:
    """Draw a number for each sample and neuron, from the sample's seed, the step and the neuron's place alone.

    Args:
        seeds: One for each sample, int64, shape (samples,).
        step: The step, counted from 0.
        count: Number of neurons.

    Returns:
        int64 from 0 to 2^63 - 1, shape (samples, count): the same on every device and in every batch.

    Source: SplitMix64 (Steele et al. 2014), one stream for each sample and step, its top 63 bits.
    """
    stream = _mixed(seeds + torch.tensor(step + 1, device=seeds.device) * _GOLDEN)
    places = torch.arange(1, count + 1, device=seeds.device)
    return _shifted(_mixed(stream[:, None] + places * _GOLDEN), 1)


def _mixed(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * _MIX_1
    state = (state ^ _shifted(state, 27)) * _MIX_2
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _heavy_neurons(layers: Iterable[nn.Module]) -> Tensor:
    """Say which neurons are among the tenth with the largest mean weight."""
    weights = []
    for layer in layers:
        # BatchNorm without weights multiplies by 1.
        weight = torch.ones(layer.num_features) if layer.weight is None else layer.weight.detach().float().cpu()
        weights.append(weight.flatten(1).mean(1) if weight.dim() > 1 else weight)
    weight = torch.cat(weights)
    chosen = weight.sort(descending=True, stable=True).indices[: max(1, int(len(weight) * _HEAVY_SHARE))]
    return torch.zeros_like(weight, dtype=torch.bool).index_fill_(0, chosen, True)
