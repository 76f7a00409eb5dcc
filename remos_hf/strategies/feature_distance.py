"""How far a student's features are from its teacher's: one distance, of which the published ones are instances."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number

Axis = Literal["samples", "channels", "positions"]


@dataclass(frozen=True)
class FeatureDistance:
    """What of the differences of two features is taken, and over what it is averaged. Padding never counts.

    A published weight means something only with its distance. Of squares and of absolute values, a weight w of a
    distance A pulls at a layer as w * B.divisor(...) / A.divisor(...) of a distance B does, `divisor` being that of the
    layer's shape: DELTA's .01 on 64 maps of (512, 7, 7) is .005 * 64 * 512 = 164 of Renofeation's mean, whose
    own weight is 5. A sum over samples is over those of one forward pass: cutting a step's samples into more batches,
    or more processes, makes it weaker by as much. A norm, a pooled feature and a share of the variance have no such
    conversion.

    Attributes:
        norm: "squares" or "absolute" values, added up; "l2" is the root of the squares of a sample, averaged within it.
        mean_over: The axes that are averaged, not added up.
        factor: Before it all.
        pooled: Differences are averaged over positions before anything else, as a pooled feature's.
        over_variance: It is divided by the same distance of the teacher's features from their mean in the batch; a
            layer whose features do not vary in the batch counts 0. Of squares alone.
        layers: "sum" or "mean" over the layers.

    Raises:
        ValueError: A word is none of those, the factor is not above 0, or another norm than squares is to be over the
            variance.
    """

    norm: Literal["squares", "absolute", "l2"] = "squares"
    mean_over: tuple[Axis, ...] = ("samples", "channels", "positions")
    factor: float = 1.0
    pooled: bool = False
    over_variance: bool = False
    layers: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        """Refuse what is no distance."""
        object.__setattr__(self, "mean_over", tuple(self.mean_over))
        for name, known, given in (
            ("norm", ("squares", "absolute", "l2"), (self.norm,)),
            ("mean_over", get_args(Axis), self.mean_over),
            ("layers", ("sum", "mean"), (self.layers,)),
        ):
            unknown = [one for one in given if one not in known]
            if unknown:
                raise ValueError(f"{name} is of {', '.join(known)}, but got {unknown[0]!r}.")
        check_number(self, "above 0", lambda one: 0 < one < float("inf"), "factor")
        if self.over_variance and self.norm != "squares":
            raise ValueError(f"over_variance is for norm='squares', but got norm={self.norm!r}.")

    def __call__(
        self,
        made: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
        masks: list[Tensor],
        channels: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Give the distance, a scalar, in float32.

        Args:
            made: The student's features by layer: (samples, channels, height, width), as which all of four axes are
                taken; of fewer axes, channels last.
            wanted: The teacher's, of the same shapes.
            masks: Of sequences, bool, (samples, positions): real positions. One that fits a feature's first two axes is
                laid on it.
            channels: Weights of the channels by layer, (channels,); None weighs all by 1.

        Raises:
            UnsupportedModelError: Two features have different shapes.
        """
        parts = []
        for name, theirs in wanted.items():
            mine = made[name]
            if mine.shape != theirs.shape:
                raise UnsupportedModelError(
                    f"The features of '{name}' are {tuple(mine.shape)} in the student and {tuple(theirs.shape)} in the "
                    "teacher. Compare layers that have one shape in both: layers=(...). Where only the width differs, "
                    "Renofeation(projector=True), or a hold of your own, HeldFeatures(..., projector=Projector(...)), "
                    "trains a map between them."
                )
            theirs, real = theirs.float(), _real(theirs, masks)
            weights = None if channels is None else channels[name]
            part = self._of_layer(mine.float() - theirs, real, weights)
            if self.over_variance:
                variance = self._of_layer(_mean_of(theirs, real) - theirs, real, weights)
                part = torch.where(variance > 0, part / variance.clamp(min=torch.finfo(torch.float32).tiny), 0)
            parts.append(part)
        whole = torch.stack(parts)
        whole = whole.mean() if self.layers == "mean" else whole.sum()
        return whole if self.factor == 1 else self.factor * whole

    def divisor(self, samples: int, channels: int, positions: int) -> float:
        """Give what the sum over all elements of a layer of that shape is divided by, the factor included.

        With layers="mean" its part is divided once more, by the number of layers.

        Args:
            samples: Of a batch.
            channels: Of the layer.
            positions: Of the layer's maps or sequences, without padding.

        Raises:
            ValueError: The distance is no such sum: norm="l2", pooled or over the variance.
        """
        for name, other in (
            ("norm", self.norm == "l2"),
            ("pooled", self.pooled),
            ("over_variance", self.over_variance),
        ):
            if other:
                raise ValueError(
                    f"A distance with {name}={getattr(self, name)!r} is no sum over elements that is divided by a "
                    "number, so its weight cannot be converted by one. Compare two distances on a batch."
                )
        sizes = {"samples": samples, "channels": channels, "positions": positions}
        divided = 1
        for axis in self.mean_over:
            divided *= sizes[axis]
        return divided / self.factor

    def _of_layer(self, away: Tensor, real: Tensor | None, weights: Tensor | None) -> Tensor:
        if real is not None:  # taken out, not multiplied: a padded position may hold anything
            away = away.masked_fill(~real, 0)
        places = _positions(away, real)
        if self.pooled and away.dim() > 2:
            away = away.movedim(channel_axis(away), 1).flatten(2).sum(2) / places[:, None]
            places, real = torch.ones_like(places), None
        each = away.abs() if self.norm == "absolute" else away.square()
        if weights is not None:
            each = each * (weights[:, None, None] if each.dim() == 4 else weights)
        if self.norm != "l2" and set(self.mean_over) == {"samples", "channels", "positions"}:
            return each.mean() if real is None else each.sum() / (real.sum() * each.shape[-1]).clamp(min=1)
        per_sample = each.flatten(1).sum(1)
        if "channels" in self.mean_over:
            per_sample = per_sample / each.shape[channel_axis(each)]
        if self.norm == "l2":
            if "positions" in self.mean_over:
                per_sample = per_sample / places
            # The root has no gradient at 0, where the features are the teacher's.
            per_sample = per_sample.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
            return per_sample.mean() if "samples" in self.mean_over else per_sample.sum()
        if "positions" not in self.mean_over:
            return per_sample.mean() if "samples" in self.mean_over else per_sample.sum()
        if "samples" in self.mean_over:
            return per_sample.sum() / places.sum()
        return (per_sample / places).sum()


