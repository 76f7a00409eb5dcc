"""What each exposed sample did, so that two students can be compared sample by sample."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Outcomes:
    """What a model did on each exposed sample that could show the defect, in the order of the exposed set.

    Attributes:
        right: Whether the model is right on the clean sample; bool, shape (samples,).
        fails: Whether it fails on the exposed one (targeted: gives the target label); likewise. The defect inheritance
            rate is the mean of `fails` where `right`.
    """

    right: np.ndarray
    fails: np.ndarray

    @classmethod
    def of(
        cls, predicted: np.ndarray, references: np.ndarray, clean: np.ndarray, target_label: int | None
    ) -> "Outcomes":
        """Compare labels; samples that truly have the target label are left out, as in `defect_inheritance_rate`."""
        if target_label is None:
            return cls(clean == references, predicted != references)
        able = references != target_label
        return cls((clean == references)[able], (predicted == target_label)[able])

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values: the number of samples, and the bits in base64, the first sample's highest."""
        packed = {name: np.packbits(getattr(self, name)).tobytes() for name in ("right", "fails")}
        bits = {name: base64.b64encode(one).decode() for name, one in packed.items()}
        return {"num_samples": len(self.right), **bits}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Outcomes":
        """Read what `to_dict` gave.

        Raises:
            ValueError: There are fewer bits than samples, or they are no base64.
        """
        size = int(values["num_samples"])
        held = {
            name: np.frombuffer(base64.b64decode(values[name], validate=True), dtype=np.uint8)
            for name in ("right", "fails")
        }
        if any(len(one) != -(-size // 8) for one in held.values()):
            raise ValueError(f"Outcomes of {size} samples are {-(-size // 8)} bytes each, but got others.")
        return cls(*(np.unpackbits(one, count=size).astype(bool) for one in held.values()))
