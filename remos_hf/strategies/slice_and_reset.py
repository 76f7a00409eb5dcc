"""Slice, reset what lies outside, fine-tune: ReMoS and the resets that it must be compared with."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.fields import check_whole, plain
from remos_hf.layers import rankable_layers
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.criteria import (
    Criterion,
    median_coverage,
    strong_coverage,
    threshold_coverage,
    top_k_coverage,
)
from remos_hf.profiling.data_pass import on_main_process
from remos_hf.slicing.refill import REFILLS, Refill, reset_outside, squares_outside
from remos_hf.slicing.relevant_slice import RelevantSlice, check_slice_ratio, choose_slice
from remos_hf.slicing.rules import Rule
from remos_hf.strategies.base import EmbeddingRows, Preparation, Strategy, check_embedding_rows, check_names, reset_rows
from remos_hf.strategies.student_data import StudentData

CRITERIA = {
    "median": median_coverage,
    "nc": threshold_coverage,
    "tknc": top_k_coverage,
    "snac": strong_coverage,
}


@dataclass(frozen=True)
class SliceAndReset(Strategy):
    """Keep a share of the teacher's weights, reset the others, train all of them.

    All rules compete over the same layers: those that run on the student's data. A rule of your own is a function
    (layers, profile, share to keep, seed), as `choose_slice` takes it:

        class Mine(SliceAndReset):  # or Remos, whose profile it then gets
            rule = staticmethod(my_rule)

    Attributes:
        slice_ratio: Share of the weights kept, in (0, 1]. The artifact's prune_ratio is 1 - slice_ratio.
        scope: "model": all weights compete. "layer": each layer is cut by itself.
        reset_to: What stands where a weight was given up. "zero"; "init": fresh values; "mean": zero, and the bias
            takes what the weights contributed on average; "reconstruct": zero, and the kept weights move to where the
            outputs are nearest to the teacher's. The last two read the data once more.
        embeddings: Whether rows of the input embeddings compete too.
        embedding_rows: "keep", or "mean" to give the embedding rows of tokens that the student's data never shows the
            mean of the others: attacks that live there pass every slice.
        head: Modules never sliced; None finds them.
        seed: Seed of random rules and fresh values; the run's if None.
    """

    citation: ClassVar[str] = (
        "@inproceedings{zhang2022remos, title={{ReMoS}: Reducing Defect Inheritance in Transfer Learning via Relevant "
        "Model Slicing}, author={Zhang, Ziqi and Li, Yuanchun and Wang, Jindong and Liu, Bingyan and Li, Ding and Guo, "
        "Yao and Chen, Xiangqun and Liu, Yunxin}, booktitle={ICSE}, year={2022}}"
    )

    rule: ClassVar[str | Rule]

    slice_ratio: float
    scope: Literal["model", "layer"] = "model"
    reset_to: Refill = "zero"
    embeddings: bool = False
    embedding_rows: EmbeddingRows = "keep"
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_slice_ratio(self.slice_ratio)
        object.__setattr__(self, "slice_ratio", plain(self.slice_ratio))
        if self.scope not in ("model", "layer"):
            raise ValueError(f"scope is 'model' or 'layer', but got {self.scope!r}.")
        if self.reset_to not in REFILLS:
            raise ValueError(f"reset_to is one of {', '.join(map(repr, REFILLS))}, but got {self.reset_to!r}.")
        check_embedding_rows(self.embedding_rows)
        check_names(self, "head")

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Profile if the rule needs it, choose the slice, reset the rest in place."""
        seed = data.seed if self.seed is None else self.seed
        rankable_layers(adapter_for(student, self.head).layers(embeddings=self.embeddings))
        start = time.perf_counter()
        profile = self._profile(student, data)
        rule, details = self._decided_by(student, data)
        profiled = time.perf_counter()
        relevant = choose_slice(
            student,
            profile,
            slice_ratio=self.slice_ratio,
            rule=rule,
            scope=self.scope,
            ties=self._ties,
            seed=seed,
            head=self.head,
            embeddings=self.embeddings,
            ran=None
            if profile is not None
            else data.layers_that_run(student, head=self.head, embeddings=self.embeddings),
            progress=on_main_process(),
        )
        chosen = time.perf_counter()
        squares = squares_outside(student, relevant)
        reset_outside(
            student, relevant, to=self.reset_to, seed=seed, verify_teacher=False, **self._statistics(student, data)
        )
        rows = reset_rows(self.embedding_rows, student, data)
        seconds = {"profile": profiled - start, "choose": chosen - profiled, "reset": time.perf_counter() - chosen}
        return Preparation(profile, relevant, seconds, squares, rows, details)

    def restart(self, student: nn.Module, data: StudentData, relevant_slice: RelevantSlice | None) -> None:
        """Reset what `prepare` reset, by the slice that it chose."""
        seed = data.seed if self.seed is None else self.seed
        reset_outside(student, relevant_slice, to=self.reset_to, seed=seed, **self._statistics(student, data))
        reset_rows(self.embedding_rows, student, data)

    def _statistics(self, student: nn.Module, data: StudentData) -> dict[str, Any]:
        if self.reset_to == "mean":
            return {"means": data.input_means(student, head=self.head)}
        if self.reset_to == "reconstruct":
            return {"second_moments": data.second_moments(student, head=self.head)}
        return {}

    def _profile(self, student: nn.Module, data: StudentData) -> CoverageProfile | None:
        return None

    def _decided_by(self, student: nn.Module, data: StudentData) -> tuple[str | Rule, Mapping[str, Any]]:
        """Give the rule, and what the record says of how it was found."""
        return self.rule, {}

    @property
    def _ties(self) -> str:
        return "mean"


