"""Features of the student held to the teacher's: which layers, and what a hold adds to the loss for them."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from remos_hf.activations import capture, precision_in_force, watch
from remos_hf.adapters.base import Adapter
from remos_hf.errors import UnsupportedModelError, nearest
from remos_hf.fields import check_number
from remos_hf.strategies.base import Hold, Run, Strategy, check_names
from remos_hf.strategies.feature_distance import FeatureDistance
from remos_hf.strategies.perturbed_inputs import rows_of, without_adapters
from remos_hf.strategies.projector import Projector
from remos_hf.strategies.student_data import StudentData

# What a model calls the convolution beside a block, which is registered after those within it.
_SHORTCUTS = ("downsample", "shortcut", "skip", "identity")

# Why a strategy that decays the head refuses a student that computes its weights from others.
HEAD_DECAYS = "it decays the head's weights that train. Set its head_decay=0"


def feature_modules(adapter: Adapter, named: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """Find the modules whose outputs are a model's features, first to last.

    Args:
        adapter: Of the model.
        named: Dotted names; None finds them: the blocks of a transformer, the stages of a convolutional net, or else
            the direct children outside the head that hold parameters, and those beside the head where it is inside one
            (of a body of transformers that is the only one, its children).
            Of a list of modules, which no model calls, the last stands for it.

    Raises:
        UnsupportedModelError: A name is not in the model, or there is nothing outside the head.
    """
    return _called(_features(adapter, named))


def _called(found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    called = {}
    for name, module in found.items():
        while isinstance(module, nn.ModuleList) and len(module):
            name, module = f"{name}.{len(module) - 1}", module[-1]
        called[name] = module
    return called


def _features(adapter: Adapter, named: tuple[str, ...] | None) -> dict[str, nn.Module]:
    model = adapter.model
    if named is not None:
        known = dict(model.named_modules())
        missing = [name for name in named if name not in known]
        if missing:
            raise UnsupportedModelError(
                f"layers names {missing}, but {type(model).__name__} has no such modules.{nearest(missing, known)}"
            )
        return {name: known[name] for name in named}
    try:
        return adapter.blocks()
    except UnsupportedModelError:
        pass
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "stages" and isinstance(module, (nn.ModuleList, nn.Sequential)):
            return {f"{name}.{key}": stage for key, stage in module.named_children()}
    found = _outside(model, "", adapter.head)
    if [isinstance(one, PreTrainedModel) for one in found.values()] == [True]:  # a body that ends in its own pooling
        ((name, body),) = found.items()
        found = _outside(body, f"{name}.", adapter.head) or found
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no child outside its head whose output is a feature. Name some: layers=(...)."
        )
    return found


def _outside(parent: nn.Module, prefix: str, head: tuple[str, ...]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for child, module in parent.named_children():
        name = f"{prefix}{child}"
        if any(one.startswith(f"{name}.") for one in head):  # a body that holds its head, as an ImageClassifier's
            found |= _outside(module, f"{name}.", head)
        elif name not in head and any(True for _ in module.parameters()):
            found[name] = module
    return found


def stage_modules(adapter: Adapter, named: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """Find a model's blocks or stages: `feature_modules` without a stem, where a plain net has stages beside it.

    Args:
        adapter: Of the model.
        named: As in `feature_modules`.
    """
    found = _features(adapter, named)
    stages = {name: one for name, one in found.items() if isinstance(one, (nn.Sequential, nn.ModuleList))}
    return _called(found if named is not None or not stages else stages)


def last_weights(adapter: Adapter, named: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """Find the last convolution of each stage, shortcuts apart; of blocks without one, their last weight.

    What it gives comes before the norm, the sum and the activation that end a block. Stages without weights are left
    out.

    Args:
        adapter: Of the model.
        named: As in `feature_modules`; those very modules.

    Raises:
        UnsupportedModelError: There is none.
    """
    if named is not None:
        return feature_modules(adapter, named)
    layers = [layer.name for layer in adapter.layers().values() if layer.index is None and layer.attribute == "weight"]
    known, last = dict(adapter.model.named_modules()), {}
    for stage in stage_modules(adapter):
        inside = [name for name in layers if f"{name}.".startswith(f"{stage}.")]
        inside = [name for name in inside if not any(one in name[len(stage) :] for one in _SHORTCUTS)]
        convolutions = [name for name in inside if isinstance(known[name], _ConvNd)]
        last |= {name: known[name] for name in (convolutions or inside)[-1:]}
    if not last:
        raise UnsupportedModelError(
            f"No stage of {type(adapter.model).__name__} holds a convolution or a Linear. Name some: layers=(...)."
        )
    return last


@torch.no_grad()
def features_of(adapter: Adapter, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Give a teacher's features of a batch, by module name."""
    with capture(modules) as made:
        adapter.forward(batch)
    return made


