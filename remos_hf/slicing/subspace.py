"""What a layer keeps when it keeps directions of its inputs: covariances, their eigenvectors, the fit inside them.

Everything is float64 on the device of what was added. A layer of groups is fitted group by group, all at once.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Rows that are gathered before they are multiplied: products of few rows waste a processor.
_ROWS = 4096
# Columns of a covariance made at once. What lies above its diagonal is mirrored, which saves up to half.
_COLUMNS = 512
# A channel that varies by less than a millionth of its size is constant: its variance is rounding of float32.
_CONSTANT = 1e-12
# What a mean has beside the kept directions is rounding below this share of it.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Fit:
    """What the weights of some layers that read one input become.

    Attributes:
        rows: New weights. Float64, shape (groups, outputs of a group, columns).
        mean_in: Mean input. Shape (groups, columns).
        mean_out: Mean of the outputs that were fitted. Shape (groups, outputs of a group).
        rank: Directions kept beside the mean, over all groups; of a ridge the effective number.
        of: Directions that there are.
        empty: Those among them along which the inputs hold nothing beyond rounding.
        energy: Share of what varies in the inputs that the kept directions hold, in [0, 1]; None of a ridge.
        rows_seen: Input vectors that were added up.
    """

    rows: Tensor
    mean_in: Tensor
    mean_out: Tensor
    rank: float
    of: int
    empty: int
    energy: float | None
    rows_seen: int

    @property
    def offset(self) -> Tensor:
        """Give the bias that makes the mean output right. Shape (groups, outputs of a group)."""
        return self.mean_out - (self.rows @ self.mean_in[..., None])[..., 0]


class InputSums:
    """Adds up x x^T and t x^T of the inputs x of a layer and the outputs t that it should have.

    The inputs themselves are kept while they are fewer than their width: then their own products say the same as the
    covariance, and are smaller.
    """

    def __init__(self) -> None:
        self.count = 0
        self._held: list[tuple[Tensor, Tensor]] = []
        self._held_rows = 0
        self._moment: Tensor | None = None  # its lower triangle, blocks on the diagonal whole
        self._cross: Tensor | None = None
        self._sum_in: Tensor | None = None
        self._sum_out: Tensor | None = None

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add some rows.

        Args:
            inputs: Shape (groups, rows, columns), any floating dtype.
            outputs: Shape (groups, rows, outputs of a group), which may be 0.
        """
        self._held.append((inputs.double(), outputs.double()))
        self._held_rows += inputs.shape[1]
        self.count += inputs.shape[1]
        if self._held_rows > max(_ROWS, inputs.shape[2]):
            self._fold()

    def _fold(self) -> None:
        # Rows that came at once are not copied: of images they are many.
        inputs, outputs = (one[0] if len(one) == 1 else torch.cat(one, 1) for one in zip(*self._held, strict=True))
        self._held, self._held_rows = [], 0
        added = _lower_product(inputs), outputs.mT @ inputs, inputs.sum(1), outputs.sum(1)
        if self._moment is None:
            self._moment, self._cross, self._sum_in, self._sum_out = added
            return
        for mine, more in zip((self._moment, self._cross, self._sum_in, self._sum_out), added, strict=True):
            mine += more

    @property
    def is_finite(self) -> bool:
        """Whether neither inputs nor outputs held NaN or infinity."""
        sums = [self._sum_in, self._sum_out] if self._moment is not None else []
        return all(bool(one.sum().isfinite()) for pair in (*self._held, sums) for one in pair)

    def directions(self, *, biased: bool, ridge: bool = False) -> "Directions":
        """Find the directions of the inputs.

        Args:
            biased: Whether the outputs have a bias, which takes what the means leave. Where there is none, the mean
                input is a direction that is kept beside the others.
            ridge: Whether the whole covariance is needed, however few the rows are.
        """
        columns = (self._held[0][0] if self._held else self._sum_in[..., None].mT).shape[-1]
        if self._moment is None and self.count <= columns and not ridge:
            return _of_rows(*(torch.cat(parts, 1) for parts in zip(*self._held, strict=True)), biased)
        if self._held:
            self._fold()
        mean_in, mean_out = self._sum_in / self.count, self._sum_out / self.count
        moment, cross = _mirrored(self._moment) / self.count, self._cross / self.count
        sizes = moment.diagonal(dim1=-2, dim2=-1).clone()
        moment -= mean_in[..., :, None] * mean_in[..., None, :]
        cross -= mean_out[..., :, None] * mean_in[..., None, :]
        return Directions(moment, None, cross, mean_in, mean_out, sizes, self.count, biased)


