"""NNSlicer as a start: keep the weights that the teacher's answers on the student's data flow through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from remos_hf.activations import evaluating
from remos_hf.layers import Layer
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.reference import Reference, ReferenceKind, profile_reference
from remos_hf.slicing.contributions import contributions
from remos_hf.slicing.contributions_kept import checked_theta
from remos_hf.slicing.ordinal import Selection
from remos_hf.slicing.rules import Rule, keep_highest
from remos_hf.strategies.short_runs import Samples, check_counts, together, with_trained_head
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData


@dataclass(frozen=True)
class NNSlicer(SliceAndReset):
    """Reset the weights that contribute least to what the model says of the student's samples.

    A head is trained on the frozen teacher first, asked which label it gives each sample, and dropped: the student
    keeps its fresh one. The label is traced back to every weight, and the weights with the smallest |contributions| are
    given up; among equal ones, as the many that contribute nothing, the smallest weights.

    Uses poisoned data or an attack's success: no.

    Attributes:
        score: "absolute": |contributions| of single samples are added up. "signed": contributions of all samples are
            added up first, so what helps one sample and hinders another counts for nothing.
        scope: "layer": each layer is cut by itself. "model": all weights compete.
        theta: Of every sum, the most of the smallest effects are dropped that together stay under this share of the
            relative output, in [0, 1).
        reference: What samples are compared with: "global", "class" or "position".
        samples: Samples over all processes that are traced, at least 1. MiniLM takes about a second for each.
        head_steps: Steps of 32 samples that the head is trained before; 0 takes it as it is.

    Source:
        NNSlicer, ESEC/FSE 2020, section 4; both scores are in its code.
        Differs: a start for fine-tuning, which it was not made for. Ties, and the rules for transformers.
    """

    citation: ClassVar[str] = (
        "@inproceedings{zhang2020nnslicer, title={Dynamic Slicing for Deep Neural Networks}, author={Zhang, Ziqi and "
        "Li, Yuanchun and Guo, Yao and Chen, Xiangqun and Liu, Yunxin}, booktitle={ESEC/FSE}, year={2020}}"
    )

    score: Literal["absolute", "signed"] = "absolute"
    scope: Literal["model", "layer"] = "layer"
    theta: float = 0.2
    reference: ReferenceKind = "global"
    samples: int = 64
    head_steps: int = 100

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        super().__post_init__()
        if self.score not in ("absolute", "signed"):
            raise ValueError(f"score is 'absolute' or 'signed', but got {self.score!r}.")
        object.__setattr__(self, "theta", checked_theta(self.theta))
        if self.reference not in ("global", "class", "position"):
            raise ValueError(f"reference is 'global', 'class' or 'position', but got {self.reference!r}.")
        if self.embeddings:
            raise ValueError("NNSlicer scores no embedding rows. Leave embeddings=True out, or take Remos.")
        check_counts(self, samples=1, head_steps=0)

    def _decided_by(self, student: nn.Module, data: StudentData) -> tuple[Rule, Mapping[str, Any]]:
        """Trace the student's data back to the weights."""
        device = next(student.parameters()).device
        drawn = Samples(data, device, data.seed if self.seed is None else self.seed)
        asked, steps = with_trained_head(student, drawn, steps=self.head_steps, head=self.head)
        batches = map(convert_to_fp32, data.batches(data.max_samples))
        reference = profile_reference(asked, batches, kind=self.reference, max_samples="all", across_processes=True)
        with evaluating(asked):
            found = together(lambda: self._traced(asked, data, reference), device)
        traced = int(found.pop("num_samples"))
        if not traced:
            raise ValueError("There is no sample to trace. Pass the student's training data.")
        weights = sum(one.numel() for one in found.values())
        told = {
            "score": self.score,
            "samples": traced,
            "reference_samples": reference.num_samples,
            "head_steps": steps,
            "in_slice": sum(int((one != 0).sum()) for one in found.values()) / weights,
        }
        return contribution_rule(found), {"nnslicer": told}

    def _traced(self, asked: nn.Module, data: StudentData, reference: Reference) -> dict[str, Tensor]:
        batches = [convert_to_fp32(batch) for batch in data.batches(self.samples)]
        if not batches:
            return {"num_samples": torch.tensor(0)}
        found = contributions(asked, batches, reference, theta=self.theta)
        sums = found.absolute if self.score == "absolute" else found.weights
        return {**sums, "num_samples": torch.tensor(found.num_samples)}


def contribution_rule(scores: Mapping[str, Tensor]) -> Rule:
    """Make the rule that keeps the largest |contributions|, and of equal ones the largest weights.

    Args:
        scores: By parameter name, of the weight's shape. A weight that did not run contributes nothing.
    """

    def contribution(layers: Sequence[Layer], statistics: CoverageProfile | None, share: float, seed: int) -> Selection:
        magnitude = torch.cat([layer.weight.float().abs().flatten() for layer in layers])
        ranks = torch.empty_like(magnitude, dtype=torch.float64)
        order = magnitude.argsort(stable=True)
        ranks[order] = torch.arange(len(order), device=order.device, dtype=torch.float64) / len(order)
        made = []
        for layer, rank in zip(layers, ranks.split([layer.numel for layer in layers]), strict=True):
            found = scores.get(layer.parameter_name)
            contrib = torch.zeros(layer.shape) if found is None else found.abs()
            made.append(contrib.to(rank) + rank.view(layer.shape))
        return keep_highest(made, layers, share)

    return contribution
