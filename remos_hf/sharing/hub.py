"""Push a student to the Hub: the student, its record, its card and what was measured, in one commit."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel

from remos_hf.errors import RemosError
from remos_hf.evaluation.report import DefectReport
from remos_hf.sharing.card_measured import chosen_student
from remos_hf.sharing.model_card import check_repo_id, eval_result_files, model_card
from remos_hf.sharing.record import PICKLES, SIDECAR_FILES, Sidecars, refuse_pickles

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
REPORT_FILE = "report.json"
RESULTS_FOLDER = ".eval_results"
# A server that breaks off is an HTTPError of the client library or an OSError; a failed upload of a large file is a
# RuntimeError, an answer that is none a ValueError.
_HUB_FAILS = (HTTPError, OSError, RuntimeError, ValueError)
_NOT_THERE = ("__pycache__", "node_modules")


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        files: Bytes by name, of all files that the repository holds of this student.
        url: Of the repository; None of a dry run.
        commit: The commit that holds them; None of a dry run.
    """

    files: dict[str, int]
    url: str | None = None
    commit: str | None = None


def push_to_hub(
    student: nn.Module | str | os.PathLike,
    repo_id: str,
    *,
    record: Sidecars | None = None,
    report: DefectReport | None = None,
    report_student: str | None = None,
    report_task: str | None = None,
    processing_class: Any | None = None,  # noqa: ANN401 - a tokenizer or an image processor
    private: bool = True,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    command: str | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    dataset: str | None = None,
    language: str | None = None,
    license: str | None = None,  # noqa: A002 - the Hub's word
    metrics: Mapping[str, float] | None = None,
) -> Pushed:
    """Push a student with its record, its card and its report, in one commit.

    Nothing half-pushed is ever visible, and what the repository already holds is not sent again: an interrupted push
    is run again as it was. Pickles, checkpoints, hidden files and links to folders stay behind, and the log names them.
    What an earlier push left there of another student (its record, report, results and weights) goes in the same
    commit. A repository that moved is followed; one that exists keeps its visibility. The log says either.

    Args:
        student: The model, or the folder that it was saved in (`RemosTrainer.save_model`).
        repo_id: "user/name".
        record: How the student came to be; None reads it from beside the student.
        report: What was measured of it; None reads the folder's `report.json` if there is one.
        report_student: The student's name in the report; None finds the one that was made as the record says.
        report_task: The report's task that it is of; may be left out where there is only one.
        processing_class: Tokenizer or image processor to push with it.
        private: Whether a new repository is private.
        token: Of the Hub; None or True for the stored one.
        revision: Branch to push to, made if it is missing; None for the main one.
        commit_message: The commit's message.
        command: What reproduces the student, for the card.
        dry_run: Only render and list the files: no network, no token.
        endpoint: Another hub than the one that HF_ENDPOINT names.
        dataset: Of the task, as a Hub id where it has one; `.eval_results` need that.
        language: For the card.
        license: For the card.
        metrics: For the card: what was measured without any defect, by name.

    Returns:
        The files, and where they are.

    Raises:
        ValueError: `repo_id` is no repository id; the report does not hold the student.
        FileNotFoundError: There is no such folder, or no record beside the student and none given.
        CorruptFileError: A file of the record or the report is broken or was changed.
        RemosError: The weights are pickles, or adapters that were not merged; no token, one that the Hub refuses, no
            network, or an upload that broke off. The message says what was kept where, and how to go on.
    """
    check_repo_id(repo_id)
    folder = None if isinstance(student, nn.Module) else Path(student)
    given, record, report = record is not None, *_described(folder, record, report)
    if report is not None:
        report_task, report_student = chosen_student(report, record, report_student, report_task)
    about = {"command": command, "dataset": dataset, "language": language, "license": license, "metrics": metrics}
    staged, kept = Path(tempfile.mkdtemp(prefix="remos_push_")), False
    try:
        if folder is None:
            _save_student(student, staged)
        if processing_class is not None:
            processing_class.save_pretrained(staged)
        if folder is None or given:
            record.save(staged)
        _write_card(staged, record, report, repo_id, report_student, report_task, about)
        files = {} if folder is None else _files_of(folder, SIDECAR_FILES if given else ())
        files |= {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
        files = dict(sorted(files.items()))
        refuse_pickles([*files, *_left_behind(folder)], folder or staged)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if dry_run:
            listed = "".join(f"\n{size:>14,}  {name}" for name, size in sizes.items())
            logger.info("A push to %s would hold %d files:%s", repo_id, len(sizes), listed)
            return Pushed(sizes)
        try:
            return Pushed(sizes, *_send(files, repo_id, private, token, revision, commit_message, endpoint))
        except _HUB_FAILS as error:
            kept = folder is None
            again = {"report_student": report_student, "report_task": report_task, "revision": revision, **about}
            again |= {"private": None if private else False, "endpoint": endpoint}
            raise RemosError(_how_to_go_on(error, repo_id, folder or staged, kept, again)) from error
    finally:
        if not kept:
            shutil.rmtree(staged, ignore_errors=True)


def _described(
    folder: Path | None, record: Sidecars | None, report: DefectReport | None
) -> tuple[Sidecars, DefectReport | None]:
    """Find what was not given beside the student."""
    if folder is None:
        if record is None:
            raise RemosError(
                "The student is a model, and nothing says how it came to be. Pass record=Sidecars.of(strategy, "
                "preparation, student) (a RemosTrainer has it as .sidecars), or push the folder that it was saved in."
            )
        return record, report
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Save the student first, or pass the model itself.")
    if report is None and (folder / REPORT_FILE).is_file():
        report = DefectReport.load(folder / REPORT_FILE)
    return (Sidecars.from_pretrained(folder) if record is None else record), report


def _save_student(student: nn.Module, folder: Path) -> None:
    if getattr(student, "peft_config", None):
        raise RemosError(
            "The student carries adapters that were not merged. Pushed alone they would be loaded onto the unsliced "
            "teacher: push student.merge_and_unload(), or the folder that RemosTrainer.save_model wrote."
        )
    if isinstance(student, PreTrainedModel):
        student.save_pretrained(folder)
    else:
        # As Trainer saves any other module.
        save_model(student, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_card(
    folder: Path,
    record: Sidecars,
    report: DefectReport | None,
    repo_id: str,
    student: str | None,
    task: str | None,
    about: Mapping[str, Any],
) -> None:
    card = model_card(record, report, repo_id=repo_id, student=student, task=task, **about)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    if report is None:
        return
    report.save(folder / REPORT_FILE)
    results = eval_result_files(report, student=student, task=task, dataset=about["dataset"], record=record)
    for name, content in results.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def _files_of(folder: Path, without: Iterable[str] = ()) -> dict[str, Path]:
    """Give the files to push by name; what stays behind is logged."""
    files, behind = {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in without:
            continue
        if _stays(name) or _is_pickled(path):
            behind.append(name)
        else:
            files[name] = path
    if behind:
        logger.info("Not pushed from %s (pickles, checkpoints, hidden files): %s", folder, ", ".join(behind))
    return files


def _stays(name: str) -> bool:
    parts = PurePosixPath(name).parts
    if parts[0] == RESULTS_FOLDER:
        # Ours are rendered anew; anyone else's are figures of their own.
        return parts[-1].startswith(("remos_", "."))
    unseen = any(part.startswith((".", "_")) or part in _NOT_THERE or part.startswith("checkpoint-") for part in parts)
    return unseen or name.endswith((*PICKLES, ".tmp", "~"))


def _is_pickled(path: Path) -> bool:
    """Whether a file begins as a pickle does, by whatever name."""
    with path.open("rb") as file:
        head = file.read(2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def _left_behind(folder: Path | None) -> list[str]:
    return [] if folder is None else [path.name for path in folder.iterdir() if path.name.endswith(PICKLES)]


def _send(
    files: Mapping[str, Path],
    repo_id: str,
    private: bool,
    token: str | bool | None,
    revision: str | None,
    commit_message: str | None,
    endpoint: str | None,
) -> tuple[str, str]:
    """Commit the files; give the repository's address and the commit."""
    if not isinstance(token, str):
        token = None if token is False else get_token()
    if not token:
        raise LocalTokenNotFoundError("There is no token.")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        info = api.model_info(repo_id)
        if info.id != repo_id:
            logger.warning("%s has moved to %s: pushed there.", repo_id, info.id)
        if info.private is not None and info.private != private:
            logger.warning("%s exists, and stays %s.", info.id, "private" if info.private else "PUBLIC")
    except RepositoryNotFoundError:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(made.repo_id or repo_id)
    if revision not in (None, constants.DEFAULT_REVISION):
        api.create_branch(info.id, branch=revision, exist_ok=True)
        info = api.model_info(info.id, revision=revision)
    there = [sibling.rfilename for sibling in info.siblings or ()]
    stale = [name for name in there if _is_of_a_push(name) and name not in files]
    if stale:
        logger.info("Removed with this commit, as it is of another student: %s", ", ".join(stale))
    done = api.create_commit(
        info.id,
        [
            *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=commit_message or "Push a student, its record and its card",
        revision=revision,
    )
    url = f"{api.endpoint}/{info.id}"
    if done.oid == info.sha:
        logger.info("Nothing to do: %s holds all of it already (commit %s).", url, done.oid)
    return url, done.oid


def _is_of_a_push(name: str) -> bool:
    """Whether a file in a repository is one that every push writes anew or means to be gone."""
    weights = (
        name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json")) and "/" not in name
    )
    return weights or name in (*SIDECAR_FILES, REPORT_FILE) or name.startswith(f"{RESULTS_FOLDER}/remos_")


def _how_to_go_on(error: Exception, repo_id: str, place: Path, kept: bool, again: Mapping[str, Any]) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        what = "there is no token for the Hub. Run `hf auth login`, set HF_TOKEN, or pass token="
    elif isinstance(error, OfflineModeIsEnabled):
        what = "HF_HUB_OFFLINE is set. Unset it"
    elif status in (401, 403):
        what = f"the Hub refused the token ({status}). Give one that may write to {repo_id}"
    elif status == 404:
        what = f"the Hub has no such repository, or the token may not see it (404). Look whether {repo_id} is right"
    else:
        what = f"the Hub could not be reached, or broke off ({type(error).__name__}: {str(error).strip()[:300]})"
    options = "".join(f", {name}={value!r}" for name, value in again.items() if value is not None)
    where = f"The student, its record and its card are kept in {place}." if kept else f"{place} is as it was."
    return (
        f"The push to {repo_id} did not end: {what}. All files go in one commit, so nothing half-pushed is to be seen. "
        f"{where} To go on: push_to_hub({str(place)!r}, {repo_id!r}{options}). Large files that "
        "arrived are not sent again."
    )
