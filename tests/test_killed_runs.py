"""Runs that are killed at writes: RemosTrainer, fit, slice and audit go on by themselves, end alike, and leave nothing.

A run is made in a child of this process, which dies at its n-th write: as it opens, flushes, renames or removes a file,
or in the midst of writing a tensor file. 15 places of each run, drawn by seed; `REMOS_KILLS` asks for more.

    python -m pytest tests/test_killed_runs.py -m slow     # 60 kills, some minutes
"""

import builtins
import hashlib
import io
import json
import logging
import os
import random
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from remos_hf.cli import commands
from remos_hf.strategies.slice_and_reset import Remos
from remos_hf.training.accelerate_loop import fit
from remos_hf.training.trainer import RemosTrainer
from tests import tiny
from tests.auditing.audits import Log, run_audit, small_audit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]
KILLS = int(os.environ.get("REMOS_KILLS", "15"))
WRITES = "wax+"


# --- the runs ---


def train(folder):
    rows = {"input_ids": torch.arange(160).reshape(16, 10).remainder(50).tolist(), "labels": [0, 1] * 8}
    args = TrainingArguments(
        str(folder / "run"),
        num_train_epochs=3,
        save_strategy="epoch",
        save_total_limit=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    begun = any((folder / "run").glob("checkpoint-*"))
    trainer = RemosTrainer(tiny.bert(), args, slice_ratio=0.8, train_dataset=Dataset.from_dict(rows))
    trainer.train(resume_from_checkpoint=begun or None)
    trainer.save_model()


def fit_student(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    rows = [(row, number % 3) for number, row in enumerate(torch.randn(20, 6))]
    fit(
        model,
        rows,
        optimizer=lambda model: torch.optim.Adam(model.parameters()),
        strategy=Remos(0.8, head=("2",)),
        epochs=3,
        batch_size=8,
        output_dir=folder / "run",
        save_steps=2,
        resume_from_checkpoint=any((folder / "run").glob("checkpoint-*")) or None,
        progress=False,
    )


def slice_teacher(folder):
    options = ("--rule", "top_magnitude", "--slice-ratio", "0.8", "--overwrite", "--output", str(folder / "run"))
    sys.argv = ["remos", "slice", str(folder / "teacher"), *options]
    try:
        commands.main()
    except SystemExit as end:
        assert not end.code, f"remos slice ended with {end.code}"


def prepare(folder):
    """Write a teacher, an earlier result and another's file beside it."""
    tiny.bert().save_pretrained(folder / "teacher")
    (folder / "run").mkdir()
    for name in ("remos_config.json", "model.safetensors", "notes.txt"):
        (folder / "run" / name).write_text("{}")


def audit(folder):
    run_audit(small_audit(Log(folder.parent / "log")), folder / "run", keep_students=True, progress=False)


RUNS = {"train": train, "fit": fit_student, "slice": slice_teacher, "audit": audit}


# --- killing ---


class Writes:
    """Counts the writes of this process, and ends it at one of them."""

    def __init__(self, dies_at):
        self.dies_at, self.count = dies_at, 0

    def step(self):
        self.count += 1
        return self.count == self.dies_at

    def before(self, real):
        def call(*arguments, **options):
            if self.step():
                os._exit(9)
            return real(*arguments, **options)

        return call

    def opening(self, real):
        def call(file, mode="r", *arguments, **options):
            watched = isinstance(mode, str) and any(letter in mode for letter in WRITES) and not isinstance(file, int)
            last = watched and self.step()
            opened = real(file, mode, *arguments, **options)
            if last:
                os._exit(9)
            return opened

        return call

    def half(self, real, place):
        def call(*arguments, **options):
            done = real(*arguments, **options)
            if self.step():
                path = arguments[place]
                os.truncate(path, Path(path).stat().st_size // 2)
                os._exit(9)
            return done

        return call

    def watch(self):
        for name in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.before(getattr(os, name)))
        builtins.open = io.open = self.opening(builtins.open)
        safetensors.torch.serialize_file = self.half(safetensors.torch.serialize_file, 1)
        torch.save = self.half(torch.save, 1)


def in_a_child(run, folder, dies_at=0):
    """Do a run in a child process; give its exit status and the number of its writes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            logging.disable(logging.CRITICAL)
            quiet = os.open(folder.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            writes = Writes(dies_at)
            writes.watch()
            run(folder)
            os.write(write, str(writes.count).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the parent tells it
            os.write(write, traceback.format_exc()[-3000:].encode())
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def left(folder):
    """Name everything in a folder, and give what its tensor files hold and a report says."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, content = path.relative_to(folder).as_posix(), None
        if path.suffix == ".safetensors":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "report.json":
            records = json.loads(path.read_text())["records"]
            content = [{key: one for key, one in record.items() if key != "made"} for record in records]
        found[name] = content
    return found


def without_older(found, meant):
    """Leave out checkpoints that Trainer was about to rotate away; it does so with the next one, if one comes."""
    known = {key.split("/")[1] for key in meant if key.startswith("run/checkpoint-")}
    oldest = min(int(one.removeprefix("checkpoint-")) for one in known)
    older = tuple(f"run/checkpoint-{step}" for step in range(oldest))
    return {key: value for key, value in found.items() if "/".join(key.split("/")[:2]) not in older}


@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_go_on_by_themselves_end_alike_and_leave_nothing(tmp_path, name):
    folder = tmp_path / "whole" / "folder"
    folder.mkdir(parents=True)
    if name == "slice":
        prepare(folder)
    status, told = in_a_child(RUNS[name], folder)
    assert status == 0, told
    meant, failures = left(folder), []
    places = sorted(random.Random(name).sample(range(1, int(told) + 1), min(KILLS, int(told))))
    for place in places:
        folder = tmp_path / f"at {place}" / "folder"
        folder.mkdir(parents=True)
        if name == "slice":
            prepare(folder)
        status, _ = in_a_child(RUNS[name], folder, place)
        assert status == 9, (place, status)
        status, problem = in_a_child(RUNS[name], folder)
        found = without_older(left(folder), meant) if name == "train" else left(folder)
        if status != 0:
            failures.append(f"killed at write {place} of {told}, it did not go on: {problem}")
        elif found != meant:
            others = {key for key in found.keys() | meant.keys() if found.get(key, 0) != meant.get(key, 0)}
            failures.append(f"killed at write {place} of {told}, it ended otherwise: {sorted(others)}")
        else:
            shutil.rmtree(folder.parent)
    logging.getLogger(__name__).warning("%s: %d kills at writes %s of %s", name, len(places), places, told)
    assert not failures, "\n".join(failures)
