"""Neft: a robust teacher's first units stay as they are, and its last ones train with small operator norms."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from remos_hf.activations import evaluating, watch
from remos_hf.adapters.base import Adapter
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number, is_number, plain
from remos_hf.randomness import seeded
from remos_hf.strategies.base import Hold, Preparation, Run, Strategy, check_names
from remos_hf.strategies.last_units import Units, check_order, last_units
from remos_hf.strategies.operator_norm import (
    NORMED,
    OperatorNorm,
    all_computed,
    baked,
    computed,
    go_on_from,
    kept_state,
)
from remos_hf.strategies.residual_mix import Mix, apply_mix, end_mix, mix_of, proven, read_through_norms
from remos_hf.strategies.short_runs import check_counts
from remos_hf.strategies.student_data import StudentData

logger = logging.getLogger(__name__)

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Neft(Strategy):
    """CARTL's non-expansive fine-tuning: freeze all but the last k units, whose weights are beta * W / sigma(W).

    It keeps the robustness of a teacher that was trained adversarially (`AdversarialTraining` with the same k), on
    clean data alone. While it trains, each convolution and linear layer of the last k units computes with its weight
    over its operator norm, times beta; what is saved holds these weights and is an ordinary model, every checkpoint
    too.

    A norm that takes the statistics of its own input (a batch norm in training, a layer norm) right behind such a layer
    takes beta out again: these layers are named, in a warning and in the record. A bound on each layer is no
    certificate: norms, attention and, without `mix`, shortcuts may still expand.

    Attributes:
        k: Number of last units that train (blocks, final norm, head), as `last_units` counts them. The published 4, 6
            and 8 of a WideResNet are its head, its final norm and 2, 4, 6 blocks; of a transformer k is the head, the
            final norm where it has one, and encoder layers.
        beta: Operator norm of each layer, in (0, 1]; None bounds none: plain transfer of the last units (TL).
        images: Height and width of the images: sigma is that of the convolution on its maps of such an image. None:
            of the kernel as a matrix, as published, which the convolution's may exceed.
        mix: Blocks give the mean of shortcut and residual instead of their sum. Only for residual blocks of
            convolutions whose sum is followed by a ReLU or by nothing: it is written as weights, and tried on a batch.
        head_start: "keep" the new head as it came, or draw its last layer from "uniform" [0, 1), as published.
        extractor_statistics: "reuse" the teacher's batch norm statistics before the cut, or "update" them; None reuses
            them where there are any.
        submodel_statistics: The same behind the cut; None updates them.
        extractor_affine: "freeze" or "tune" weight and bias of all norms before the cut.
        submodel_affine: The same behind it.
        units: Dotted names of the units, first to last; None finds them.
        head: Modules that are new; None finds them.
        seed: Of the head's start and of the power iterations; the run's if None.

    Source:
        Chen et al., CARTL, ICML 2021; sn_tl_trainer.py, src/utils/spectral_norm.py (one power iteration a step),
        src/networks/parseval_wrn.py (the mix), retrain_trainer/mixins.py (norms) of their code. Spectral norm: Miyato
        et al., ICLR 2018; the mix: Cisse et al., Parseval networks, ICML 2017.
        Differs: power iterations start settled, go on once a step instead of once a forward pass, and are settled
        again before the weights are left in the student. The mix is off, and the head keeps its start, unless asked
        for.
    """

    citation: ClassVar[str] = (
        "@inproceedings{chen2021cartl, title={{CARTL}: Cooperative Adversarially-Robust Transfer Learning}, "
        "author={Chen, Dian and Hu, Hongxin and Wang, Qian and Li, Yinli and Wang, Cong and Shen, Chao and Li, Qi}, "
        "booktitle={ICML}, year={2021}}"
    )
    refuses_adapters: ClassVar[str] = "it bounds the model's own weights, and those stay frozen beside adapters."

    k: int = 4
    beta: float | None = 0.4
    images: tuple[int, int] | None = None
    mix: bool = False
    head_start: Literal["keep", "uniform"] = "keep"
    extractor_statistics: Literal["reuse", "update"] | None = None
    submodel_statistics: Literal["reuse", "update"] | None = None
    extractor_affine: Literal["freeze", "tune"] = "freeze"
    submodel_affine: Literal["freeze", "tune"] = "tune"
    units: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_counts(self, k=1)
        if self.beta is not None:
            told = "the operator norm of each layer, in (0, 1], or None"
            check_number(self, told, lambda one: 0 < one <= 1, "beta")
        for names, known in (
            (("extractor_statistics", "submodel_statistics"), ("reuse", "update", None)),
            (("extractor_affine", "submodel_affine"), ("freeze", "tune")),
            (("head_start",), ("keep", "uniform")),
        ):
            for name in names:
                if getattr(self, name) not in known:
                    raise ValueError(
                        f"{name} is one of {', '.join(map(repr, known))}, but got {getattr(self, name)!r}."
                    )
        check_names(self, "units", "head")
        if self.images is None:
            return
        sizes = self.images if isinstance(self.images, Sequence) else ()
        if len(sizes) != 2 or not all(is_number(one) and isinstance(one, Integral) and one >= 1 for one in sizes):
            raise ValueError(f"images is a height and a width in pixels, whole numbers, but got {self.images!r}.")
        object.__setattr__(self, "images", plain(tuple(sizes)))

    @classmethod
    def artifact(cls, k: int, **changes: object) -> "Neft":
        """Give the published student: the mix, the head from U[0, 1), beta .4, and the best of the four norm policies.

        The slides' figures go with SGD at .1 (momentum .9, decay 5e-4), 100 epochs of batches of 128, times .2 at 40,
        70 and 90. Slides and code name both values of each norm policy; those here kept most robustness. The released
        script leaves the extractor's statistics to be updated: `extractor_statistics="update"`, as the preset has it.

        Args:
            k: Units that train.
            **changes: Fields to set otherwise.
        """
        published = {"mix": True, "head_start": "uniform", "extractor_statistics": "reuse", "submodel_affine": "freeze"}
        return cls(**{"k": k, **published, **changes})

    @property
    def computes_weights(self) -> bool:
        """Whether it bounds or mixes any."""
        return self.beta is not None or self.mix

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Draw the head anew if asked to, bring norms to the mix's scale, and look for what takes beta out again.

        Raises:
            UnsupportedModelError: Units cannot be found, or do not run in the order they were found in; statistics are
                asked for where there are no batch norms; the mix is not known for a block; or a weight of the last
                units is tied to one of the extractor.
            ValueError: There are fewer than k units, no sample, or a weight to bound is all 0.
        """
        plan = _Plan(self, student)
        batch = next(iter(data.batches(data.max_samples)), None)
        if batch is None:
            raise ValueError("There is no sample to start the student with. Pass the student's training data.")
        batch = send_to_device(batch, next(student.parameters()).device)
        if self.units is None:
            check_order(plan.adapter, plan.units, batch)
        if plan.mix is not None:
            proven(plan.adapter, plan.mix, batch)
            read_through_norms(student, plan.mix)
        if self.head_start == "uniform":
            last = student.get_submodule(plan.adapter.feature_layer())
            with torch.no_grad(), seeded(data.seed if self.seed is None else self.seed):
                for parameter in last.parameters():
                    parameter.copy_(torch.rand(parameter.shape))
        dead = [name for name in plan.layers if not bool(student.get_submodule(name).weight.any())]
        if dead:
            raise ValueError(
                f"Neft divides weights by their operator norm, but those of {dead} are all 0. Start them otherwise: a "
                'new head by head_start="uniform".'
            )
        if plan.left_out:
            logger.warning(
                "Neft bounds modules that hold one weight of their own (Linear, convolutions). These weights of the "
                "last %d units train unbounded: %s.",
                self.k,
                ", ".join(plan.left_out),
            )
        cancelled = plan.cancelled(batch)
        if cancelled:
            warnings.warn(
                f"Right behind {len(cancelled)} of the {len(plan.layers)} layers that Neft bounds, the first of them "
                f"'{cancelled[0]}', a norm takes the statistics of its own input, so beta does nothing there. For "
                'batch norms set submodel_statistics="reuse". (remos_hf)',
                stacklevel=2,
            )
        return Preparation(details={"neft": {**plan.told(), "beta_cancelled": cancelled}})

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Freeze the extractor, and have the last units compute with bounded weights.

        Raises:
            ValueError: In training: the run has been finished.
        """
        return _Bounded(self, student)


class _Plan:
    """What Neft does to a model, told by its names and shapes alone."""

    def __init__(self, recipe: Neft, model: nn.Module) -> None:
        self.recipe, self.adapter = recipe, adapter_for(model, recipe.head)
        self.units: Units = last_units(self.adapter, recipe.k, recipe.units)
        modules, owners = dict(model.named_modules()), _owners(model)
        self._check_tied(owners)
        tied = {name for names in owners if len(names) > 1 for name in names}
        bounded = recipe.beta is not None
        normed = [name for name, one in modules.items() if isinstance(one, NORMED) and self.units.holds(name)]
        self.layers = [name for name in normed if bounded and f"{name}.weight" not in tied]
        self.left_out = [name for name in normed if bounded and f"{name}.weight" in tied]
        others = adapter_for(model, ()).layers().values() if bounded else ()
        others = {one.parameter_name for one in others if self.units.holds(one.name)}
        self.left_out += sorted(others - {f"{name}.weight" for name in normed})
        self.batch_norms = [name for name, one in modules.items() if isinstance(one, _BatchNorm)]
        self.norms = [name for name, one in modules.items() if _is_norm(one)]
        asked = [name for name in ("extractor_statistics", "submodel_statistics") if getattr(recipe, name) is not None]
        if asked and not self.batch_norms:
            raise UnsupportedModelError(
                f"{asked[0]} is about the statistics of batch norms, and {type(model).__name__} has none. Leave it out."
            )
        self.mix: Mix | None = None
        if recipe.mix:
            last = self.units.last
            blocks = [unit[0] for unit in last if unit != self.adapter.head and _is_composite(modules[unit[0]])]
            if not blocks:
                raise UnsupportedModelError(f"None of the last {recipe.k} units is a residual block. Leave mix=False.")
            behind = [name for unit in last[len(blocks) :] for name in unit]
            self.mix = mix_of(model, blocks, behind)

    def _check_tied(self, owners: list[list[str]]) -> None:
        """Refuse a weight that one of the last units shares with the extractor, and that so would not train."""
        for names in owners:
            last = [name for name in names if self.units.holds(name)]
            first = [name for name in names if name not in last]
            if last and first:
                raise UnsupportedModelError(
                    f"'{last[0]}' of the last {self.recipe.k} units is tied to '{first[0]}' of the extractor, which is "
                    "frozen, so it would not train. Give it a weight of its own: model.config.tie_word_embeddings = "
                    f"False where there is one, and model.{last[0]} = nn.Parameter(model.{last[0]}.detach().clone())."
                )

    def still(self) -> list[str]:
        """Name the batch norms that use the statistics that they have."""
        extractor = self.recipe.extractor_statistics != "update"
        submodel = self.recipe.submodel_statistics == "reuse"
        return [name for name in self.batch_norms if (submodel if self.units.holds(name) else extractor)]

    def frozen(self) -> list[str]:
        """Name the parameters that do not train."""
        affine = {
            f"{name}.{parameter}": (
                self.recipe.submodel_affine if self.units.holds(name) else self.recipe.extractor_affine
            )
            for name in self.norms
            for parameter in ("weight", "bias")
        }
        names = [name for name, _ in self.adapter.model.named_parameters()]
        return [name for name in names if affine.get(name, "tune" if self.units.holds(name) else "freeze") == "freeze"]

    def cancelled(self, batch: Any) -> list[str]:  # noqa: ANN401 - any batch
        """Name the bounded layers whose output goes straight into a norm that takes its statistics from it."""
        model, still, made = self.adapter.model, set(self.still()), {}
        found: list[str] = []

        def see(name: str, given: Tensor, output: Tensor) -> None:
            if name in self.layers:
                made[name] = output
            else:
                found.extend(layer for layer, one in made.items() if one is given)

        watched = [*self.layers, *(name for name in self.norms if name not in still)]
        with evaluating(model), torch.no_grad(), watch({name: model.get_submodule(name) for name in watched}, see):
            self.adapter.forward(batch)
        return list(dict.fromkeys(found))

    def told(self) -> dict[str, Any]:
        """Give what the record says of it."""
        return {
            "trained_units": [list(unit) for unit in self.units.last],
            "frozen_units": len(self.units.before),
            "beta": self.recipe.beta,
            "operator": "kernel as a matrix" if self.recipe.images is None else list(self.recipe.images),
            "bounded": self.layers,
            "not_bounded": self.left_out,
            "mixed_blocks": [] if self.mix is None else list(self.mix.blocks),
            "statistics_reused": len(self.still()),
            "statistics_updated": len(self.batch_norms) - len(self.still()),
        }


def _owners(model: nn.Module) -> list[list[str]]:
    """Give all names of each parameter; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm; libraries write RMS norms of their own, which nothing but their name tells."""
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    known = shapes.keys() <= {"weight", "bias"} and set(shapes.values()) == {1}
    return isinstance(module, _NORMS) or (known and "Norm" in type(module).__name__)


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False))


class _Bounded(Hold):
    def __init__(self, recipe: Neft, student: nn.Module) -> None:
        self.plan = plan = _Plan(recipe, student)
        self.thawed = [student.get_parameter(name) for name in plan.frozen()]
        self.thawed = [parameter for parameter in self.thawed if parameter.requires_grad]
        for parameter in self.thawed:
            parameter.requires_grad_(False)
        sizes = _map_sizes(plan.adapter, plan.layers, recipe.images) if recipe.images and plan.layers else {}
        generator = torch.Generator().manual_seed(recipe.seed or 0)
        for name in plan.layers:
            layer = student.get_submodule(name)
            computed(layer, "weight", OperatorNorm(layer, recipe.beta, sizes.get(name), generator))
        if plan.mix is not None:
            apply_mix(student, plan.mix)
        self.student, self.still = student, plan.still()
        self.sigmas: dict[str, float] = {}
        self.finished = False

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        if self.finished:
            raise ValueError(
                "This student of Neft is finished: its weights are no longer bounded, its blocks no longer mixed, its "
                "first units no longer frozen. To train on, start a new run with it."
            )
        # Trainers call train() before every step, and evaluation flips all modes back.
        for name in self.still:
            model.get_submodule(name).eval()
        for weight, norm in _operator_norms(model):
            norm.iterate(weight)
        return run(inputs)

    def finish(self, model: nn.Module, data: StudentData) -> None:
        for name, (weight, norm) in zip(self.plan.layers, _operator_norms(model), strict=True):
            norm.settle(weight)
            self.sigmas[name] = float(norm.sigma(weight.detach()))
        baked(model)
        if self.plan.mix is not None:
            end_mix(model, self.plan.mix)
        for parameter in self.thawed:
            parameter.requires_grad_(True)
        self.finished = True

    def details(self) -> dict[str, Any]:
        return {"neft": {"sigmas_before_bounding": self.sigmas}}

    def state_dict(self) -> dict[str, Any]:
        return {"computed": kept_state(self.student)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        go_on_from(self.student, state["computed"])


def _operator_norms(model: nn.Module) -> list[tuple[Tensor, OperatorNorm]]:
    computing = all_computed(model).values()
    return [(each.original, each[0]) for each in computing if isinstance(each[0], OperatorNorm)]


def _map_sizes(adapter: Adapter, layers: list[str], images: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Give the shape of what each layer reads of an image of this size."""
    model, sizes = adapter.model, {}
    first = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
    if first is None:
        raise UnsupportedModelError(f"images is about convolutions, and {type(model).__name__} has none. Leave it out.")
    image = torch.zeros(1, first.in_channels, *images).to(first.weight)
    modules = {name: model.get_submodule(name) for name in layers}
    seen = watch(modules, lambda name, given, _: sizes.__setitem__(name, tuple(given.shape[1:])))
    with evaluating(model), torch.no_grad(), seen:
        adapter.forward({"pixel_values": image} if hasattr(model, "config") else image)
    return sizes
