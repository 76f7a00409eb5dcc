"""RelevantSlice: the weights that the student keeps, one bit each, and how they were chosen."""

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import CorruptFileError, LayerMismatchError, TeacherMismatchError
from remos_hf.layers import Layer, largest_magnitude, rankable_layers, weights_hash
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.sidecar_file import check_fields, file_in, is_count, is_hash, read_tensors, write_tensors
from remos_hf.slicing.competition import Account, competing_layers
from remos_hf.slicing.ordinal import Selection, pack, unpack
from remos_hf.slicing.rules import RULES, Rule

logger = logging.getLogger(__name__)

SLICE_FILE = "remos_slice.safetensors"
_FORMAT = "remos_slice/1"
_LONGEST_NAME = 200
_MOST_AXES = 8
# Difference between the share of weights asked for and the share kept that is worth a warning.
_FAR = 0.005


class KeptWeights(Mapping[str, Tensor]):
    """Bool tensors by parameter name, True = kept, held as one bit a weight and unpacked when asked for."""

    def __init__(self, bits: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        self.bits, self.shapes = dict(bits), {name: torch.Size(shape) for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Unpack the kept weights of a parameter. Bool, shape of the weight, on the CPU."""
        return unpack(self.bits[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over parameter names, in the teacher's order."""
        return iter(self.bits)

    def __len__(self) -> int:
        """Count parameters."""
        return len(self.bits)

    def __eq__(self, other: object) -> bool:
        """Compare names, shapes and bits."""
        if not isinstance(other, KeptWeights):
            return NotImplemented
        same_names = self.shapes == other.shapes
        return same_names and all(torch.equal(bits, other.bits[name]) for name, bits in self.bits.items())

    __hash__ = None

    def num_kept(self, name: str) -> int:
        """Count the kept weights of one parameter."""
        return int(self[name].sum())


@dataclass(frozen=True)
class RelevantSlice:
    """The weights a student keeps from its teacher.

    Attributes:
        kept: Bool tensor of the weight's shape by parameter name, True = kept.
        slice_ratio: Share that was asked for.
        rule: "remos", "top_magnitude", "mag_prune", "random", or the name of a function of the user's own.
        scope: "model" if all weights competed, "layer" if each layer was cut by itself.
        ties: "mean", or "artifact" for the artifact's traversal order.
        seed: Seed of the random rule.
        num_kept: Weights kept.
        tie_group: Weights that tied at the threshold and went together (of the largest such group).
        teacher_hash: `weights_hash` of the teacher, over the sliced weights.
        account: How much of the body competed, and what did not and why; None in slices of older versions.
    """

    kept: Mapping[str, Tensor]
    slice_ratio: float
    rule: str = "remos"
    scope: str = "model"
    ties: str = "mean"
    seed: int = 0
    num_kept: int = field(default=-1)
    tie_group: int = 1
    teacher_hash: str = ""
    account: Account | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Pack plain bool tensors."""
        if not isinstance(self.kept, KeptWeights):
            object.__setattr__(self, "kept", _packed(self.kept))
        if self.num_kept < 0:
            object.__setattr__(self, "num_kept", sum(self.kept.num_kept(name) for name in self.kept))

    @property
    def num_weights(self) -> int:
        """Weights that competed."""
        return sum(shape.numel() for shape in self.kept.shapes.values())

    @property
    def share_kept(self) -> float:
        """Share of the weights that is kept; differs from `slice_ratio` by less than a weight, or by a tie group."""
        return self.num_kept / self.num_weights

    def share_by_parameter(self) -> dict[str, float]:
        """Share kept of each parameter."""
        return {name: self.kept.num_kept(name) / shape.numel() for name, shape in self.kept.shapes.items()}

    def check_matches(self, layers: Mapping[str, Layer], *, verify_teacher: bool = True) -> dict[str, Layer]:
        """Find the slice's layers in a model.

        Args:
            layers: The model's sliceable layers.
            verify_teacher: Whether the weights must be the teacher's, bit for bit.

        Returns:
            The layers by parameter name, in the slice's order.

        Raises:
            LayerMismatchError: A parameter is missing or has another shape.
            TeacherMismatchError: The weights are not the teacher's.
        """
        by_parameter = {layer.key: layer for layer in layers.values()}
        for name, shape in self.kept.shapes.items():
            if name not in by_parameter:
                raise LayerMismatchError(
                    f"The slice holds '{name}', but the model has no such weight outside its head. "
                    "It was made from another model: choose a slice of this teacher."
                )
            present = by_parameter[name].shape
            if present != shape:
                raise LayerMismatchError(
                    f"The slice holds '{name}' of shape {tuple(shape)}, but the model's has {tuple(present)}. "
                    "It was made from another model: choose a slice of this teacher."
                )
        chosen = {name: by_parameter[name] for name in self.kept}
        if verify_teacher and not self.teacher_hash:
            logger.warning("The slice does not say which teacher it was made from, so the teacher was not checked.")
        elif verify_teacher:
            found = weights_hash({layer.name: layer for layer in chosen.values()})
            if found != self.teacher_hash:
                raise TeacherMismatchError(
                    f"The slice was made from a teacher with hash {self.teacher_hash[:12]}..., but these weights have "
                    f"{found[:12]}... They come from another teacher, another dtype, or were trained or reset since: "
                    "load the teacher that the slice names, or pass verify_teacher=False if you know better."
                )
        return chosen

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `remos_slice.safetensors` into a folder, beside and renamed; one bit a weight.

        Returns:
            The file written.
        """
        metadata = {
            "shapes": {name: list(shape) for name, shape in self.kept.shapes.items()},
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
            **({"account": self.account.to_dict()} if self.account is not None else {}),
        }
        return write_tensors(Path(folder) / SLICE_FILE, self.kept.bits, _FORMAT, metadata)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike,
        *,
        teacher: nn.Module | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "RelevantSlice":
        """Read the slice beside a student.

        Args:
            folder_or_repo_id: A folder that holds `remos_slice.safetensors`, or a repository on the Hub.
            teacher: If given, the model that the slice must have been made from.
            revision: Branch, tag or commit on the Hub.
            token: Token for the Hub; the stored one if None.

        Raises:
            FileNotFoundError: The folder holds no slice.
            CorruptFileError: The file is truncated or tampered with.
            TeacherMismatchError: The slice was made from another teacher.
            LayerMismatchError: It was made from another architecture.
        """
        path = file_in(folder_or_repo_id, SLICE_FILE)
        if not Path(folder_or_repo_id).exists() and is_repo_id(str(folder_or_repo_id)):
            path = Path(hf_hub_download(str(folder_or_repo_id), SLICE_FILE, revision=revision, token=token))
        bits, metadata = read_tensors(path, _FORMAT, ("shapes", *_PLAIN_FIELDS), optional=("account",))
        check_fields(path, metadata, _EXPECTED)
        shapes = metadata.pop("shapes")
        if "account" in metadata:
            metadata["account"] = _account_in(path, metadata["account"])
        _check_sizes(path, bits, shapes)
        kept = KeptWeights({name: bits[name] for name in shapes}, shapes)
        counted = sum(kept.num_kept(name) for name in kept)
        if counted != metadata["num_kept"]:
            raise CorruptFileError(f"{path} says that {metadata['num_kept']} weights are kept, but keeps {counted}.")
        found = cls(kept, **metadata)
        if teacher is not None:
            found.check_matches(adapter_for(teacher, ()).layers(embeddings=True))
        return found


_PLAIN_FIELDS = ("slice_ratio", "rule", "scope", "ties", "seed", "num_kept", "tie_group", "teacher_hash")
_EXPECTED = {
    "slice_ratio": ("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1),
    "rule": ("the name of a rule", lambda value: isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME),
    "scope": ("'model' or 'layer'", lambda value: value in ("model", "layer")),
    "ties": ("'mean' or 'artifact'", lambda value: value in ("mean", "artifact")),
    "seed": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "num_kept": ("a whole number", is_count),
    "tie_group": ("a whole number", is_count),
    "teacher_hash": ("64 hex digits, or nothing", is_hash),
}


def choose_slice(
    teacher: nn.Module,
    profile: CoverageProfile | None = None,
    *,
    slice_ratio: float,
    rule: Literal["remos", "top_magnitude", "mag_prune", "random"] | Rule = "remos",
    scope: Literal["model", "layer"] = "model",
    ties: Literal["mean", "artifact"] = "mean",
    seed: int = 0,
    head: tuple[str, ...] | None = None,
    embeddings: bool = False,
    ran: Iterable[str] | None = None,
    progress: bool = True,
) -> RelevantSlice:
    """Choose the weights that the student keeps.

    Frozen weights, weights tied to the head and weights of adapters do not compete, under any rule; a log line says
    how much of the body does, and a warning if it is less than half.

    Args:
        teacher: The model whose weights are ranked, before any wrapping; it is only read.
        profile: Its coverage on the student's data. Needed by "remos"; the layers in it compete. Without one, all
            sliceable layers compete.
        slice_ratio: Share of the weights to keep, in (0, 1]. The artifact's prune_ratio is 1 - slice_ratio.
        rule: "remos" keeps what the task uses and the teacher put little into. "top_magnitude", "mag_prune" and
            "random" reset the largest, the smallest, and random weights: the comparisons. Or a function of your own,
            (layers, profile, share to keep, seed) to `Selection`.
        scope: "model" ranks all weights together. "layer" ranks and cuts each layer by itself.
        ties: "mean": equal coverage or magnitude share their mean rank. "artifact": the artifact's traversal order
            and threshold, for reproduction of the remos rule.
        seed: Seed of the random rule.
        head: The modules that are never sliced; found if None. With a profile, what it covers competes.
        embeddings: Without a profile, whether the rows of the input embeddings compete too.
        ran: Names of the layers that run on the student's data, as `profile.input_counts` has them: for rules without
            a profile, so that they compete over the same layers. None: all compete.
        progress: Show bars on work longer than two seconds.

    Returns:
        The slice. It depends on the arguments alone: same weights, profile and config, same bits.

    Raises:
        ValueError: An argument is out of range.
        LayerMismatchError: The profile was taken of another architecture.
        TeacherMismatchError: The profile was taken of other weights.
        NonFiniteError: A weight is NaN or infinite.
        UnsupportedModelError: The weights are on the meta device or sharded, or none of them can compete.

    Source:
        ReMoS, ICSE 2022, section 4.2; artifact nc_weight_rank_pruner.py:53-156.
    """
    check_choice(slice_ratio, rule, scope, ties, profile)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed is a whole number, but got {seed!r}. A recipe's seed of None stands for the run's.")
    competing, account = competing_layers(teacher, profile, head=head, embeddings=embeddings, ran=ran)
    profiled = competing
    if profile is not None and len(profile.input_counts) != len(competing):
        layers = adapter_for(teacher, ()).layers(embeddings=True)
        profiled = {name: layer for name, layer in layers.items() if name in profile.input_counts}
    return choose_among(
        competing,
        profile,
        slice_ratio=slice_ratio,
        rule=rule,
        scope=scope,
        ties=ties,
        seed=seed,
        progress=progress,
        profiled=profiled,
        account=account,
    )


def choose_among(
    layers: Mapping[str, Layer],
    profile: CoverageProfile | None,
    *,
    slice_ratio: float,
    rule: str | Rule,
    scope: str,
    ties: str,
    seed: int,
    progress: bool,
    profiled: Mapping[str, Layer] | None = None,
    account: Account | None = None,
) -> RelevantSlice:
    """Choose the slice of these layers, as `choose_slice` does, which says what the arguments mean.

    Each pass asks for one layer's weight at a time and lets go of it, so weights may be read as they are asked for.
    `profiled` are the layers that the profile was taken of, if they are others than those that compete; `account` is
    told and recorded.

    Raises:
        TeacherMismatchError: The profile was taken of other weights.
        NonFiniteError: A weight is NaN or infinite.
        UnsupportedModelError: The weights are on the meta device or sharded, or none of them can be ranked.
        LayerMismatchError: There is no layer.
    """
    layers = rankable_layers(layers)
    teacher_hash = weights_hash(layers)
    if profile is not None and profile.teacher_hash:
        others = profiled is not None and profiled.keys() != layers.keys()
        _check_teacher(profile, weights_hash(profiled) if others else teacher_hash)
    if account is not None:
        account.tell()
    ordered = list(layers.values())
    selections = []
    for number, competition in enumerate([ordered] if scope == "model" else [[layer] for layer in ordered]):
        selections.append(_run(rule, competition, profile, slice_ratio, ties, seed + number, progress))
    bits = [bits for selection in selections for bits in selection.bits]
    relevant = RelevantSlice(
        KeptWeights(
            {layer.key: kept for layer, kept in zip(ordered, bits, strict=True)},
            {layer.key: layer.shape for layer in ordered},
        ),
        slice_ratio,
        rule if isinstance(rule, str) else rule_name(rule),
        scope,
        ties,
        seed,
        sum(selection.num_kept for selection in selections),
        max(selection.tie_group for selection in selections),
        teacher_hash,
        account,
    )
    _tell_if_far(relevant)
    return relevant


def rule_name(rule: Rule) -> str:
    """Name a rule of the user's own, for records."""
    return getattr(rule, "__name__", type(rule).__name__)


def _run(
    rule: str | Rule,
    layers: list[Layer],
    profile: CoverageProfile | None,
    share: float,
    ties: str,
    seed: int,
    progress: bool,
) -> Selection:
    if isinstance(rule, str):
        options = {"progress": progress} | ({"ties": ties} if ties != "mean" else {})
        return RULES[rule](layers, profile, share, seed, **options)
    largest_magnitude({layer.name: layer for layer in layers})  # whatever the rule looks at
    selection = rule(layers, profile, share, seed)
    if not isinstance(selection, Selection):
        raise TypeError(f"A rule gives a Selection (Selection.of packs one), but got {type(selection).__name__}.")
    if [bits.numel() for bits in selection.bits] != [-(-layer.numel // 8) for layer in layers]:
        raise ValueError(
            f"{rule_name(rule)} was given {len(layers)} layers, and must keep or give up each weight of each of them, "
            f"but its selection has {[bits.numel() for bits in selection.bits][:9]} bytes of bits, not "
            f"{[-(-layer.numel // 8) for layer in layers][:9]}."
        )
    counted = Selection.of([unpack(bits, layer.shape) for bits, layer in zip(selection.bits, layers, strict=True)])
    return Selection(counted.bits, counted.num_kept, selection.tie_group)


def _check_teacher(profile: CoverageProfile, found: str) -> None:
    if profile.teacher_hash != found:
        raise TeacherMismatchError(
            f"The profile was taken of a teacher with hash {profile.teacher_hash[:12]}..., but these weights have "
            f"{found[:12]}... Profile this teacher, before it is trained or reset."
        )


def _tell_if_far(relevant: RelevantSlice) -> None:
    total, asked = relevant.num_weights, relevant.slice_ratio
    if abs(relevant.num_kept - asked * total) <= max(_FAR * total, len(relevant.kept)):  # a weight a layer: rounding
        return
    why = ""
    if relevant.tie_group > 1:
        why = (
            f": {relevant.tie_group:,} weights tie at the threshold and stay or go together, as the zeros of a teacher "
            "that is sparse already do"
        )
    warnings.warn(
        f"{asked:.1%} of the weights were to be kept, but {relevant.rule} keeps {relevant.share_kept:.1%}{why}.",
        stacklevel=4,
    )


def check_slice_ratio(slice_ratio: float) -> None:
    """Refuse a share that is not in (0, 1]."""
    number = isinstance(slice_ratio, Real) and not isinstance(slice_ratio, bool)
    if not number or not 0 < slice_ratio <= 1:
        raise ValueError(
            f"slice_ratio is the share of weights kept, between 0 and 1, but got {slice_ratio!r}. "
            "The artifact's prune_ratio is 1 - slice_ratio."
        )


def check_choice(slice_ratio: float, rule: str | Rule, scope: str, ties: str, profile: CoverageProfile | None) -> None:
    """Refuse arguments that no model could be sliced with.

    Raises:
        ValueError: One is out of range, or does not go with another.
        TypeError: The profile is none.
    """
    check_slice_ratio(slice_ratio)
    if profile is not None and not isinstance(profile, CoverageProfile):
        raise TypeError(
            f"profile is what profile_coverage(teacher, dataloader) gives, but got {type(profile).__name__}: profile "
            "the student's data first."
        )
    if not callable(rule) and rule not in RULES:
        raise ValueError(f"rule is one of {', '.join(RULES)}, or a function, but got {rule!r}.")
    if scope not in ("model", "layer"):
        raise ValueError(f"scope is 'model' or 'layer', but got {scope!r}.")
    if ties not in ("mean", "artifact"):
        raise ValueError(f"ties is 'mean' or 'artifact', but got {ties!r}.")
    if ties == "artifact" and rule != "remos":
        raise ValueError(f"ties='artifact' reproduces the artifact's remos rule; rule {rule!r} has ties='mean' only.")
    if rule == "remos" and profile is None:
        raise ValueError("rule 'remos' ranks coverage, so it needs a profile: profile_coverage(teacher, dataloader).")


def _packed(kept: Mapping[str, Tensor]) -> KeptWeights:
    wrong = [name for name, bits in kept.items() if bits.dtype != torch.bool]
    if wrong:
        raise TypeError(f"kept holds bool tensors, True = kept, but '{wrong[0]}' is {kept[wrong[0]].dtype}.")
    bits = {name: pack(tensor) for name, tensor in kept.items()}
    return KeptWeights(bits, {name: tensor.shape for name, tensor in kept.items()})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_sizes(path: Path, bits: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> None:
    if not isinstance(shapes, dict) or not shapes or shapes.keys() != bits.keys():
        raise CorruptFileError(f"{path} does not hold bits for just the weights whose shapes it gives.")
    for name, shape in shapes.items():
        whole = isinstance(shape, list) and 0 < len(shape) <= _MOST_AXES and all(map(is_count, shape))
        expected = (math.prod(shape) + 7) // 8 if whole else None
        if bits[name].shape != (expected,) or bits[name].dtype != torch.uint8:
            found = f"{list(bits[name].shape)} of {bits[name].dtype}"
            raise CorruptFileError(
                f"{path} should hold {expected} bytes of bits for '{name}' of shape {shape}, but holds {found}."
            )


def _account_in(path: Path, values: object) -> Account:
    try:
        return Account.from_dict(values)
    except ValueError as error:
        raise CorruptFileError(f"{path} is not as remos_hf writes it. {error}") from error


def is_repo_id(text: str) -> bool:
    """Whether a text can only be the id of a repository on the Hub, if it is no folder that exists."""
    return text.count("/") <= 1 and not text.startswith((".", "/", "~"))
