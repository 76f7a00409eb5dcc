"""The cells of an audit: a student of one teacher and one seed, what is measured on it, and whether that is done."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remos_hf.auditing.audit import CLEAN, Audit
from remos_hf.defects.backdoor import Backdoor
from remos_hf.errors import CorruptFileError
from remos_hf.evaluation.reactivation import Reactivation
from remos_hf.strategies.plain import Retrain


@dataclass(frozen=True)
class Cell:
    """A student to make and measure.

    Attributes:
        kind: CLEAN, or the name of the backdoor in its teacher.
        seed: Of its teacher, and of itself.
        student: Its name among the audit's plans.
    """

    kind: str
    seed: int
    student: str

    @property
    def file(self) -> str:
        """Name the file of what is measured on it."""
        return f"{self.kind}-{self.seed}-{self.student}.json"


def cells_of(audit: Audit) -> Iterator[Cell]:
    """Give all cells, in the order in which they are made."""
    backdoors = [name for name, defect in audit.defects.items() if isinstance(defect, Backdoor)]
    for seed in audit.seeds:
        for kind in (CLEAN, *backdoors):
            for student, plan in audit.students.items():
                if kind != CLEAN and isinstance(plan.strategy, Retrain):
                    continue  # it takes nothing from any teacher: one serves all
                if kind == CLEAN or plan.defects is None or kind in plan.defects:
                    yield Cell(kind, seed, student)


def wanted(audit: Audit, cell: Cell) -> list[str]:
    """Name the defects that a student is measured on."""
    plan = audit.students[cell.student]
    shown = list(audit.defects) if cell.kind == CLEAN else [cell.kind]
    return [name for name in shown if plan.defects is None or name in plan.defects]


def retuned(audit: Audit, cell: Cell) -> list[str]:
    """Name the backdoors whose re-activation is measured on a student."""
    seeds = audit.reactivation.seeds
    if not audit.students[cell.student].reactivate or (seeds is not None and cell.seed not in seeds):
        return []
    return [name for name in wanted(audit, cell) if isinstance(audit.defects[name], Backdoor)]


def curves_of(audit: Audit, found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the re-activation that was measured as this audit asks."""
    plan = retuning(audit.reactivation)
    if found.get("retuned_as", plan) != plan:
        return {}
    counts = {str(count) for count in plan["counts"]}
    return {name: curve for name, curve in found["reactivation"].items() if set(curve) == counts}


def as_asked(audit: Audit, cell: Cell, found: Mapping[str, Any]) -> dict[str, Any]:
    """Give what is known of a student without re-activation that is no part of this audit."""
    curves = curves_of(audit, found)
    return {**found, "reactivation": {name: curves[name] for name in retuned(audit, cell) if name in curves}}


def is_done(audit: Audit, cell: Cell, found: Mapping[str, Any] | None) -> bool:
    """Whether all that is asked for was measured on a student."""
    if found is None:
        return False
    return set(wanted(audit, cell)) <= set(found["dir"]) and set(retuned(audit, cell)) <= set(curves_of(audit, found))


def retuning(plan: Reactivation) -> dict[str, Any]:
    """Give what decides a student's re-activation, as JSON values."""
    return {name: one for name, one in plan.to_dict().items() if name != "seeds"}


def read_cell(path: Path) -> dict[str, Any] | None:
    """Read what was measured on a student; None if nothing was.

    Raises:
        CorruptFileError: The file is no JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFileError(
            f"{path} is no measured student ({error}). Delete it and run the audit again."
        ) from error