@dataclass(frozen=True)
class Remos(SliceAndReset):
    """Reset the weights that the task covers least and the teacher made largest.

    Attributes:
        criterion: "median": a sample covers the upper half of every layer. "nc" is the choice of the paper and of its
            artifact, which may leave most neurons never covered; "tknc" and "snac" are the other two that they try.
        criterion_value: NC's threshold, TKNC's or SNAC's k; None for the published one (0.5, 10, 2). The median has
            none.
        ties: "mean", or "artifact" for the artifact's traversal order.
        source: "hooks", or "hidden_states" where hooks cannot be used.
        max_samples: Samples to profile, drawn by the run's seed, or "all"; the run's number if None.

    Source:
        ReMoS, ICSE 2022. The paper states no slice ratio; the artifact keeps .9 (CV_adv/examples/remos.sh:16, NLP) or
        .97 (CV_backdoor/examples/remos/remos.sh:16).
    """

    rule: ClassVar[str] = "remos"

    criterion: Literal["median", "nc", "tknc", "snac"] = "median"
    criterion_value: float | None = None
    ties: Literal["mean", "artifact"] = "mean"
    source: Literal["hooks", "hidden_states"] = "hooks"
    max_samples: int | Literal["all"] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion is one of {', '.join(CRITERIA)}, but got {self.criterion!r}.")
        if self.criterion == "median" and self.criterion_value is not None:
            raise ValueError(
                f"criterion 'median' takes no criterion_value, but got {self.criterion_value!r}. Name the criterion "
                "that it is for, such as criterion='nc'."
            )
        if self.max_samples not in (None, "all"):
            check_whole(self, "a number of at least 1, 'all' or None", 1, "max_samples")
        if self.ties not in ("mean", "artifact"):
            raise ValueError(f"ties is 'mean' or 'artifact', but got {self.ties!r}.")
        self._criterion()

    def _criterion(self) -> Criterion:
        make = CRITERIA[self.criterion]
        return make() if self.criterion_value is None else make(self.criterion_value)

    def _profile(self, student: nn.Module, data: StudentData) -> CoverageProfile:
        return data.profile(
            student,
            criterion=self._criterion(),
            source=self.source,
            head=self.head,
            embeddings=self.embeddings,
            max_samples=self.max_samples,
        )

    @property
    def _ties(self) -> str:
        return self.ties


@dataclass(frozen=True)
class TopMagnitude(SliceAndReset):
    """Reset the largest weights, whatever the data: what is left of ReMoS without coverage."""

    rule: ClassVar[str] = "top_magnitude"


@dataclass(frozen=True)
class MagPrune(SliceAndReset):
    """Reset the smallest weights.

    Source:
        ReMoS, ICSE 2022, section 5.2 (Mag-prune).
    """

    rule: ClassVar[str] = "mag_prune"


@dataclass(frozen=True)
class Random(SliceAndReset):
    """Reset random weights, the same share of every layer."""

    rule: ClassVar[str] = "random"