def head_squares(model: nn.Module, head: tuple[str, ...]) -> Tensor:
    """Add up the squares of what trains in a model's head, also under adapters; a scalar."""
    trained = {id(one): one for name in head for one in model.get_submodule(name).parameters() if one.requires_grad}
    return sum((one.float().square().sum() for one in trained.values()), start=torch.zeros(()))


def check_weights(recipe: Strategy, *names: str) -> None:
    """Refuse fields of a recipe that are no weight in a loss, and lists of names that are none; make these tuples.

    Raises:
        ValueError: Names the first field that is below 0, or not finite; layers is empty, or a string.
    """
    check_number(recipe, "a weight in the loss, at least 0", lambda one: 0 <= one < float("inf"), *names)
    check_names(recipe, "layers", "head")
    if recipe.layers == ():
        raise ValueError("layers names the modules whose outputs are compared, but got (). Leave it None to find them.")


class HeldFeatures(Hold):
    """Adds to the loss how far the student's features are from the teacher's, and half the head's squares.

    Beside holds that change inputs it looks at the samples that they left clean, and warns in the end if there were
    none.

    Args:
        word: Under which the record says what was compared and how many steps were taken; empty says nothing.
        teacher: Adapter of the frozen teacher.
        modules: Of the teacher, by name; the student's are those of the same names.
        distance: How far apart features are.
        weight: Of the distance in the loss.
        head_decay: Weight of half the head's squares.
        projector: What maps the student's features to the teacher's channels first; None for nothing.

    Raises:
        ValueError: The teacher is in train mode.
    """

    needs_teacher = True

    def __init__(
        self,
        word: str,
        teacher: Adapter,
        modules: Mapping[str, nn.Module],
        distance: FeatureDistance,
        weight: float,
        *,
        head_decay: float = 0.0,
        projector: Projector | None = None,
    ) -> None:
        if any(module.training for module in teacher.model.modules()):
            raise ValueError(
                f"The teacher, a {type(teacher.model).__name__}, is in train mode, so its dropout and its norms would "
                "change what the student is held to. Call teacher.eval()."
            )
        self.word, self.teacher, self.layers = word, teacher, modules
        self.distance, self.weight, self.head_decay = distance, weight, head_decay
        self.projector, self.steps = projector, 0
        # Batches of which samples were compared, and those of which none was clean.
        self.compared, self.passed_over = 0, 0
        self.channels: dict[str, Tensor] | None = None

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401 - a batch as collated
        """Give the run's loss with what is added to it."""
        student = without_adapters(model)
        modules = {name: student.get_submodule(name) for name in self.layers}
        # Trainers lay mixed precision on the student's forward alone; the teacher runs as the student's features did.
        precision: dict[str, AbstractContextManager] = {}
        told = watch(modules, lambda _, __, feature: precision.update(of=precision_in_force(feature.device.type)))
        with capture(modules) as made, told, self.disturbed(modules):
            loss, outputs = run(inputs)
        if self.head_decay:
            loss = loss + 0.5 * self.head_decay * head_squares(student, self.teacher.head).to(loss.device)
        _check_gradient(modules, made)
        rows = self._clean_rows()
        if rows is not None:
            if not len(rows):
                self.passed_over += 1
                return loss, outputs
            inputs = rows_of(inputs, rows)
            made = {name: one[rows.to(one.device)] for name, one in made.items()}
        self.compared += 1
        with precision["of"]:
            wanted = features_of(self.teacher, self.layers, inputs)
        masks = [one.real for one in self.teacher.sequences(inputs).values() if one.real is not None]
        return loss + self.weight * self._away(made, wanted, masks), outputs

    def disturbed(self, modules: Mapping[str, nn.Module]) -> AbstractContextManager:
        """Give what is laid around the student's forward pass; features are seen before it changes them."""
        return nullcontext()

    def _away(self, made: Mapping[str, Tensor], wanted: Mapping[str, Tensor], masks: list[Tensor]) -> Tensor:
        made, wanted = self._with_channels_second(made), self._with_channels_second(wanted)
        if self.channels is not None:
            self.channels = {name: one.to(wanted[name].device) for name, one in self.channels.items()}
        if self.projector is None:
            return self.distance(made, wanted, masks, self.channels)
        mapped = self.projector(made, wanted)
        if torch.is_grad_enabled():
            self.projector.see(made, lambda seen: self.weight * self.distance(seen, wanted, masks, self.channels))
        return self.distance(mapped, wanted, masks, self.channels)

    def _with_channels_second(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give maps as the distance and the projector take them; what has fewer axes is the very one."""
        axes = {name: self.teacher.channel_axis(name, one) if one.dim() == 4 else 1 for name, one in features.items()}
        return {name: one if axes[name] == 1 else one.movedim(axes[name], 1) for name, one in features.items()}

    def _clean_rows(self) -> Tensor | None:
        """Number the samples that no hold around this one has changed; None for all."""
        clean = [one.clean for one in self.around if one.clean is not None]
        return torch.stack(clean).all(0).nonzero().flatten() if clean else None

    def after_step(self, model: nn.Module) -> None:
        """Count the step, and let the projector take its own."""
        self.steps += 1
        if self.projector is not None:
            self.projector.step(next(model.parameters()).device)

    def finish(self, model: nn.Module, data: StudentData) -> None:
        """Warn if no sample of the run was compared."""
        if self.passed_over and not self.compared:
            warnings.warn(
                f"Features of the student were to be held to the teacher's, but no sample of {self.passed_over} "
                "batches was left clean by the strategies beside it: none was compared. Have them change fewer. "
                "(remos_hf)",
                stacklevel=2,
            )

    def details(self) -> dict[str, Any]:
        """Give the steps, the batches that were compared, the layers and the distance."""
        if not self.word:
            return {}
        told = {"steps": self.steps, "batches_compared": self.compared, "layers": list(self.layers)}
        told["weight"] = self.weight
        return {self.word: {**told, "distance": {**asdict(self.distance), "mean_over": list(self.distance.mean_over)}}}

    def state_dict(self) -> dict[str, Any]:
        """Give the steps, the channels' weights and the projector."""
        projector = {} if self.projector is None else {"projector": self.projector.state_dict()}
        batches = {"compared": self.compared, "passed_over": self.passed_over}
        return {"steps": self.steps, **batches, "channels": self.channels, **projector}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from them."""
        self.steps, self.channels = state["steps"], state["channels"]
        self.compared, self.passed_over = state.get("compared", 0), state.get("passed_over", 0)
        if self.projector is not None:
            self.projector.load_state_dict(state["projector"])


def _check_gradient(modules: Mapping[str, nn.Module], made: Mapping[str, Tensor]) -> None:
    for name, module in modules.items():
        if name not in made:
            raise UnsupportedModelError(
                f"'{name}' did not run with the student, so it has no feature to compare. Name modules that run: "
                "layers=(...)."
            )
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if trained and torch.is_grad_enabled() and not made[name].requires_grad:
            raise ValueError(
                f"Features are compared that the student makes while it trains, but those of '{name}' came "
                "without a gradient, as reentrant gradient checkpointing makes them. Train without "
                'gradient_checkpointing, or with gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
