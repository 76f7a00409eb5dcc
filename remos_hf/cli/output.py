"""Where a command writes: whole or not at all, and never over what is not its own.

A result is written into a folder beside its place, which becomes the place when all is there. A folder that is not
empty is refused. With `--overwrite`, files of an earlier result of the same kind are replaced; all others go along.
"""

import glob
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remos_hf.profiling.coverage import COVERAGE_FILE
from remos_hf.sharing.record import CONFIG_FILE
from remos_hf.whole import settle, whole_folder


@dataclass(frozen=True)
class Result:
    """What a command leaves in its folder.

    Attributes:
        name: For messages.
        sign: The file that tells a folder with such a result.
        files: Patterns of the files that an earlier result may have left, and that go when it is replaced.
        not_with: A file that makes the folder something else.
    """

    name: str
    sign: str
    files: tuple[str, ...]
    not_with: str | None = None


PROFILE = Result("a coverage profile", COVERAGE_FILE, (COVERAGE_FILE,), not_with=CONFIG_FILE)
STUDENT = Result(
    "a student",
    CONFIG_FILE,
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "remos_*"),
)
SCAN = Result("a scan", "scan.json", ("scan.json", "scan.html"))
EXPLANATION = Result("an explanation", "explanation.json", ("explanation.json", "explanation.html"))


def check_output(folder: Path, result: Result, overwrite: bool, *, besides: str | None = None) -> None:
    """Refuse a folder that holds anything else than what may be replaced.

    Args:
        folder: Where the result goes.
        result: What is written.
        overwrite: Whether an earlier result of this kind may be replaced.
        besides: A name in the folder that does not count.

    Raises:
        FileExistsError: It is not empty, and `overwrite` is not given or there is no such result in it.
        NotADirectoryError: It is a file.
    """
    settle(folder.parent, glob.escape(folder.name))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output is a folder, but {folder} is a file. Name another.")
    held = sorted({path.name for path in folder.iterdir()} - {besides}) if folder.is_dir() else []
    if not held:
        return
    if result.sign not in held:
        raise FileExistsError(
            f"{folder} is not empty (it holds {_some(held)}) and is not {result.name} of ours, so nothing in it may be "
            "replaced. Name a new folder."
        )
    if result.not_with in held:
        raise FileExistsError(
            f"{folder} holds more than {result.name}: {result.not_with} is the record of a student. Name a new folder."
        )
    if not overwrite:
        raise FileExistsError(
            f"{folder} already holds {result.name}. Name a new folder, or replace it with --overwrite."
        )


@contextmanager
def written(folder: Path, result: Result) -> Iterator[Path]:
    """Give a folder to write a result into. It takes its place when the block ends; after an error nothing is left.

    Args:
        folder: The place, as `check_output` let it pass.
        result: What is written.
    """
    with whole_folder(folder, replace=True) as beside:
        yield beside
        _take_along(folder, beside, result)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait until a few renames are through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _take_along(folder: Path, beside: Path, result: Result) -> None:
    """Give what others hold in a folder a second name in the one that takes its place."""
    if not folder.is_dir():
        return
    replaced = {path for pattern in result.files for path in folder.glob(pattern) if path.is_file()}

    def left_out(at: str, names: list[str]) -> list[str]:
        there = beside / Path(at).relative_to(folder)
        return [
            name
            for name in names
            if (path := Path(at) / name) in replaced or ((there / name).exists() and not path.is_dir())
        ]

    shutil.copytree(folder, beside, symlinks=True, copy_function=_link, ignore=left_out, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copy2(source, target)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
