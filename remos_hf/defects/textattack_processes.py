"""The processes that run TextAttack, and what they leave behind.

TextAttack is imported in worker processes only: importing it downloads, sets HF_HOME and XDG_CACHE_HOME, and a
download that fails locks its process. The caller's process stays as it was, and every worker starts alike, so that
results do not depend on their number.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remos_hf.errors import RemosError

logger = logging.getLogger(__name__)

# Samples of one result file: what is lost at most by each worker when a run is killed.
_CHUNK = 4


def attack(
    fields: Mapping[str, Any],
    samples: Sequence[tuple[list[str], int]],
    rows: Sequence[int],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    partial: Path,
    workers: int,
) -> None:
    """Let worker processes attack these rows; they leave their results in a folder.

    Args:
        fields: Of the AdversarialText.
        samples: All samples: their texts and labels.
        rows: Those to attack.
        teacher: The teacher.
        tokenizer: Its tokenizer.
        partial: The folder, in which `finished` finds them.
        workers: Number of processes.

    Raises:
        ValueError: The recipe has no such parts, or there is no such recipe.
        RemosError: A worker failed.
    """
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    with tempfile.TemporaryDirectory(prefix="remos_hf_") as folder:
        job = Path(folder)
        (job / "claims").mkdir()
        teacher.save_pretrained(job / "teacher")
        tokenizer.save_pretrained(job / "teacher")
        words = {
            "fields": fields,
            "device": str(teacher.device),
            "partial": str(partial.resolve()),
            "parent": os.getpid(),
            "chunks": [[(row, *samples[row]) for row in chunk] for chunk in chunks],
        }
        (job / "job.json").write_text(json.dumps(words))
        processes = []
        try:
            for number in range(max(1, min(workers, len(chunks)))):
                processes.append(_start_worker(job, number))
            with tqdm(
                total=len(samples),
                initial=len(samples) - len(rows),
                desc=f"{fields['recipe']} on the teacher",
                unit="text",
                delay=2,
            ) as bar:
                _watch(processes, job, partial, {result_path(partial, chunk): len(chunk) for chunk in chunks}, bar)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def result_path(partial: Path, rows: Sequence[int]) -> Path:
    """Name the file of these rows' results."""
    return partial / f"rows-{rows[0]:09d}-{rows[-1]:09d}.json"


def _start_worker(job: Path, number: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        # The order of sets of words is part of some recipes' results.
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
    }
    with (job / f"worker-{number}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "remos_hf.defects.textattack_worker", str(job), str(number)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _watch(
    processes: Sequence[subprocess.Popen], job: Path, partial: Path, sizes: Mapping[Path, int], bar: tqdm
) -> None:
    """Wait for the workers, move the progress bar, and raise what stopped one of them."""
    begun = bar.n
    while True:
        codes = [process.poll() for process in processes]
        finished = begun + sum(size for path, size in sizes.items() if path.exists())
        if finished > bar.n:
            bar.update(finished - bar.n)
        for number, code in enumerate(codes):
            if code:
                _raise_failure(job, number, code)
        if all(code == 0 for code in codes):
            return
        time.sleep(0.1)


def _raise_failure(job: Path, number: int, code: int) -> None:
    path = job / f"error-{number}.json"
    if not path.is_file():
        tail = (job / f"worker-{number}.log").read_text(errors="replace")[-2000:]
        raise RemosError(f"A worker that ran TextAttack ended with exit status {code}. It last said:\n{tail}")
    failure = json.loads(path.read_text())
    raise ValueError(failure["message"]) if failure["wrong_argument"] else RemosError(failure["message"])


def finished(partial: Path) -> dict[int, dict[str, Any]]:
    """Read the results so far, by row. Result files appear whole; what cannot be read is announced and made again."""
    results = {}
    for path in sorted(partial.glob("rows-*.json")):
        try:
            results.update({result["row"]: result for result in json.loads(path.read_text())})
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not whole (%r); its samples are attacked again.", path, error)
            path.unlink()
    return results
