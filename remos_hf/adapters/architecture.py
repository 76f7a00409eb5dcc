"""The architecture that a teacher's config names, built without weights, and which stored tensor becomes which of them.

On the meta device a model has names and shapes but no values, so a config that lies about its sizes costs nothing.
"""

import copy
import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel

from remos_hf.adapters.teacher_files import FLOATING, RANKABLE, Checkpoint, StoredTensor, wrong_dtype
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.randomness import seeded

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )
except ImportError:  # transformers 4, where files name tensors as models do, but for the base model's prefix
    get_model_conversion_mapping = None

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placed:
    """Where the tensors of a checkpoint go in a model.

    Attributes:
        tensors: By name of a parameter or buffer (the first of tied ones), every stored tensor that it is loaded from
            as it is; more than one if tied modules were all saved.
        experts: By name of a stack of experts, for each expert the stored tensors that make up its rows, in order.
        converted: By the same names, tensors that are joined, cut or transposed on the way in any other manner.
        unknown: Stored tensors for which the model has no place.
    """

    tensors: dict[str, tuple[StoredTensor, ...]]
    experts: dict[str, tuple[tuple[StoredTensor, ...], ...]]
    converted: dict[str, tuple[StoredTensor, ...]]
    unknown: tuple[StoredTensor, ...]

    def sources(self, name: str) -> tuple[StoredTensor, ...]:
        """Give all stored tensors that go into a parameter or buffer."""
        pieces = (piece for expert in self.experts.get(name, ()) for piece in expert)
        return (*self.tensors.get(name, ()), *pieces, *self.converted.get(name, ()))


def on_meta(config: PretrainedConfig, kind: Any = None) -> PreTrainedModel:  # noqa: ANN401 - an Auto class has no type
    """Build an architecture without weights and without its author's programs.

    Args:
        config: The teacher's; it stays as it is.
        kind: A model class, or an Auto class that finds one. None takes the class that the checkpoint was saved as.

    Raises:
        UnsupportedModelError: transformers has no such model, or the config does not describe one.
    """
    kind = saved_class(config) if kind is None else kind
    try:
        with torch.device("meta"), seeded(None, devices=()):
            own, eager = copy.deepcopy(config), {"attn_implementation": "eager"}  # a config may ask for a kernel
            if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
                model = kind._from_config(own, **eager)
            else:
                model = kind.from_config(own, trust_remote_code=False, **eager)
            model.tie_weights()
    except Exception as error:
        raise UnsupportedModelError(
            f"{kind.__name__} cannot be built from the teacher's config.json ({first_line(error)}). Programs that come "
            "with a checkpoint (auto_map) are not run."
        ) from error
    return model


def saved_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Find the class that a checkpoint was saved as, among those of transformers.

    Raises:
        UnsupportedModelError: There is none.
    """
    names = config.architectures
    named = isinstance(names, list) and names
    found = getattr(transformers, str(names[0]), None) if named else MODEL_MAPPING.get(type(config), None)
    fits = isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is not None
    if not fits or not isinstance(config, found.config_class):
        raise UnsupportedModelError(
            f"config.json names the architecture {names!r} for a config of type {type(config).__name__}, but "
            f"transformers {transformers.__version__} does not have such a model. Programs that come with a checkpoint "
            "(auto_map) are not run."
        )
    return found


def settled_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """Give the type that `from_pretrained(dtype="auto")` loads a checkpoint in: the config's, or its first tensor's."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = (tensor.dtype for tensor in checkpoint.tensors_in(checkpoint.paths[0]) if tensor.dtype in FLOATING)
    return FLOATING[next(stored, "F32")]


