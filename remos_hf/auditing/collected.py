"""The report over the cells of an audit that are done."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remos_hf.auditing.audit import CLEAN, Audit
from remos_hf.auditing.cells import Cell, as_asked, cells_of, is_done, read_cell
from remos_hf.defects.backdoor import Backdoor
from remos_hf.defects.base import Defect
from remos_hf.evaluation.transfer import paired
from remos_hf.judging.report import DefectReport, installed_versions, joined_versions
from remos_hf.strategies.plain import Retrain


def report_of(audit: Audit, folder: str | os.PathLike) -> DefectReport:
    """Report the cells that are done, making nothing.

    Args:
        audit: The audit.
        folder: Where it was run.
    """
    folder = Path(folder)
    done = {cell: read_cell(folder / "cells" / cell.file) for cell in cells_of(audit)}
    shown = {cell: as_asked(audit, cell, found) for cell, found in done.items() if found is not None}
    records = []
    for name, defect in audit.defects.items():
        for student, plan in audit.students.items():
            for seed in audit.seeds if plan.defects is None or name in plan.defects else ():
                cell, twin = _pair_of(audit, name, defect, student, seed)
                both = [shown.get(one) for one in (cell, twin) if one is not None]
                if any(one is None or name not in one["dir"] for one in both):
                    continue
                record = paired(shown[cell], shown[twin] if twin is not None else None, name)
                records.append({"task": audit.name, "defect": name, "student": student, "seed": seed, **record})
    teachers = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "teachers").glob("*.json"))}
    asked = {**audit.to_dict(), **audit.told, "exposed": _exposed_facts(audit, teachers)}
    settings: dict[str, Any] = {"reference": "finetune", "audits": {audit.name: asked}}
    settings["teachers"] = {audit.name: teachers}
    anatomies = _anatomies(audit, shown)
    settings["missing"] = {audit.name: sum(not is_done(audit, cell, found) for cell, found in done.items())}
    made_with = [found["versions"] for found in done.values() if found and "versions" in found]
    return DefectReport(records, settings, joined_versions(made_with or [installed_versions()]), anatomies)


def _exposed_facts(audit: Audit, teachers: Mapping[str, Any]) -> dict[str, Any]:
    """Give the facts of each defect's exposed set: the first seed's, and all of them where they differ."""
    facts: dict[str, Any] = {}
    for name, defect in audit.defects.items():
        kind = name if isinstance(defect, Backdoor) else CLEAN
        made = {str(seed): teachers.get(f"{kind}-{seed}", {}).get("exposed", {}).get(name) for seed in audit.seeds}
        held = {seed: one for seed, one in made.items() if one is not None}
        if held:
            first = next(iter(held.values()))
            several = {} if all(one == first for one in held.values()) else {"by_seed": held}
            facts[name] = {**first, **several}
    return facts


def _anatomies(audit: Audit, done: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give what students are made of, each of the first seed that tells it."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for cell, found in done.items():
        if found.get("anatomy") and (cell.kind, cell.student) not in first:
            about = {"task": audit.name, "teacher": cell.kind, "student": cell.student, "seed": cell.seed}
            first[cell.kind, cell.student] = {**about, "anatomy": found["anatomy"]}
    return list(first.values())


def _pair_of(audit: Audit, name: str, defect: Defect, student: str, seed: int) -> tuple[Cell, Cell | None]:
    """Give the cell that shows a defect, and its benign twin."""
    plan = audit.students[student]
    if not isinstance(defect, Backdoor):
        # No teacher is without its adversarial inputs: the floor is a student that took nothing from it.
        retrained = next(
            (
                one
                for one, other in audit.students.items()
                if isinstance(other.strategy, Retrain) and (other.defects is None or name in other.defects)
            ),
            None,
        )
        return Cell(CLEAN, seed, student), Cell(CLEAN, seed, retrained) if retrained else None
    kind = CLEAN if isinstance(plan.strategy, Retrain) else name
    return Cell(kind, seed, student), Cell(CLEAN, seed, student)
