"""AdversarialTraining: train on attacked inputs, and keep a feature in the middle where it was on the clean ones."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from remos_hf.activations import recomputes, watch
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number, is_number, plain
from remos_hf.randomness import seeded
from remos_hf.strategies.attacked_inputs import Attack, outputs_without_labels
from remos_hf.strategies.base import Hold, Preparation, Run, Strategy, check_names
from remos_hf.strategies.feature_distance import CARTL_NORMS
from remos_hf.strategies.l2sp import head_parameters
from remos_hf.strategies.last_units import check_order, last_units
from remos_hf.strategies.perturbed_inputs import (
    Perturbing,
    check_positive,
    inputs_to_perturb,
    real_positions,
    without_adapters,
)
from remos_hf.strategies.short_runs import HEAD_RATE, Samples, check_counts, free_copy, labelled_loss, short_run
from remos_hf.strategies.student_data import StudentData


@dataclass(frozen=True)
class AdversarialTraining(Strategy):
    """Train on inputs that PGD moves against the model itself; with `k`, CARTL's feature distance minimisation (FDM).

    The loss is CE(f(x'), y) + weight / sqrt(d) * ||g(x) - g(x')||_2, where g is what the last k units read, d its size
    and x' the attacked input: it makes a robust teacher, whose first units a student may freeze (`Neft` with the same
    k). It starts nothing itself. Memory and time: `steps` further forward and backward passes, and with `k` one more
    forward pass. Images move in pixels from 0 to 1, texts in the embeddings of their real tokens.

    Attributes:
        k: Number of last units (blocks, final norm, head) before which the feature is read, as `last_units` counts
            them; None for plain adversarial training.
        weight: Of the feature distance, at least 0. As a sum over a batch of n it counts n times as much as as a mean.
        reduction: Of the samples' distances: "mean", or "sum" over a process's batch.
        eps: Largest change of a pixel, from 0 to 1.
        step: Of each of the steps; that of texts is in the same ratio to theirs.
        steps: Steps of the attack, from a uniform random start.
        text_eps: Largest change of a value of an embedding, over the root mean square of the vocabulary's.
        eps_from: Optimizer steps before which nothing is attacked (eps scheduling).
        eps_full: Step from which the whole budget is used; it grows in a line in between. 0: from the first.
        head_steps: Steps in which the head alone is trained first, on attacked inputs (RoLI).
        mean: What images were normalised by, one number a channel; None asks the model. `std` likewise.
        std: Deviations.
        units: Dotted names of the units, first to last; None finds them.
        head: Modules that are new; None finds them.
        seed: Of the random starts and of RoLI's samples; the run's if None.

    Source:
        Madry et al., ICLR 2018 (PGD-7, 8/255, 2/255); Chen et al., CARTL, ICML 2021 (FDM), their
        robust_plus_singular_regularization_trainer.py; RoLI: Hua et al., CVPR 2024; eps scheduling: Ngnawe et al., ICLR
        2026. For texts: Zhu et al., FreeLB, ICLR 2020.
        Differs: the mean over the batch is the default, with the weight that .005 has as a sum over 128. The attack
        climbs the plain cross-entropy, whatever loss the trainer computes. Texts: signed steps in a cube instead of
        FreeLB's L2 ball; padding does not count, nor in d. Both passes drop the same where there is dropout. RoLI's
        head is trained by AdamW for the steps named, in float32. Eps schedules are in steps, not in shares of the run.
    """

    citation: ClassVar[str] = (
        "@inproceedings{madry2018towards, title={Towards Deep Learning Models Resistant to Adversarial Attacks}, "
        "author={Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, "
        "Adrian}, booktitle={ICLR}, year={2018}}\n"
        "@inproceedings{chen2021cartl, title={{CARTL}: Cooperative Adversarially-Robust Transfer Learning}, "
        "author={Chen, Dian and Hu, Hongxin and Wang, Qian and Li, Yinli and Wang, Cong and Shen, Chao and Li, Qi}, "
        "booktitle={ICML}, year={2021}}"
    )
    changes_all: ClassVar[bool] = True

    k: int | None = None
    weight: float = 0.64
    reduction: Literal["sum", "mean"] = "mean"
    eps: float = 8 / 255
    step: float = 2 / 255
    steps: int = 7
    text_eps: float = 0.1
    eps_from: int = 0
    eps_full: int = 0
    head_steps: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    units: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_positive(self, "eps", "step", "text_eps")
        check_counts(self, steps=1, eps_from=0, eps_full=0, head_steps=0)
        if self.k is not None:
            check_counts(self, k=1)
        check_number(self, "a weight in the loss, at least 0", lambda one: 0 <= one < float("inf"), "weight")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is 'sum' or 'mean', but got {self.reduction!r}.")
        if self.eps > 1:
            raise ValueError(f"eps is {self.eps}, but pixels go from 0 to 1: 8/255 is meant as 8 of 255 levels.")
        if 0 < self.eps_full < self.eps_from or (self.eps_from and not self.eps_full):
            raise ValueError(f"eps_full is the step at which eps is whole, not before eps_from={self.eps_from}.")
        check_names(self, "units", "head")
        self._check_normalisation()

    @classmethod
    def paper(cls, k: int, **changes: object) -> "AdversarialTraining":
        """Give FDM as the paper prints it: .005 of a mean over samples. Trained by the artifact's recipe (SGD, 0.1)."""
        return cls(**{"k": k, "weight": 0.005, "reduction": "mean", **changes})

    @classmethod
    def artifact(cls, k: int, **changes: object) -> "AdversarialTraining":
        """Give FDM as the artifact ran it: .005 of a sum over the batch, which was of 128: .64 of a mean."""
        return cls(**{"k": k, "weight": 0.005, "reduction": "sum", **changes})

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Train the head alone on attacked inputs, if asked to (RoLI); the student's body stays as it is.

        Raises:
            UnsupportedModelError: Units cannot be found, or do not run in the order they were found in.
            ValueError: There are fewer than k, or there is no head to train.
        """
        if self.k is not None and self.units is None:
            adapter = adapter_for(student, self.head)
            units = last_units(adapter, self.k)
            for batch in islice(data.batches(data.max_samples), 1):
                check_order(adapter, units, send_to_device(batch, next(student.parameters()).device))
        if not self.head_steps:
            return Preparation()
        begun = time.perf_counter()
        seed = data.seed if self.seed is None else self.seed
        asked, generator = free_copy(student), torch.Generator().manual_seed(seed)
        new = {name: asked.get_parameter(name) for name in head_parameters(asked, self.head)}
        if not new:
            raise ValueError(f"head_steps trains the head first, but {type(student).__name__} has none: give head=.")
        attack = self._attack(asked)

        def loss(batch: Any) -> Tensor:  # noqa: ANN401 - any batch
            with attack.attacked(asked, batch, generator) as moved:
                return labelled_loss(asked, moved)

        samples = Samples(data, next(student.parameters()).device, seed)
        losses = short_run(asked, samples, loss, torch.optim.AdamW(new.values(), HEAD_RATE), steps=self.head_steps)
        with torch.no_grad():
            for name, parameter in new.items():
                student.get_parameter(name).copy_(parameter)
        details = {"roli": {"head_steps": len(losses), "loss": [losses[0], losses[-1]]}}
        return Preparation(seconds={"robust head": time.perf_counter() - begun}, details=details)

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Attack every batch while the model trains.

        Raises:
            UnsupportedModelError: The units cannot be found. In training: what the last k read is no feature of the
                samples.
            ValueError: There are fewer than k.
        """
        return _Attacked(self, teacher)

    def _check_normalisation(self) -> None:
        if self.mean is None and self.std is None:
            return
        given = {name: getattr(self, name) for name in ("mean", "std")}
        lists = all(isinstance(one, (Sequence, np.ndarray)) and len(one) for one in given.values())
        if not lists or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std belong together, one number a channel, but got {self.mean} and {self.std}.")
        for name, values in given.items():
            if not all(is_number(one) and (one > 0 or name == "mean") and math.isfinite(one) for one in values):
                raise ValueError(f"{name} is one number a channel, {'above 0, ' * (name == 'std')}but got {values}.")
            object.__setattr__(self, name, plain(tuple(values)))

    def _attack(self, model: nn.Module) -> Attack:
        sizes = {"eps": self.eps, "step": self.step, "steps": self.steps, "text_eps": self.text_eps}
        return Attack(model, **sizes, normalisation=None if self.mean is None else (self.mean, self.std))