def place_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> Placed:
    """Find where each stored tensor goes.

    Args:
        model: The architecture; it needs no values.
        checkpoint: The files.

    Raises:
        UnsupportedModelError: Two tensors claim one place.
    """
    held, first = _held(model), first_names(model)
    taken: dict[str, str] = {}
    tensors: dict[str, list[StoredTensor]] = {}
    joined: dict[str, list[tuple[str, Any, StoredTensor]]] = {}
    unknown = []
    for name, (place, pattern, converter) in _names_on_load(model, checkpoint.tensors).items():
        if place not in held:
            unknown.append(checkpoint.tensors[name])
        elif converter is not None:
            for target in converter.target_patterns:  # the first is in the place's name; a tensor that is cut has more
                one = place.replace(converter.target_patterns[0], target)
                joined.setdefault(first.get(id(held.get(one)), one), []).append(
                    (pattern, converter, checkpoint.tensors[name])
                )
        elif place in taken:
            raise UnsupportedModelError(
                f"Both '{taken[place]}' and '{name}' would be loaded as '{place}', and nothing says which one counts. "
                "Load the checkpoint, save it again, and take that."
            )
        else:
            taken[place] = name
            tensors.setdefault(first[id(held[place])], []).append(checkpoint.tensors[name])
    experts = {name: _stacked(parts) for name, parts in joined.items() if _is_stack(parts[0][1])}
    return Placed(
        {name: tuple(found) for name, found in tensors.items()},
        experts,
        {name: tuple(part[2] for part in parts) for name, parts in joined.items() if name not in experts},
        tuple(unknown),
    )


def _is_stack(converter: Any) -> bool:  # noqa: ANN401 - a WeightConverter, which transformers 4 does not have
    """Whether tensors are stacked as experts, each joined from several by its rows at most."""
    steps = [(type(step), step.dim) for step in converter.operations if hasattr(step, "dim")]
    known = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    return len(steps) == len(converter.operations) and steps in known


def _stacked(parts: list[tuple[str, Any, StoredTensor]]) -> tuple[tuple[StoredTensor, ...], ...]:
    """Sort tensors by expert, and within it in the order in which they are joined."""
    by_pattern = [[tensor for found, _, tensor in parts if found == pattern] for pattern in parts[0][1].source_patterns]
    return tuple(tuple(row) for row in itertools.zip_longest(*(column for column in by_pattern if column)))


def check_fits(model: PreTrainedModel, placed: Placed, *, any_head: bool = False) -> None:
    """Refuse stored tensors of a type or a shape that the architecture's parameters do not have.

    Args:
        model: The architecture.
        placed: Where the tensors go.
        any_head: Whether a head of another shape will be replaced.

    Raises:
        UnsupportedModelError: Names the tensor and its file.
    """
    head = head_names(model)
    for name, parameter in model.named_parameters():
        in_head = name in head
        for tensor in placed.sources(name):
            if tensor is not None and tensor.dtype not in (FLOATING if in_head else RANKABLE):
                raise wrong_dtype(tensor.name, tensor.path, tensor.dtype)
        for tensor in placed.tensors.get(name, ()):
            if tensor.shape != parameter.shape and not (in_head and any_head):
                raise _misshapen(f"'{tensor.name}' in {tensor.path}", tensor.shape, name, parameter)
        if name in placed.experts:
            _check_stack(placed.experts[name], name, parameter)


def _check_stack(experts: tuple[tuple[StoredTensor, ...], ...], name: str, parameter: Tensor) -> None:
    for number, pieces in enumerate(experts):
        whole = all(piece is not None and piece.shape[1:] == parameter.shape[2:] for piece in pieces)
        if not whole or sum(piece.shape[0] for piece in pieces) != parameter.shape[1]:
            found = [tuple(piece.shape) if piece is not None else "missing" for piece in pieces]
            raise _misshapen(f"Expert {number} of '{name}'", found, f"{name}[{number}]", parameter[0])
    if len(experts) != len(parameter):
        first = experts[0][0]
        raise _misshapen(f"The stack that '{first.name}' in {first.path} begins", (len(experts), ...), name, parameter)


def _misshapen(what: str, found: Any, name: str, parameter: Tensor) -> UnsupportedModelError:  # noqa: ANN401
    shape = tuple(found) if isinstance(found, torch.Size) else found
    return UnsupportedModelError(
        f"{what} has the shape {shape}, but config.json makes '{name}' of shape {tuple(parameter.shape)}. Fetch the "
        "checkpoint again, or mend its config.json."
    )


