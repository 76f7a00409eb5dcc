"""A file or a folder that appears whole or not at all; what a killed run left is cleaned by the next.

What goes to NAME is written beside it under a fixed name and renamed when it is all there and flushed:

    .NAME.writing   being written, or left by a killed run: the next that writes NAME takes it over, emptied
    .NAME.old       the folder that stood at NAME, whole, while a new one takes its place; put back if that did not come
    .NAME.gone      a folder on its way out, never read again

Two processes at once: a lock on `.NAME.writing` says that its writer lives; the system lets go of it when a process
dies. Of a file the second writer waits, and its content stays in the end. Of a folder it is refused, unless it asks to
wait. Where there are no such locks (Windows, some network disks), two writers of one name are not told apart.
"""

import contextlib
import glob
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<state>writing|old|gone|\d+\.tmp)")  # the last by earlier versions: a process's


def beside(place: Path) -> Path:
    """Name what is being written for a place, for other processes that write a part of it."""
    return _named(place, "writing")


@contextlib.contextmanager
def whole_file(place: Path) -> Iterator[Path]:
    """Give an empty file to be written by whatever means. It takes its place when the block ends without an error.

    Args:
        place: The file, replaced if it exists; folders on the way to it are made.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    path = beside(place)
    claim = _claimed(path, folder=False, wait=True)
    try:
        path.write_bytes(b"")
        yield path
        _flush(path)
        path.replace(place)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        _let_go(claim)


def replace_file(place: Path, content: bytes) -> None:
    """Write a file so that whoever looks finds the old one or the new one, whole."""
    with whole_file(place) as path:
        path.write_bytes(content)


@contextlib.contextmanager
def whole_folder(place: Path, *, replace: bool = False, wait: bool = False) -> Iterator[Path]:
    """Give an empty folder to write in. It takes its place when the block ends; after an error nothing is left.

    Args:
        place: The folder; missing or empty, unless it is replaced. Folders on the way to it are made.
        replace: Whether a folder that is there goes, once the new one is whole.
        wait: Whether to wait for another process that is writing the same folder, instead of refusing.

    Raises:
        FileExistsError: The place is taken, or another process is writing to it.
    """
    place = place.resolve()  # "." and ".." have no name of their own, and a link's target is what is replaced
    made = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    path, claim, whole = beside(place), None, False
    try:
        claim = _claimed(path, folder=True, wait=wait)
        _empty(path)
        _settle(place)
        _check_free(place, replace)
        yield path
        for written in sorted(path.rglob("*")):
            if written.is_file():
                _flush(written)
        _check_free(place, replace)
        _put_in_place(path, place)
        whole = True
    finally:
        if claim is not None:
            if not whole:
                shutil.rmtree(path, ignore_errors=True)
                _settle(place)
            _let_go(claim)
        for parent in [] if whole else made:
            with contextlib.suppress(OSError):  # not empty: another's
                parent.rmdir()


def remove_folder(place: Path) -> None:
    """Remove a folder so that whoever looks finds it whole or not at all."""
    gone = _named(place, "gone")
    _remove(gone)
    place.rename(gone)
    _remove(gone)


def settle(folder: Path, pattern: str = "*") -> None:
    """Clear what killed runs left in a folder, and put back what one had moved aside; the log says where.

    What another process is writing stays.

    Args:
        folder: Where to look; it need not exist.
        pattern: Which names were written there, as a glob: hidden files of others may end in ".old" as well.
    """
    left = (_LEFT.fullmatch(path.name) for path in folder.glob(f".{pattern}.*"))
    for name in sorted({found["name"] for found in left if found}):
        place, claim = folder / name, None
        path = beside(place)
        if path.exists():
            try:
                claim = _claimed(path, folder=path.is_dir(), wait=False)
            except FileExistsError:
                continue
        logger.info("Cleared what a killed run left of %s.", place)
        for unfinished in (path, *folder.glob(f".{glob.escape(name)}.*.tmp")):
            if _LEFT.fullmatch(unfinished.name):
                _remove(unfinished)
        _settle(place)
        _let_go(claim)


def _named(place: Path, state: str) -> Path:
    return place.with_name(f".{place.name}.{state}")


def _settle(place: Path) -> None:
    old = _named(place, "old")
    gone = _named(place, "gone")
    _remove(gone)
    if old.is_dir():  # whole, as it goes by way of a rename
        old.rename(gone if place.exists() else place)
    _remove(gone)


def _put_in_place(new: Path, place: Path) -> None:
    if place.is_dir():  # a folder cannot be renamed over one that holds files, on Windows over none
        place.rename(_named(place, "old")) if any(place.iterdir()) else place.rmdir()
    new.rename(place)
    _settle(place)


def _check_free(place: Path, replace: bool) -> None:
    if place.exists() and not (place.is_dir() and (replace or not any(place.iterdir()))):
        raise FileExistsError(f"{place} is there already, and is not replaced. Name another, or remove it.")


def _claimed(path: Path, *, folder: bool, wait: bool) -> int | None:
    """Make a file or a folder and lock it: nobody else writes it as long as this process lives."""
    while True:
        if path.is_symlink():
            raise FileExistsError(f"{path} is a link. Remove it: it is written and renamed, and would lead elsewhere.")
        if folder:
            path.mkdir(exist_ok=True)
        if fcntl is None:
            return None
        try:
            claim = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # put in its place between the two calls
            if not folder:
                raise
            continue
        try:
            fcntl.flock(claim, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(claim)
            raise FileExistsError(
                f"{path} is there, and another process is writing to it. Wait for it, or name another place."
            ) from error
        except OSError:
            return claim  # a disk without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(claim), path.stat()):
                return claim
        os.close(claim)  # another process put it in its place, or gave it up, while this one waited


def _let_go(claim: int | None) -> None:
    if claim is not None:
        os.close(claim)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