@dataclass
class Directions:
    """The directions of a layer's inputs on some data, and what its outputs have to do with them.

    Attributes:
        covariance: Of the inputs. Shape (groups, columns, columns); None of few rows.
        rows: The rows themselves less their mean, over the root of their number. Shape (groups, rows, columns); None
            of many.
        cross: Covariance of outputs and inputs. Shape (groups, outputs of a group, columns).
        mean_in: Shape (groups, columns).
        mean_out: Shape (groups, outputs of a group).
        sizes: Mean squares of the columns, around zero. Shape (groups, columns).
        count: Rows that were added up.
        biased: Whether a bias takes what the means leave.
    """

    covariance: Tensor | None
    rows: Tensor | None
    cross: Tensor
    mean_in: Tensor
    mean_out: Tensor
    sizes: Tensor
    count: int
    biased: bool

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, falling, (groups, n), rounding among them 0; vectors, (groups, columns, n)."""
        few = self.rows is not None
        values, vectors = torch.linalg.eigh(self.rows @ self.rows.mT if few else self.covariance)
        values, vectors = values.flip(-1), vectors.flip(-1)
        self.covariance = None  # the largest thing here, and no longer needed
        width = max(self.sizes.shape[-1], self.count if few else 0)
        floor = width * torch.finfo(values.dtype).eps * self.sizes.sum(-1, keepdim=True)
        values = values.masked_fill(values <= floor, 0)
        if few:
            vectors = self.rows.mT @ vectors * torch.where(values > 0, values.rsqrt(), 0)[..., None, :]
        return values, vectors

    @property
    def shares(self) -> Tensor:
        """Each eigenvalue over the sum of all groups'. They fall within a group. Shape (groups, n)."""
        values = self._decomposed[0]
        total = values.sum()
        return values / total if total > 0 else values

    def fit(self, *, energy: float = 1.0, smallest_share: float | None = None) -> Fit:
        """Fit the outputs inside the strongest directions by least squares; nothing is left along all others.

        Directions are those in which the inputs vary. The mean input holds most of the squares of a layer behind a
        ReLU, so that a share of these would say little of what is kept; it is never cut.

        Args:
            energy: Keep the fewest directions that hold this share of the variance, in (0, 1], of each group by itself.
            smallest_share: Instead, keep the directions that hold at least this share of the whole variance, and one
                of each group.
        """
        values, vectors = self._decomposed
        if smallest_share is not None:
            kept = self.shares >= smallest_share
            kept[..., 0] = True
            kept &= values > 0
        else:
            kept = strongest(values, energy)
        inverse = torch.where(kept, 1 / values, 0)
        most = int(kept.sum(-1).max())
        some = vectors[..., :most] * inverse[..., None, :most].sqrt()
        rows = (self.cross @ some) @ some.mT
        if not self.biased:
            rows = rows + self._of_mean(rows, kept, inverse)
        total = float(values.sum())
        return self._fit(
            rows,
            rank=int(kept.sum()),
            empty=self.sizes.numel() - int((values > 0).sum()),
            energy=float((values * kept).sum()) / total if total else 1.0,
        )

    def _of_mean(self, rows: Tensor, kept: Tensor, inverse: Tensor) -> Tensor:
        """Give what the fit gains by the direction of the mean input.

        Least squares over the kept directions V and the unit vector u of what the mean m has beside them add
        d (V L^-1 V^T m)^T + a u^T to the fit inside V, with the eigenvalues L and what is then missed of the mean
        output, d. Nothing is divided by how much inputs vary along u, which may be nothing.

        Args:
            rows: The fit inside the kept directions. Shape (groups, outputs of a group, columns).
            kept: Which directions. Shape (groups, n).
            inverse: Over their eigenvalues; 0 of others. Shape (groups, n).
        """
        values, vectors = self._decomposed
        mean = self.mean_in[..., None]
        inside = vectors.mT @ mean * kept[..., None]
        beside = mean - vectors @ inside
        beside = beside - vectors @ (vectors.mT @ beside * kept[..., None])  # once is not orthogonal to rounding
        size = torch.linalg.vector_norm(beside, dim=1, keepdim=True)
        there = size > _ROUNDING * torch.linalg.vector_norm(mean, dim=1, keepdim=True)
        unit, size = torch.where(there, beside / size, 0), torch.where(there, size, 0)
        varies = torch.where(there, ((vectors.mT @ unit) ** 2 * values[..., None]).sum(1, keepdim=True), 1)
        share = 1 + (inside**2 * inverse[..., None]).sum(1, keepdim=True)
        along, missed = self.cross @ unit, self.mean_out[..., None] - rows @ mean
        scale = varies * share + size**2
        left = (varies * missed - size * along) / scale
        return left @ (vectors @ (inside * inverse[..., None])).mT + (share * along + size * missed) / scale @ unit.mT

    def ridge_fit(self, ridge: float, *, by_channel: bool) -> Fit:
        """Fit the outputs by ridge regression: t x^T (x x^T + ridge P)^-1.

        Args:
            ridge: Above 0.
            by_channel: Whether P holds the variance of each channel on its diagonal, so that a channel of large values
                costs no less; otherwise their median everywhere. Without a bias it is mean squares.
        """
        moment, cross = self.covariance, self.cross
        if not self.biased:
            moment = moment + self.mean_in[..., :, None] * self.mean_in[..., None, :]
            cross = cross + self.mean_out[..., :, None] * self.mean_in[..., None, :]
        variances = moment.diagonal(dim1=-2, dim2=-1).clone()  # a view would hold the matrix that is let go below
        living = variances > (_CONSTANT if self.biased else 0) * self.sizes
        penalty = torch.where(living, variances, torch.nan)
        if not by_channel:
            penalty = penalty.nanmedian(-1, keepdim=True).values.expand_as(variances)
        moment = moment.masked_fill(~(living[..., :, None] & living[..., None, :]), 0)
        loaded = moment + torch.diag_embed(torch.where(living, ridge * penalty, 1.0))
        rows = torch.linalg.solve(loaded, cross.masked_fill(~living[..., None, :], 0).mT).mT
        effective = float(torch.linalg.solve(loaded, moment).diagonal(dim1=-2, dim2=-1).sum())
        return self._fit(rows, rank=round(effective, 1), empty=int((~living).sum()), energy=None)

    def _fit(self, rows: Tensor, *, rank: float, empty: int, energy: float | None) -> Fit:
        rows = rows.masked_fill((self.sizes == 0)[..., None, :], 0)  # exactly, where rounding would leave a trace
        return Fit(rows, self.mean_in, self.mean_out, rank, self.sizes.numel(), empty, energy, self.count)


