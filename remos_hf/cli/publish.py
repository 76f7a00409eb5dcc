"""`remos card` and `remos push`: a student's model card, and the student on the Hub."""

from pathlib import Path
from typing import Any

from remos_hf.evaluation.report import DefectReport
from remos_hf.sharing.hub import push_to_hub
from remos_hf.sharing.model_card import model_card
from remos_hf.sharing.record import Sidecars
from remos_hf.whole import replace_file


def card(
    *,
    student: Path,
    report: Path | None,
    report_student: str | None,
    report_task: str | None,
    repo_id: str | None,
    command: str | None,
    output: Path | None,
    overwrite: bool,
    progress: bool,
) -> tuple[dict[str, Any], str]:
    """Render a student's model card; give what is told, as JSON values and as text."""
    if output is not None and output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already. Name another file, or replace it with --overwrite.")
    made = model_card(
        Sidecars.load(_folder(student)),
        None if report is None else DefectReport.load(report),
        repo_id=repo_id or f"your-name/{student.resolve().name}",
        student=report_student,
        task=report_task,
        command=command,
    )
    text = str(made)
    if output is None:
        return {"card": text}, text
    replace_file(output, text.encode())
    return {"card": text, "output": str(output)}, f"Saved {output}"


def push(
    *,
    student: Path,
    repo_id: str,
    report: Path | None,
    report_student: str | None,
    report_task: str | None,
    public: bool,
    revision: str | None,
    dry_run: bool,
    command: str | None,
    progress: bool,
) -> tuple[dict[str, Any], str]:
    """Push a student with its record and card; give what is told, as JSON values and as text."""
    pushed = push_to_hub(
        _folder(student),
        repo_id,
        report=None if report is None else DefectReport.load(report),
        report_student=report_student,
        report_task=report_task,
        private=not public,
        revision=revision,
        dry_run=dry_run,
        command=command,
    )
    files = sorted(map(str, pushed.files))
    told = {"repo_id": repo_id, "files": files, "url": pushed.url, "commit": pushed.commit, "dry_run": dry_run}
    told["not_pushed"] = list(pushed.behind)
    listed = "".join(f"\n  {name}" for name in files)
    if pushed.behind:
        listed += "\nNot pushed, as they are no files of a student:" + "".join(f"\n  {one}" for one in pushed.behind)
    if dry_run:
        return told, f"Would push to {repo_id} ({'public' if public else 'private'}):{listed}"
    return told, f"Pushed to {pushed.url}:{listed}"


def _folder(student: Path) -> Path:
    if not student.is_dir():
        raise FileNotFoundError(f"There is no folder {student}. `remos train` and `remos slice` write one.")
    return student
