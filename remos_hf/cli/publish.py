"""`remos card` and `remos push`: a student's model card, and the student on the Hub."""

from pathlib import Path
from typing import Any

from remos_hf.adapters.weights_hash import hash_of_folder
from remos_hf.cli.options import CardOptions, PushOptions
from remos_hf.judging.report import DefectReport
from remos_hf.sharing.hub import push_to_hub
from remos_hf.sharing.model_card import model_card
from remos_hf.sharing.record import Sidecars
from remos_hf.whole import replace_file


def card(asked: CardOptions, progress: bool) -> tuple[dict[str, Any], str]:
    """Render a student's model card; give what is told, as JSON values and as text."""
    output = asked.output
    if output is not None and output.exists() and not asked.overwrite:
        raise FileExistsError(f"{output} is there already. Name another file, or replace it with --overwrite.")
    made = model_card(
        Sidecars.load(_folder(asked.student)),
        _report(asked.report),
        repo_id=asked.repo_id or f"your-name/{asked.student.resolve().name}",
        student=asked.report_student,
        task=asked.report_task,
        command=asked.command,
        dataset=asked.dataset,
        language=asked.language,
        license=asked.license,
        weights=hash_of_folder(asked.student),
    )
    text = str(made)
    if output is None:
        return {"card": text}, text
    replace_file(output, text.encode())
    return {"card": text, "output": str(output)}, f"Saved {output}"


def push(asked: PushOptions, progress: bool) -> tuple[dict[str, Any], str]:
    """Push a student with its record and card; give what is told, as JSON values and as text."""
    repo_id, dry_run = asked.repo_id, asked.dry_run
    pushed = push_to_hub(
        _folder(asked.student),
        repo_id,
        report=_report(asked.report),
        report_student=asked.report_student,
        report_task=asked.report_task,
        private=not asked.public,
        revision=asked.revision,
        dry_run=dry_run,
        command=asked.command,
        dataset=asked.dataset,
        language=asked.language,
        license=asked.license,
        benchmark=asked.benchmark,
    )
    files = sorted(map(str, pushed.files))
    told = {"repo_id": repo_id, "files": files, "url": pushed.url, "commit": pushed.commit, "dry_run": dry_run}
    told["not_pushed"] = list(pushed.behind)
    listed = "".join(f"\n  {name}" for name in files)
    if pushed.behind:
        listed += "\nNot pushed, as they are no files of a student:" + "".join(f"\n  {one}" for one in pushed.behind)
    if dry_run:
        return told, f"Would push to {repo_id} ({'public' if asked.public else 'private'}):{listed}"
    return told, f"Pushed to {pushed.url}:{listed}"


def _report(path: Path | None) -> DefectReport | None:
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"--report is the report.json of an audit, but there is no file {path}.")
    return None if path is None else DefectReport.load(path)


def _folder(student: Path) -> Path:
    if not student.is_dir():
        raise FileNotFoundError(f"There is no folder {student}. `remos train` and `remos slice` write one.")
    return student