def check_complete(
    model: PreTrainedModel,
    missing: Iterable[str],
    folder: Any,  # noqa: ANN401 - any path
    *,
    any_head: bool = False,
) -> None:
    """Refuse a body that is not all there: what is missing would be drawn at random. A missing head is told.

    Args:
        model: The architecture.
        missing: Names of parameters and buffers that no file holds, or holds in another shape.
        folder: The teacher's, for the text.
        any_head: Whether the head will be replaced, so that a missing one is what was to be expected.

    Raises:
        UnsupportedModelError: Names the first one.
    """
    head = head_names(model)
    missing = sorted(missing)
    body = [name for name in missing if name not in head and not _is_made(model, name)]
    if body:
        more = f" and {len(body) - 1} more" if len(body) > 1 else ""
        raise UnsupportedModelError(
            f"{folder} lacks '{body[0]}'{more} of {type(model).__name__}, or holds it in another shape: it would be "
            "drawn at random, and the teacher would not be the one that was published. Fetch the checkpoint again, or "
            "mend its config.json."
        )
    if missing:
        level = logging.INFO if any_head else logging.WARNING
        logger.log(level, "%s lacks the head (%s): it starts fresh.", folder, ", ".join(missing[:3]))


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse NaN and infinity in any parameter: a bias, a norm, a weight outside the slice.

    Args:
        model: A model with values.
        name: The teacher's, for the text.

    Raises:
        NonFiniteError: Names the parameter.
    """
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point():
            low, high = (float(end) for end in torch.aminmax(parameter.detach()))
            if not max(-low, high) < float("inf"):
                raise NonFiniteError(
                    f"'{parameter_name}' of {name} holds NaN or infinity. The teacher's checkpoint is broken or "
                    "overflowed in its dtype; take a sound one."
                )


def missing_tensors(model: PreTrainedModel, placed: Placed) -> list[str]:
    """Name what the architecture holds and saves, but no file does; tied tensors count once.

    Whole numbers (positions, counters) are made by the architecture itself, so files may lack them.
    """
    known, first = model.state_dict(keep_vars=True), first_names(model)
    needed = {first[id(tensor)] for tensor in known.values() if id(tensor) in first and tensor.is_floating_point()}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = sorted(needed - placed.tensors.keys() - placed.experts.keys() - placed.converted.keys())
    return [name for name in missing if not any(pattern.search(name) for pattern in optional)]


def first_names(model: nn.Module) -> dict[int, str]:
    """Name each parameter and buffer, by its id while the model lives: of tied ones, the first name."""
    names: dict[int, str] = {}
    for name, tensor in _held(model).items():
        names.setdefault(id(tensor), name)
    return names


def head_names(model: nn.Module) -> frozenset[str]:
    """Name the parameters and buffers of the head, which a student replaces. What the body holds too is none of it."""
    adapter = adapter_for(model)
    held = _held(model).items()
    below = tuple(f"{name}." for name in adapter.head)
    inside = {name for name, _ in held if name.startswith(below) or name in adapter.head}
    body = {id(tensor) for name, tensor in held if name not in inside}
    return frozenset(name for name, tensor in held if name in inside and id(tensor) not in body)


def first_line(error: Exception) -> str:
    """Give an error's type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _held(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _is_made(model: nn.Module, name: str) -> bool:
    """Whether a missing buffer holds whole numbers, which the architecture makes itself."""
    return not dict(model.named_buffers()).get(name, torch.empty(0)).is_floating_point()


def _names_on_load(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, str | None, Any]]:
    """Say which parameter each tensor is loaded as, and by which pattern of which converter it is changed, if it is."""
    known, prefix = model.state_dict(), model.base_model_prefix
    if get_model_conversion_mapping is None:
        return {name: (_without_conversion(model, name, known), None, None) for name in names}
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = {}
    for name in sorted(names, key=dot_natural_key):  # renamings may remember what came before
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if parameter not in known and name in known:
            parameter, pattern = rename_source_key(name, [], [], prefix, known)
        found[name] = (parameter, pattern, by_pattern.get(pattern))
    return found


def _without_conversion(model: PreTrainedModel, name: str, known: Mapping[str, Tensor]) -> str:
    prefix = model.base_model_prefix
    renamed, _ = model._fix_state_dict_key_on_load(name)  # gamma and beta of old norms
    for candidate in (renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}."), name):
        if candidate in known:
            return candidate
    return name