class _Attacked(Perturbing):
    takes_clean = False  # it attacks what others have changed too

    def __init__(self, recipe: AdversarialTraining, model: nn.Module) -> None:
        super().__init__(1.0, recipe.seed)
        self.recipe, self.attack = recipe, recipe._attack(model)
        averaged = ("samples",) if recipe.reduction == "mean" else ()
        self.distance = replace(CARTL_NORMS, mean_over=(*CARTL_NORMS.mean_over, *averaged))
        self.read: tuple[str, ...] = ()
        if recipe.k is not None and recipe.weight:
            self.read = last_units(adapter_for(model, recipe.head), recipe.k, recipe.units).last[0]
        self.done, self.batches, self.total = 0, 0, torch.zeros((), dtype=torch.float64)

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        share = self._share()
        if not share:
            return run(inputs)
        owner = without_adapters(model)
        if self.read and recomputes(owner):
            raise ValueError(
                "AdversarialTraining with k looks at a feature while the model runs, and gradient checkpointing runs "
                "it a second time unseen. Train without gradient_checkpointing."
            )
        given = inputs_to_perturb(inputs)
        self.clean = torch.zeros(len(given.values), dtype=torch.bool)
        with self.attack.attacked(model, inputs, self.generator, share) as moved, self._reading(owner) as hit:
            if not self.read:
                return run(moved)
            # The state comes back, so that dropout drops the same in the clean pass and is no part of the distance.
            with seeded(None, [given.values.device]):
                loss, outputs = run(moved)
        self._check_read(hit, len(given.values))
        with self._reading(owner) as clean:
            outputs_without_labels(model, inputs)
        masks = [real_positions(inputs, given.values)] if given.is_text else []
        added = self.distance({"read": hit[0]}, {"read": clean[0]}, masks)
        self.batches, self.total = self.batches + 1, self.total.to(added.device) + added.detach()
        return loss + self.recipe.weight * added, outputs

    @contextmanager
    def _reading(self, owner: nn.Module) -> Iterator[list[Tensor]]:
        """Give what the units after the cut read first, kept for one loss."""
        read: list[Tensor] = []
        modules = {name: owner.get_submodule(name) for name in self.read}
        with watch(modules, lambda _, given, __: read.append(given)):
            yield read

    def _check_read(self, read: list[Tensor], samples: int) -> None:
        if not read or len(read[0]) != samples:
            came = f"reads a tensor of shape {tuple(read[0].shape)}" if read else "was not called"
            raise UnsupportedModelError(
                f"The feature is what '{self.read[0]}' reads, the first of the last k={self.recipe.k} units, but of "
                f"{samples} samples it {came}. Name the units that samples run through, first to last, the head among "
                "them: units=(...)."
            )

    def _share(self) -> float:
        """Give the share of the budget at this step, in [0, 1]."""
        first, whole = self.recipe.eps_from, self.recipe.eps_full
        return 1.0 if self.done >= whole else max(0, self.done - first) / max(1, whole - first)

    def after_step(self, model: nn.Module) -> None:
        self.done += 1

    def details(self) -> dict[str, Any]:
        told = {"steps": self.done, "text_eps": self.attack.text_eps, "cut_before": list(self.read)}
        if self.batches:
            told["mean_distance"] = float(self.total) / self.batches
        return {"adversarial_training": told}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "done": self.done, "batches": self.batches, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.done, self.batches, self.total = state["done"], state["batches"], state["total"]
