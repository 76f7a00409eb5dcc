"""DiSec: rows of the last blocks that stand out in what the task's gradient asks beside the weights."""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.fields import check_number
from remos_hf.layers import is_below
from remos_hf.slicing.competition import competing_layers
from remos_hf.strategies.base import Preparation, Strategy, check_names
from remos_hf.strategies.distillation import feature_modules
from remos_hf.strategies.short_runs import Samples, check_counts, mean_gradient, part_of, with_trained_head
from remos_hf.strategies.student_data import StudentData

# Of fewer rows none can stand out.
_FEWEST_ROWS = 3


@dataclass(frozen=True)
class DiSec(Strategy):
    """Give rows of the last blocks the mean of the others, where the gradient says that they stand out.

    Of each matrix W the gradient g of the student's own loss is taken over its clean data; what of g does not lie
    along W is the residual. Rows that are long in one of the residual's first principal components, next to the other
    rows, are given up.

    Uses poisoned data or an attack's success: no.

    Attributes:
        last_blocks: Blocks (or stages) from the last one backwards whose matrices are looked at, at least 1.
        components: Principal components of the residual, at least 1.
        deviations: A row stands out if its score is so many standard deviations above the mean score.
        head_steps: Steps of 32 samples that the head is trained before the gradient is taken; 0 takes it as it is.
        head: Modules that are new; None finds them.
        seed: Seed of the samples that the head is trained on; the run's if None.

    Source:
        Das and Li, Findings of ACL 2026; defense-algorithm/defense-bert.py of their repository, of which neither the
        script nor the README gives last_blocks and components.
        Differs: their spectral half alone, without the autoencoder whose outliers it is joined with. The head is
        trained first and then dropped: the student keeps its fresh one. The mean is that of the rows that stay.
    """

    citation: ClassVar[str] = (
        "@inproceedings{das2026disec, title={{DiSec}: Mitigating Backdoors in Pre-trained Language Models via "
        "Disentanglement of Adversarial Weights for Secure Fine-Tuning}, author={Das, Sunanda and Li, Qinghua}, "
        "booktitle={Findings of ACL}, year={2026}}"
    )

    last_blocks: int = 4
    components: int = 8
    deviations: float = 2.0
    head_steps: int = 100
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_counts(self, last_blocks=1, components=1, head_steps=0)
        told = "a number of standard deviations, above 0"
        check_number(self, told, lambda one: 0 < one < float("inf"), "deviations")
        check_names(self, "head")

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Take the gradient on a copy, average the rows that stand out in place."""
        start = time.perf_counter()
        blocks = list(feature_modules(adapter_for(student, self.head)))[-self.last_blocks :]
        layers = {
            name: layer
            for name, layer in competing_layers(student, head=self.head)[0].items()
            if is_below(name, blocks)
        }
        samples = Samples(data, next(student.parameters()).device, data.seed if self.seed is None else self.seed)
        asked, head_steps = with_trained_head(student, samples, steps=self.head_steps, head=self.head)
        wanted = {layer.parameter_name: asked.get_parameter(layer.parameter_name) for layer in layers.values()}
        gradients, count = mean_gradient(asked, samples, wanted)
        given_up: dict[str, int] = {}
        for layer in layers.values():
            rows = layer.by_output(layer.weight.float())
            gradient = layer.by_output(part_of(layer, gradients[layer.parameter_name]))
            out = torch.stack(
                [
                    outlier_rows(residual(one, row), components=self.components, deviations=self.deviations)
                    for one, row in zip(gradient, rows, strict=True)
                ]
            )
            given_up[layer.key] = int(out.sum())
            layer.weight.copy_(layer.from_output(averaged(rows, out)).to(layer.weight))
        details = {
            "blocks": blocks,
            "rows": sum(given_up.values()),
            "of": sum(layer.out_neurons for layer in layers.values()),
            "by_parameter": given_up,
            "samples": count,
            "head_steps": head_steps,
        }
        return Preparation(seconds={"rows": time.perf_counter() - start}, details={"disec": details})


def residual(gradient: Tensor, rows: Tensor) -> Tensor:
    """Give what of a gradient does not lie along the weights themselves. All of one shape."""
    along = (gradient * rows).sum(dtype=torch.float64) / rows.double().square().sum().clamp(min=1e-30)
    return gradient - along.to(gradient) * rows


def outlier_rows(residual: Tensor, *, components: int, deviations: float) -> Tensor:
    """Find the rows that stand out in the first principal components of a matrix.

    A row's score is the largest, over components, of its |U_i S_i| in standard deviations from the rows' mean.

    Args:
        residual: Shape (rows, columns).
        components: At most so many; the first ones.
        deviations: How far above the mean score an outlier lies, in standard deviations of the scores.

    Returns:
        Bool, shape (rows,). Of fewer than three rows none.
    """
    if len(residual) < _FEWEST_ROWS:
        return torch.zeros(len(residual), dtype=torch.bool, device=residual.device)
    exact = residual.double()
    # U S = R V, and V are the eigenvectors of R^T R: columns are fewer than rows where it matters.
    vectors = torch.linalg.eigh(exact.T @ exact).eigenvectors.flip(1)[:, :components]
    lengths = (exact @ vectors).abs()
    scores = ((lengths - lengths.mean(0)) / lengths.std(0, correction=0).clamp(min=1e-30)).amax(1)
    return scores > scores.mean() + deviations * scores.std(correction=0)


def averaged(rows: Tensor, out: Tensor) -> Tensor:
    """Give the rows that are out the mean of those that stay in their group.

    Args:
        rows: Shape (groups, rows, columns).
        out: Bool, shape (groups, rows); never all of a group.
    """
    staying = (~out)[..., None]
    mean = (rows * staying).sum(1, keepdim=True, dtype=torch.float64) / staying.sum(1, keepdim=True)
    return torch.where(staying, rows, mean.to(rows))
