"""CoverageProfile: how many samples covered each neuron. Integer counts, so profiles add."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from remos_hf.errors import CorruptFileError, LayerMismatchError, RemosError, TeacherMismatchError
from remos_hf.layers import Layer
from remos_hf.profiling.sidecar_file import check_fields, file_in, is_count, is_hash, read_tensors, write_tensors

COVERAGE_FILE = "remos_coverage.safetensors"
_FORMAT = "remos_coverage/1"
_PLAIN_FIELDS = ("num_samples", "criterion", "source", "teacher_hash", "data_fingerprint")
# The ranks of a slice are kept in tables as long as the largest sum of two counts.
MOST_SAMPLES = 2**24
_EXPECTED = {
    "num_samples": (f"a whole number from 0 to {MOST_SAMPLES:,}", lambda value: is_count(value, MOST_SAMPLES)),
    "criterion": ("a JSON object", lambda value: isinstance(value, dict)),
    "source": ("'hooks' or 'hidden_states'", lambda value: value in ("hooks", "hidden_states")),
    "teacher_hash": ("64 hex digits, or nothing", is_hash),
    "data_fingerprint": (
        "up to 64 hex digits",
        lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{1,64}", value) is not None,
    ),
    "capped": ("true or false", lambda value: isinstance(value, bool)),
}


@dataclass(frozen=True)
class CoverageProfile:
    """Which neurons a data set uses, counted on a teacher.

    Attributes:
        input_counts: Samples that covered each input neuron, by module name. Int64, shape (in,), on the CPU.
        output_counts: Samples that covered each output neuron, by module name. Int64, shape (out,), on the CPU.
        num_samples: Samples counted.
        criterion: Name and parameters of the criterion, as JSON values.
        source: "hooks", or "hidden_states" when only the residual stream was seen.
        teacher_hash: `weights_hash` of the teacher's sliceable weights; "" when it was not taken.
        data_fingerprint: Sum of the batches' digests, in hex: equal for the same batches in any order.
        capped: Whether profiling stopped at a number of samples, so that there may be more data. Not compared.
    """

    input_counts: Mapping[str, Tensor]
    output_counts: Mapping[str, Tensor]
    num_samples: int
    criterion: Mapping[str, object] = field(default_factory=dict)
    source: str = "hooks"
    teacher_hash: str = ""
    data_fingerprint: str = "0"
    capped: bool = False

    def __add__(self, other: "CoverageProfile") -> "CoverageProfile":
        """Count both data sets: profile(A + B) == profile(A) + profile(B).

        Raises:
            LayerMismatchError: The profiles were taken of other layers, or with another criterion or source.
            TeacherMismatchError: They were taken of other teachers.
        """
        if not isinstance(other, CoverageProfile):
            return NotImplemented
        _check_addable(self, other)
        added = int(self.data_fingerprint, 16) + int(other.data_fingerprint, 16)
        return CoverageProfile(
            {name: counts + other.input_counts[name] for name, counts in self.input_counts.items()},
            {name: counts + other.output_counts[name] for name, counts in self.output_counts.items()},
            self.num_samples + other.num_samples,
            self.criterion,
            self.source,
            self.teacher_hash,
            format(added % 2**256, "x"),
            self.capped or other.capped,
        )

    def __eq__(self, other: object) -> bool:
        """Compare counts, samples, criterion, source, teacher and data."""
        if not isinstance(other, CoverageProfile):
            return NotImplemented
        return self._metadata() == other._metadata() and all(
            mine.keys() == theirs.keys() and all(torch.equal(counts, theirs[name]) for name, counts in mine.items())
            for mine, theirs in ((self.input_counts, other.input_counts), (self.output_counts, other.output_counts))
        )

    __hash__ = None

    @property
    def share_never_covered(self) -> float:
        """Share of all neurons, at both ends of every layer, that no sample covered. In [0, 1]."""
        counts = [*self.input_counts.values(), *self.output_counts.values()]
        neurons = sum(count.numel() for count in counts)
        return sum(int((count == 0).sum()) for count in counts) / neurons if neurons else 1.0

    def check_matches(self, layers: Mapping[str, Layer]) -> None:
        """Make sure that the profile was taken of these layers.

        Raises:
            LayerMismatchError: A profiled layer is missing, or has other neurons.
            RemosError: The profile counts more samples than weights can be ranked by.
        """
        missing = [name for name in self.input_counts if name not in layers]
        if missing:
            raise LayerMismatchError(
                f"The profile covers {len(self.input_counts)} layers and the model has {len(layers)} that can be "
                f"sliced; only the profile has '{missing[0]}'. It was taken of another model: profile this teacher."
            )
        if self.num_samples > MOST_SAMPLES:
            raise RemosError(
                f"The profile counts {self.num_samples:,} samples, but weights are ranked by counts of at most "
                f"{MOST_SAMPLES:,}. Profile fewer: a slice changes little beyond some thousands."
            )
        for name, counts in self.input_counts.items():
            profiled = (counts.numel(), self.output_counts[name].numel())
            present = (layers[name].in_neurons, layers[name].out_neurons)
            if profiled != present:
                raise LayerMismatchError(
                    f"'{name}' has {present[0]} input and {present[1]} output neurons, but the profile counted "
                    f"{profiled[0]} and {profiled[1]}. It was taken of another model: profile this teacher."
                )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the profile as safetensors, beside and renamed, so that an interrupted save leaves the old file whole.

        Args:
            path: File to write, or an existing folder to write `remos_coverage.safetensors` into.

        Returns:
            The file written.
        """
        tensors = {f"input_counts.{name}": counts for name, counts in self.input_counts.items()}
        tensors |= {f"output_counts.{name}": counts for name, counts in self.output_counts.items()}
        return write_tensors(file_in(path, COVERAGE_FILE), tensors, _FORMAT, self._metadata() | {"capped": self.capped})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CoverageProfile":
        """Read a profile.

        Args:
            path: The file, or a folder that holds `remos_coverage.safetensors`.

        Raises:
            CorruptFileError: It is truncated, tampered with, or no profile.
        """
        path = file_in(path, COVERAGE_FILE)
        tensors, metadata = read_tensors(path, _FORMAT, _PLAIN_FIELDS, optional=("capped",))
        check_fields(path, metadata, _EXPECTED)
        ends: dict[str, dict[str, Tensor]] = {"input_counts": {}, "output_counts": {}}
        for key, counts in tensors.items():
            end, _, name = key.partition(".")
            if end not in ends or not _are_counts(counts, metadata["num_samples"]):
                raise CorruptFileError(
                    f"{path} should hold int64 counts between 0 and its {metadata['num_samples']} samples, but '{key}' "
                    "is none. It was changed, or not written by remos_hf."
                )
            ends[end][name] = counts
        if ends["input_counts"].keys() != ends["output_counts"].keys():
            raise CorruptFileError(f"{path} does not count both ends of every layer: it was not written by remos_hf.")
        return cls(**ends, **metadata)

    def _metadata(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in _PLAIN_FIELDS} | {"criterion": dict(self.criterion)}


def _are_counts(counts: Tensor, num_samples: int) -> bool:
    plain = counts.dtype == torch.int64 and counts.dim() == 1
    return plain and bool(((counts >= 0) & (counts <= num_samples)).all())


def _check_addable(one: CoverageProfile, other: CoverageProfile) -> None:
    if one.input_counts.keys() != other.input_counts.keys():
        only = sorted(one.input_counts.keys() ^ other.input_counts.keys())
        raise LayerMismatchError(f"Profiles of other layers do not add; only one of them has '{only[0]}'.")
    if (dict(one.criterion), one.source) != (dict(other.criterion), other.source):
        raise LayerMismatchError(
            "Profiles add only when they were counted alike, but one used "
            f"{dict(one.criterion)} from {one.source} and the other {dict(other.criterion)} from {other.source}."
        )
    if one.teacher_hash != other.teacher_hash:
        raise TeacherMismatchError(
            f"Profiles of two teachers do not add (hashes {one.teacher_hash[:12]}... and {other.teacher_hash[:12]}...)."
        )
