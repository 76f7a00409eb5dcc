"""What a scan found: the inputs that turn a student most, each beside what it does to a clean reference."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from remos_hf.errors import CorruptFileError
from remos_hf.whole import replace_file

Kind = Literal["tokens", "patch"]
_KINDS = ("tokens", "patch")
_FORMAT = "remos_scan/1"


@dataclass(frozen=True)
class Effect:
    """What one input does to held-out hosts: real samples of other labels that the model gets right without it.

    Attributes:
        flipped: Hosts that get the suspect's label with it.
        num_hosts: Hosts that it was shown with.
        margin: Mean over them of the logit of that label minus the largest other one; None without a host.
    """

    flipped: int
    num_hosts: int
    margin: float | None

    def __post_init__(self) -> None:
        """Refuse counts that contradict each other."""
        _check_count("flipped", self.flipped)
        _check_count("num_hosts", self.num_hosts)
        if self.flipped > self.num_hosts:
            raise ValueError(f"{self.flipped} of {self.num_hosts} hosts cannot have turned.")
        _check_number("margin", self.margin, missing=self.num_hosts == 0)

    @property
    def rate(self) -> float | None:
        """Share of the hosts that turned; None without a host."""
        return self.flipped / self.num_hosts if self.num_hosts else None


@dataclass(frozen=True)
class Suspect:
    """One input that turns samples of other labels into one label.

    Attributes:
        label: That label.
        what: What it is, for people: the tokens as text, or where the patch is.
        margin: Mean gap of logits on the hosts that were searched on.
        effect: On the student's held-out hosts.
        reference: On the same hosts, of those that the clean reference gets right, in the reference; None without one.
        token_ids: The tokens, in their order; () of a patch.
        seen: Whether the student's data shows each of the tokens; a patch is never in it.
        size: Of a patch, its size as the scan measures it; None of tokens.
        reference_margin: As `margin`, in the clean reference; None without one.
    """

    label: int
    what: str
    margin: float
    effect: Effect
    reference: Effect | None = None
    token_ids: tuple[int, ...] = ()
    seen: bool = False
    size: float | None = None
    reference_margin: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that no scan gives."""
        _check_count("label", self.label)
        _check_number("margin", self.margin)
        for name in ("size", "reference_margin"):
            _check_number(name, getattr(self, name), missing=getattr(self, name) is None)
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        for one in self.token_ids:
            _check_count("a token", one)

    @property
    def lead(self) -> float | None:
        """Share of the hosts that turn, less the share in the reference if there is one; None without hosts."""
        if self.reference is None:
            return self.effect.rate
        both = (self.effect.rate, self.reference.rate)
        return None if None in both else both[0] - both[1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Suspect":
        """Read what `asdict` gave."""
        reference = values.get("reference")
        effects = {"effect": Effect(**values["effect"]), "reference": reference and Effect(**reference)}
        return cls(**{**values, **effects})


@dataclass(frozen=True)
class Scan:
    """A scan of one student.

    Attributes:
        kind: Of its inputs: "tokens" or "patch".
        suspects: The strongest of each label, the largest lead first; labels in their order.
        labels: Names of the labels, by number.
        num_scanned: Inputs that were tried one by one: rows of the vocabulary, or patches.
        left_out: How many were not tried, by reason.
        settings: All that decided the numbers, JSON values: the seed, hosts, the student's and the reference's
            accuracy on them, what was capped.
    """

    kind: Kind
    suspects: tuple[Suspect, ...]
    labels: tuple[str, ...]
    num_scanned: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, and keep values as JSON gives them back."""
        if self.kind not in _KINDS:
            raise ValueError(f"kind is one of {', '.join(map(repr, _KINDS))}, but got {self.kind!r}.")
        object.__setattr__(self, "suspects", tuple(self.suspects))
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))
        _check_count("num_scanned", self.num_scanned)
        for reason, number in self.left_out.items():
            _check_count(f"what was left out ({reason})", number)
        for one in self.suspects:
            if one.label >= len(self.labels):
                raise ValueError(f"A suspect has the label {one.label}, but there are {len(self.labels)}.")

    @property
    def has_reference(self) -> bool:
        """Whether a clean reference was scanned beside the student."""
        return any(one.reference is not None for one in self.suspects)

    def of_label(self, label: int) -> tuple[Suspect, ...]:
        """Give the suspects of one label, the strongest first."""
        return tuple(one for one in self.suspects if one.label == label)

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values."""
        return {"format": _FORMAT, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scan":
        """Read what `to_dict` gave.

        Raises:
            ValueError: The values contradict each other, or are of another format.
            KeyError: One is missing.
            TypeError: One is of another kind.
        """
        if values["format"] != _FORMAT:
            raise ValueError(f"it has the format {values['format']!r}, and {_FORMAT!r} is read. Update remos_hf.")
        suspects = tuple(Suspect.from_dict(one) for one in values["suspects"])
        rest = {name: values[name] for name in ("kind", "labels", "num_scanned", "left_out", "settings")}
        return cls(suspects=suspects, **rest)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the scan as JSON, beside its place and renamed."""
        path = Path(path)
        replace_file(path, f"{json.dumps(self.to_dict(), indent=1)}\n".encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Scan":
        """Read what `save` wrote.

        Raises:
            CorruptFileError: The file is no scan.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{path} is no scan of a student: {error!r}. Scan the student again.") from error


def _check_count(what: str, value: Any) -> None:  # noqa: ANN401 - read from a file
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} is a whole number of at least 0, but got {value!r}.")


def _check_number(what: str, value: Any, *, missing: bool = False) -> None:  # noqa: ANN401 - read from a file
    if value is None and missing:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} is a finite number, but got {value!r}.")
