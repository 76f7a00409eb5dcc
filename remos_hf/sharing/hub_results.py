"""A student's figures in the Hub's own formats: only what was measured of the very weights that go there."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult
from huggingface_hub.utils import validate_repo_id, yaml_dump

from remos_hf.evaluation.measures import rate_of
from remos_hf.judging.report import DefectReport
from remos_hf.judging.verdicts import CANNOT
from remos_hf.sharing.card_measured import MeasuredStudent, Tie
from remos_hf.sharing.card_text import plain_line
from remos_hf.sharing.defect_kinds import DefectKind, defect_kind
from remos_hf.sharing.record import Sidecars

try:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
except ImportError:  # huggingface_hub below 1.4
    EvalResultEntry = None

logger = logging.getLogger(__name__)

RESULTS_FILE = ".eval_results/remos_defect_inheritance.yaml"


def model_index(measured: MeasuredStudent, pipeline: str | None, dataset: str | None) -> list[EvalResult] | None:
    """Give the figures of a card's metadata; None where nothing was measured of these weights.

    Args:
        measured: The student's place in a report.
        pipeline: The student's task, as the Hub names it.
        dataset: The data set that it was measured on, as an id of the Hub where it has one.
    """
    if measured.tie is not Tie.THESE:
        return None
    known = dataset if dataset and is_hub_id(dataset) else None
    figures = [
        ("accuracy", "ACC", None, rate) for rate in dict.fromkeys(rate_of(one["acc"]) for one in measured.records)
    ]
    figures += [
        ("defect_inheritance_rate", f"DIR ({plain_line(one['defect'])})", one["defect"], rate_of(one["dir"]))
        for one in measured.records
        if measured.of_defects[one["defect"]].kind != CANNOT
    ]
    return [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=known or "other",
            dataset_name=plain_line(measured.task or dataset or "not named"),
            # The Hub tells results apart by this, not by their names.
            dataset_config=plain_line(defect),
            dataset_split="test",
            metric_type=kind,
            metric_name=name,
            metric_value=round(rate.value, 6),
            metric_args={"num_samples": rate.num_samples, "low": round(rate.low, 6), "high": round(rate.high, 6)},
        )
        for kind, name, defect, rate in figures
        if rate.value is not None
    ]


def is_hub_id(name: str) -> bool:
    """Whether a name can be the id of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def eval_result_files(
    report: DefectReport,
    *,
    weights: str | None,
    benchmark: str | None = None,
    record: Sidecars | None = None,
    student: str | None = None,
    task: str | None = None,
) -> dict[str, str]:
    """Render a student's figures as results of the benchmark `defect-inheritance`.

    Args:
        report: What was measured.
        weights: The hash of the student's weights (`hash_of_folder`). Only rows that name it are results of it; of
            weights without a hash there is none.
        benchmark: Hub id of the data set in which the benchmark is published. None writes no file, and the log says
            so: the description in `model_cards/defect-inheritance` has no home of its own yet, and the Hub reads
            results of a data set that is a benchmark alone.
        record: How the student came to be.
        student: The student's name in the report, where these weights have several there.
        task: The report's task, likewise.

    Returns:
        File contents by path: the DIR of each defect that the benchmark has a task for, as a share in [0, 1]. Empty
        where nothing was measured of these weights, or nothing can be said.

    Raises:
        ValueError: `benchmark` is no Hub id, or the report does not hold the student.

    Differs:
        Below huggingface_hub 1.4, which knows no EvalResultEntry, the same keys are written by hand; the log and the
        file's first line say so.
    """
    if benchmark is None:
        logger.info(
            "No .eval_results: the Hub reads results of published benchmarks alone. Pass the id of yours (benchmark="
            "'owner/defect-inheritance', --benchmark); its files are in model_cards/defect-inheritance."
        )
        return {}
    if not is_hub_id(benchmark):
        raise ValueError(f"benchmark is the id of a data set on the Hub, such as 'owner/name', but got {benchmark!r}.")
    measured = MeasuredStudent(report, record, student, task, weights)
    if measured.tie is not Tie.THESE:
        logger.info("No .eval_results: no row of the report is of these weights (%.12s...).", weights)
        return {}
    by_kind: dict[DefectKind, list[Mapping[str, Any]]] = {}
    for one in measured.records:
        defect = one["defect"]
        kind = defect_kind(measured.verdicts[defect].section.described)
        if kind is None or measured.of_defects[defect].kind == CANNOT:
            why = "the benchmark has no task for it" if kind is None else "of it nothing can be said"
            logger.info("Not in .eval_results: %s, as %s.", plain_line(defect), why)
        else:
            by_kind.setdefault(kind, []).append(one)
    entries = [_entry(benchmark, kind, of, weights) for kind, of in by_kind.items()]
    return {RESULTS_FILE: _entries_yaml(entries)} if entries else {}


def _entry(benchmark: str, kind: DefectKind, measured: Sequence[Mapping[str, Any]], weights: str) -> dict[str, Any]:
    """Write one result a task: of several defects of a kind the one that shows most."""
    record = max(measured, key=lambda one: one["dir"]["value"])
    rate, accuracy = rate_of(record["dir"]), rate_of(record["acc"])
    highest = f", the highest of {len(measured)} of its kind" if len(measured) > 1 else ""
    notes = (
        f"DIR of {plain_line(record['defect'])}{highest}, "
        f"share in [0, 1], lower is less inherited; {rate.num_samples} samples, 95 % interval {rate.low:.4f} to "
        f"{rate.high:.4f}; accuracy {accuracy.value:.4f} on {accuracy.num_samples} samples; weights {weights[:16]}"
    )
    return {"dataset_id": benchmark, "task_id": kind.slug, "value": round(rate.value, 6), "notes": notes}


def _entries_yaml(asked: Sequence[Mapping[str, Any]]) -> str:
    if EvalResultEntry is not None:
        return yaml_dump(eval_result_entries_to_yaml([EvalResultEntry(**entry) for entry in asked]))
    told = (
        f"huggingface_hub {huggingface_hub.__version__} has no EvalResultEntry: the .eval_results were written without "
        "it, with the same keys. Update huggingface_hub to have them checked."
    )
    logger.warning(told)
    entries = [
        {
            "dataset": {"id": entry["dataset_id"], "task_id": entry["task_id"]},
            "value": entry["value"],
            "notes": entry["notes"],
        }
        for entry in asked
    ]
    return f"# {told}\n{yaml_dump(entries)}"