# The mean over all elements, added up over the layers: Renofeation's train.py, and the ReMoS artifact's "DELTA".
MEAN_SQUARES = FeatureDistance()
# DELTA's train.py with attention (att_fea_map), whose channel weights have the mean 1, and without (fea_map).
DELTA_ATTENTION = FeatureDistance(mean_over=("positions",), factor=0.5)
DELTA_PLAIN = FeatureDistance(mean_over=(), factor=0.5)
# CARTL's FDM: |f(x) - f(x')|_2 / sqrt(elements), added up over the batch.
CARTL_NORMS = FeatureDistance(norm="l2", mean_over=("channels", "positions"))
# CARTL's baseline: absolute values added up over the channels of a pooled feature, the mean over the batch.
POOLED_ABSOLUTE = FeatureDistance(norm="absolute", mean_over=("samples",), pooled=True)
# The share of the teacher's variance that the student's features miss: 0 where they are the teacher's, 1 where they
# tell as little as the teacher's mean.
UNEXPLAINED = FeatureDistance(over_variance=True, layers="mean")


def channel_axis(feature: Tensor) -> int:
    """Give the axis of channels: the second of four axes, the last of fewer.

    Four axes are taken as (samples, channels, height, width), as which `HeldFeatures` brings maps with channels last;
    nothing in a tensor tells them.
    """
    return 1 if feature.dim() == 4 else feature.dim() - 1


def _real(feature: Tensor, masks: list[Tensor]) -> Tensor | None:
    """Give the mask that fits a feature, (samples, positions, 1); None if none does."""
    fits = (mask for mask in masks if feature.dim() == 3 and mask.shape == feature.shape[:2])
    return next((mask[..., None] for mask in fits), None)


def _positions(feature: Tensor, real: Tensor | None) -> Tensor:
    """Count the real positions of each sample, at least 1: float, (samples,)."""
    if real is not None:
        return real.sum((1, 2)).clamp(min=1).float()
    return feature.new_full((len(feature),), feature[:1].numel() / max(feature.shape[channel_axis(feature)], 1))


def _mean_of(feature: Tensor, real: Tensor | None) -> Tensor:
    axes = [axis for axis in range(feature.dim()) if axis != channel_axis(feature)]
    if real is None:
        return feature.mean(axes, keepdim=True)
    return feature.masked_fill(~real, 0).sum(axes) / real.sum().clamp(min=1)
