"""Push a student to the Hub: the student, its record, its card and what was measured, in one commit."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel

from remos_hf.adapters.weights_hash import hash_of_folder
from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.judging.report import DefectReport
from remos_hf.sharing.card_measured import MeasuredStudent
from remos_hf.sharing.hub_results import eval_result_files
from remos_hf.sharing.layout import (
    CARD_FILE,
    REPORT_FILE,
    WEIGHTS_FILE,
    check_weights,
    is_config,
    is_of_a_student,
    public_text,
    pushable_files,
    without_local_paths,
)
from remos_hf.sharing.model_card import check_repo_id, model_card
from remos_hf.sharing.record import SIDECAR_FILES, Sidecars

logger = logging.getLogger(__name__)

# A server that breaks off is an HTTPError of the client library or an OSError; a failed upload of a large file is a
# RuntimeError, an answer that is none a ValueError.
_HUB_FAILS = (HTTPError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        files: Bytes by name, of all files that the repository holds of this student.
        behind: What lies in the student's folder and stays there, by name.
        url: Of the repository; None of a dry run.
        commit: The commit that holds them; None of a dry run.
    """

    files: dict[str, int]
    behind: tuple[str, ...] = ()
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
    metrics: Mapping[str, float] | None = None,
    benchmark: str | None = None,
    **said: Any,  # noqa: ANN401 - the card's words, which are Trainer's
) -> Pushed:
    """Push a student with its record, its card and its report, in one commit.

    Nothing half-pushed is ever visible, and what the repository already holds is not sent again: an interrupted push
    is run again as it was. Of a folder, only files of a student go (`sharing/layout.py` lists the kinds); whatever else
    lies there stays, and the log names it. Configs go without the paths of this machine that they name. What an earlier
    push left in the repository of another student (its record, report, results and weights) goes in the same commit;
    files that are not ours stay. A repository that moved is followed, and one that exists keeps its visibility: the log
    says either.

    Args:
        student: The model, or the folder that it was saved in (`RemosTrainer.save_model`).
        repo_id: "user/name".
        record: How the student came to be; None reads it from beside the student.
        report: What was measured of it; None reads the folder's `report.json` if there is one.
        report_student: The student's name in the report; None finds the rows of these weights, by their hash, or the
            student that was made as the record says.
        report_task: The report's task that it is of; may be left out where there is only one.
        processing_class: Tokenizer or image processor to push with it.
        private: Whether a new repository is private.
        token: Of the Hub; None or True for the stored one.
        revision: Branch to push to, made if it is missing; None for the main one.
        commit_message: The commit's message.
        command: What reproduces the student, for the card.
        dry_run: Only render and list the files: no network, no token.
        endpoint: Another hub than the one that HF_ENDPOINT names.
        metrics: For the card: what was measured without any defect, by name.
        benchmark: Hub id under which the benchmark `defect-inheritance` is published; results of these weights are
            written for it (`.eval_results`). None writes none.
        **said: For the card, all that `Trainer.create_model_card` takes: `dataset` (of the task, as a Hub id where it
            has one), `dataset_tags`, `dataset_args`, `language`, `license`, `tags`, `tasks`,
            `model_name`, `finetuned_from`. Each is a name or a list of names.

    Returns:
        The files, and where they are.

    Raises:
        ValueError: `repo_id` is no repository id; the report does not hold the student.
        FileNotFoundError: There is no such folder, or no record beside the student and none given.
        CorruptFileError: A file of the record or the report is broken or was changed; weights are no safetensors file.
        RemosError: There are no weights, only pickles, or adapters that were not merged; no token, one that the Hub
            refuses, no network, or an upload that broke off. The message says what was kept where, and how to go on.
    """
    check_repo_id(repo_id)
    folder = None if isinstance(student, nn.Module) else Path(student)
    given, record, report = record is not None, *_described(folder, record, report)
    weights = folder and hash_of_folder(folder)
    if report is not None and folder is not None:  # what is wrong with them shows before anything is copied
        MeasuredStudent(report, record, report_student, report_task, weights)
    about = {"command": command and public_text(command), "metrics": metrics, **said}
    staged, kept = Path(tempfile.mkdtemp(prefix="remos_push_")), False
    try:
        if folder is None:
            _save_student(student, staged)
        found = pushable_files(folder or staged)
        check_weights(found, folder or staged, started_otherwise=record.config["strategy"].get("name") != "Finetune")
        files = {name: path for name, path in found.files.items() if not (given and name in SIDECAR_FILES)}
        if processing_class is not None:
            processing_class.save_pretrained(staged)
        if folder is None or given:
            record.save(staged)
        named = {"student": report_student, "task": report_task, "weights": weights or hash_of_folder(staged)}
        _write_card(staged, record, report, repo_id, named, about, benchmark)
        ours = {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
        files |= {name: path for name, path in ours.items() if name not in found.behind or folder is not None}
        files = _cleaned(dict(sorted(files.items())), staged)
        if found.behind:
            logger.info("Not pushed from %s (no files of a student): %s", folder or staged, ", ".join(found.behind))
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if dry_run:
            listed = "".join(f"\n{size:>14,}  {name}" for name, size in sizes.items())
            logger.info("A push to %s would hold %d files:%s", repo_id, len(sizes), listed)
            return Pushed(sizes, found.behind)
        try:
            return Pushed(
                sizes, found.behind, *_send(files, repo_id, private, token, revision, commit_message, endpoint)
            )
        except _HUB_FAILS as error:
            kept = folder is None
            again = {"report_student": report_student, "report_task": report_task, "revision": revision, **about}
            again["benchmark"] = benchmark
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
        save_model(student, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def _write_card(
    folder: Path,
    record: Sidecars,
    report: DefectReport | None,
    repo_id: str,
    named: Mapping[str, str | None],
    about: Mapping[str, Any],
    benchmark: str | None,
) -> None:
    card = model_card(record, report, repo_id=repo_id, **named, **about)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    if report is None:
        return
    report.save(folder / REPORT_FILE)
    for name, content in eval_result_files(report, record=record, benchmark=benchmark, **named).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def _cleaned(files: Mapping[str, Path], staged: Path) -> dict[str, Path]:
    """Give the files, those configs anew that say where something lies on this machine."""
    cleaned = dict(files)
    for name in filter(is_config, files):
        try:
            content = json.loads(files[name].read_text(encoding="utf-8"))
            public = without_local_paths(content)
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{files[name]} is no JSON ({error}). Save the student anew.") from error
        if public != content:
            logger.info("Pushed without the paths of this machine that it names: %s", name)
            cleaned[name] = staged / name
            cleaned[name].parent.mkdir(exist_ok=True)
            cleaned[name].write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return cleaned


def push_while_training(folder: str | os.PathLike, repo_id: str, **asked: Any) -> Future[Pushed]:  # noqa: ANN401
    """Push a checkpoint's student as `push_to_hub` does, while training goes on.

    The files get a second name first, so that the checkpoint may go meanwhile. A push that fails is told as a warning.

    Args:
        folder: The checkpoint. What training is resumed from (optimizer, state) is no file of a student and stays.
        repo_id: "user/name".
        **asked: As `push_to_hub` takes it.

    Raises:
        CorruptFileError: The checkpoint's weights are no safetensors file.
    """
    staged = Path(tempfile.mkdtemp(prefix="remos_push_"))
    for name, path in pushable_files(Path(folder)).files.items():
        (staged / name).parent.mkdir(exist_ok=True)
        try:
            (staged / name).hardlink_to(path)
        except OSError:  # on another disk
            shutil.copyfile(path, staged / name)

    def send() -> Pushed:
        try:
            return push_to_hub(staged, repo_id, **asked)
        except RemosError as error:
            logger.warning("A push while training did not end; training goes on. %s", error)
            raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    return HfApi().run_as_future(send)


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
    stale = [name for name in there if is_of_a_student(name) and name not in files]
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