def _of_rows(inputs: Tensor, outputs: Tensor, biased: bool) -> Directions:
    count = inputs.shape[1]
    mean_in, mean_out, sizes = inputs.mean(1), outputs.mean(1), inputs.square().mean(1)
    rows = (inputs - mean_in[:, None]) / count**0.5
    cross = (outputs - mean_out[:, None]).mT @ rows / count**0.5
    return Directions(None, rows, cross, mean_in, mean_out, sizes, count, biased)


def strongest(values: Tensor, energy: float) -> Tensor:
    """Mark the fewest values that hold a share of their sum.

    Args:
        values: At least 0, falling. Shape (groups, n).
        energy: In (0, 1]. At 1 every value above 0 is kept.

    Returns:
        Bool, shape (groups, n).
    """
    if energy == 1:
        return values > 0
    sums = values.cumsum(-1)
    return (sums - values < energy * sums[..., -1:]) & (values > 0)


def share_that_keeps(shares: list[Tensor], energy: float) -> float:
    """Find the one threshold under which all inputs together keep an energy.

    Args:
        shares: Of every distinct input, its eigenvalues over their sum; each counts alike, whatever its size.
        energy: Mean of what the inputs keep, in (0, 1].

    Returns:
        The largest share s such that the directions of a share of at least s hold `energy` on average.
    """
    every = torch.cat([one.flatten().cpu() for one in shares]).sort(descending=True).values
    kept = strongest(every[None], energy)[0]
    return float(every[kept][-1]) if bool(kept.any()) else 0.0


def _lower_product(rows: Tensor) -> Tensor:
    """Give rows^T rows. What lies above blocks on the diagonal may be zero."""
    columns = rows.shape[-1]
    if columns <= _COLUMNS:
        return rows.mT @ rows
    made = rows.new_zeros(len(rows), columns, columns)
    for start in range(0, columns, _COLUMNS):
        made[:, start:, start : start + _COLUMNS] = rows[..., start:].mT @ rows[..., start : start + _COLUMNS]
    return made


def _mirrored(moment: Tensor) -> Tensor:
    """Fill what `_lower_product` left out, in place."""
    for start in range(_COLUMNS, moment.shape[-1], _COLUMNS):
        moment[:, :start, start : start + _COLUMNS] = moment[:, start : start + _COLUMNS, :start].mT
    return moment
