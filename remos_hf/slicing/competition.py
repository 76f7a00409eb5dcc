"""Which weights of a model compete, the same for every rule, and an account of those that do not."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn
from transformers.pytorch_utils import Conv1D

from remos_hf.adapters.transformers_models import adapter_for, own_head
from remos_hf.errors import LayerMismatchError, UnsupportedModelError
from remos_hf.layers import Layer, adapter_parts, is_below, parameters_below, rankable_layers, why_not_rankable
from remos_hf.profiling.coverage import CoverageProfile

logger = logging.getLogger(__name__)

# Why a weight does not compete. The words stand in records and cards.
FROZEN = "frozen"
TIED = "tied to the head"
ADAPTER = "of an adapter inside the model"
UNRANKABLE = "without a magnitude to rank"
NEVER_RAN = "never ran on the data"
EMBEDDING = "embedding rows"
UNKNOWN = "of a kind whose neurons are not known"

_LOW_SHARE = 0.5


@dataclass(frozen=True)
class Account:
    """How much of a model's body competes for a slice.

    The body's weights are its parameters of two or more axes outside the head, biases not among them, tied ones once.

    Attributes:
        competing: Weights that compete.
        total: Weights of the body.
        left_out: Weights that do not compete, by the reason.
        examples: The first parameter left out for each reason.
    """

    competing: int
    total: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the body's weights that compete. In [0, 1]."""
        return self.competing / self.total if self.total else 0.0

    @property
    def is_low(self) -> bool:
        """Whether less than half of the body competes, embedding rows that were not asked for left aside."""
        return self.competing < _LOW_SHARE * (self.total - self.left_out.get(EMBEDDING, 0))

    def __str__(self) -> str:
        """Tell it in one sentence."""
        parts = [f"{reason} {count:,} ('{self.examples[reason]}')" for reason, count in self.left_out.items()]
        left_out = f"; left out: {', '.join(parts)}" if parts else ""
        return f"{self.competing:,} of {self.total:,} body weights compete ({100 * self.share:.1f} %){left_out}"

    def tell(self) -> None:
        """Log the account; warn if less than half of the body competes or a layer has no magnitude to rank."""
        if self.is_low:
            warnings.warn(f"Less than half of the body can be given up: {self}.", stacklevel=3)
        elif UNRANKABLE in self.left_out:
            warnings.warn(f"{self}.", stacklevel=3)
        else:
            logger.info("%s.", self)

    def to_dict(self) -> dict[str, object]:
        """Give the account as JSON values."""
        return {
            "competing": self.competing,
            "total": self.total,
            "left_out": dict(self.left_out),
            "examples": dict(self.examples),
        }

    @classmethod
    def from_dict(cls, values: object) -> "Account":
        """Take the account from what `to_dict` gave.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(values, dict) or values.keys() != {"competing", "total", "left_out", "examples"}:
            raise ValueError(f"An account of competing weights has four fields, but got {values!r:.200}.")
        left_out, examples = values["left_out"], values["examples"]
        if not (isinstance(left_out, dict) and isinstance(examples, dict) and left_out.keys() == examples.keys()):
            raise ValueError("An account of competing weights gives a number and an example for each reason.")
        counts = [values["competing"], values["total"], *left_out.values()]
        if not all(type(count) is int and count >= 0 for count in counts) or counts[1] != counts[0] + sum(counts[2:]):
            raise ValueError(f"The numbers of an account of competing weights add up, but got {counts[:9]}.")
        if not all(isinstance(example, str) for example in examples.values()):
            raise ValueError("The examples in an account of competing weights are names.")
        return cls(**values)


def competing_layers(
    model: nn.Module,
    profile: CoverageProfile | None = None,
    *,
    head: tuple[str, ...] | None = None,
    embeddings: bool = False,
    ran: Iterable[str] | None = None,
) -> tuple[dict[str, Layer], Account]:
    """Find the layers whose weights compete, the same ones for every rule.

    Frozen weights, weights tied to the head and the own weights of adapters never do. A model in which nothing trains
    is one that is only read, so there being frozen says nothing.

    Args:
        model: The teacher, or the student that was just started from it. Its weights are not read, so they may be on
            the meta device.
        profile: Its coverage: only profiled layers compete, embeddings among them if they were profiled.
        head: Modules that are never sliced; found if None.
        embeddings: Without a profile, whether the rows of the input embeddings compete too.
        ran: Names of the layers that run on the student's data (`Layer.name`), for rules that take no profile;
            the keys of any profile's `input_counts` say it. None: not known, all compete.

    Returns:
        Layers by name, in the model's order, and the account.

    Raises:
        LayerMismatchError: The profile was taken of another architecture, or there is no layer.
        UnsupportedModelError: Every layer is left out.
    """
    if profile is None:
        adapter = adapter_for(model, head)
        head, layers = adapter.head, adapter.layers(embeddings=embeddings)
        ran = layers if ran is None else frozenset(ran)
    else:
        layers = adapter_for(model, ()).layers(embeddings=True)
        profile.check_matches(layers)
        # A profile that saw into the head was taken with another one: what it saw competes.
        head = own_head(model) if head is None else head
        head = tuple(root for root in head if not any(is_below(name, (root,)) for name in profile.input_counts))
        layers = {name: layer for name, layer in layers.items() if not is_below(name, head)}
        ran = profile.input_counts.keys() & (profile.input_counts.keys() if ran is None else frozenset(ran))
    why_not = partial(_why_not, ran=ran, spared=parameters_below(model, head), trains=_trains(model))
    reasons = {name: why_not(layer) for name, layer in layers.items()}
    competing = {name: layer for name, layer in layers.items() if not reasons[name]}
    account = _account(model, head, layers, reasons)
    if not competing:
        _refuse(layers, reasons, account)
    return competing, account


def _trains(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def _why_not(layer: Layer, *, ran: Iterable[str], spared: frozenset[int], trains: bool) -> str:
    if id(layer.parameter) in spared:
        return TIED
    if layer.is_embedding and layer.name not in ran:
        return EMBEDDING
    if why_not_rankable(layer):
        return UNRANKABLE
    if trains and not layer.parameter.requires_grad:
        return FROZEN
    if layer.name not in ran:
        return NEVER_RAN
    return ""


def _account(
    model: nn.Module, head: tuple[str, ...], layers: Mapping[str, Layer], reasons: Mapping[str, str]
) -> Account:
    """Count every weight of the body once, by what was decided about it."""
    views: dict[int, list[Layer]] = {}
    for layer in layers.values():
        views.setdefault(id(layer.parameter), []).append(layer)
    spared, adapters = parameters_below(model, head), adapter_parts(model)
    counts, examples, seen = Counter(), {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen or parameter.dim() < 2 or name.endswith("bias") or is_below(name, head):
            continue
        seen.add(id(parameter))
        if id(parameter) in views:
            found = [(reasons[layer.name], layer.numel) for layer in views[id(parameter)]]
        else:
            found = [(TIED if id(parameter) in spared else _why_unseen(model, name, adapters), parameter.numel())]
        for reason, size in found:
            counts[reason] += size
            examples.setdefault(reason, name)
    competing = counts.pop("", 0)
    examples.pop("", None)
    return Account(competing, competing + sum(counts.values()), dict(counts), examples)


def _why_unseen(model: nn.Module, name: str, adapters: tuple[str, ...]) -> str:
    """Say why a parameter of the body is no layer."""
    if is_below(name, adapters):
        return ADAPTER
    owner, _, attribute = name.rpartition(".")
    if ".parametrizations." in f".{name}":
        owner, attribute = f".{name}".partition(".parametrizations.")[0].lstrip("."), ""
    module = model.get_submodule(owner)
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)):
        # Computed from this parameter, or one that its adapter leaves alone because it runs on positions.
        return UNKNOWN if attribute == "weight" else UNRANKABLE
    return UNKNOWN


def _refuse(layers: Mapping[str, Layer], reasons: Mapping[str, str], account: Account) -> None:
    """Say why nothing competes."""
    if not layers:
        raise LayerMismatchError(
            "The model holds no weight that can be sliced (Linear, Conv1d, Conv2d, GPT-2 Conv1D, experts, packed "
            f"attention) outside its head. Pass the model itself, or name a smaller head. {account}."
        )
    if set(reasons.values()) == {UNRANKABLE}:
        rankable_layers(layers)  # names the first, and what to do
    advice = "Unfreeze what shall be sliced, or use a strategy without a slice. " if FROZEN in reasons.values() else ""
    raise UnsupportedModelError(f"Nothing is left to slice. {advice}{account}.")
