import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from remos_hf.whole import beside, remove_folder, replace_file, settle, whole_file, whole_folder

ROOT = Path(__file__).parents[1]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def fill(folder, text="new"):
    (folder / "in").mkdir(parents=True)
    for name in ("a", "in/b"):
        (folder / name).write_text(text)


_KILLED = """
import os, pathlib, sys
from remos_hf.whole import whole_folder
place, dies_at, seen = pathlib.Path(sys.argv[1]), int(sys.argv[2]), 0
def dying(real):
    def counted(*arguments, **options):
        global seen
        seen += 1
        if seen == dies_at:
            os._exit(9)
        return real(*arguments, **options)
    return counted
for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
with whole_folder(place, replace=True) as folder:
    (folder / "in").mkdir()
    for name in ("a", "in/b"):
        (folder / name).write_text("new")
    if not dies_at:
        os._exit(9)
"""


def killed(place, dies_at):
    """Write a folder in a process that dies at its n-th flush, rename or removal; 0 is before all of them."""
    command = [sys.executable, "-c", _KILLED, str(place), str(dies_at)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60).returncode == 9


# --- files ---


def test_a_file_appears_when_the_block_ends_and_replaces_the_old_one(tmp_path):
    place = tmp_path / "deep" / "a.txt"
    for text in ("old", "newer"):
        with whole_file(place) as path:
            path.write_text(text)
            assert path == beside(place) and (text == "old") != place.exists()
        assert place.read_text() == text
    assert names(tmp_path) == ["deep/a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    replace_file(tmp_path / "a", b"old")
    with pytest.raises(error), whole_file(tmp_path / "a") as path:
        path.write_bytes(b"half")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_what_a_killed_run_left_of_a_file_is_taken_over(tmp_path):
    (tmp_path / ".a.writing").write_bytes(b"half of something long")
    replace_file(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"new"


def test_a_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    replace_file(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / ".a.writing").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="is a link"):
        replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def test_many_writers_of_one_file_leave_one_whole_content(tmp_path):
    def write(number):
        for _ in range(20):
            replace_file(tmp_path / "a", bytes([number]) * 5000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 5000 and len(set(content)) == 1 and names(tmp_path) == ["a"]


# --- folders ---


def test_a_folder_appears_when_the_block_ends(tmp_path):
    place = tmp_path / "deep" / "s"
    with whole_folder(place) as folder:
        fill(folder)
        assert not place.exists()
    assert names(tmp_path) == ["deep/s/a", "deep/s/in/b"]


def test_an_empty_folder_is_taken_and_a_full_one_only_if_it_is_to_be_replaced(tmp_path):
    (tmp_path / "s").mkdir()
    for replace in (False, True):
        with whole_folder(tmp_path / "s", replace=replace) as folder:
            fill(folder, str(replace))
    assert (tmp_path / "s" / "a").read_text() == "True" and names(tmp_path) == ["s/a", "s/in/b"]
    with pytest.raises(FileExistsError, match="is there already"), whole_folder(tmp_path / "s"):
        raise AssertionError("it said nothing before the work")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "file", replace=True):
        pass
    assert names(tmp_path) == ["file", "s/a", "s/in/b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_folder_is_there_and_nothing_else(tmp_path, error):
    fill(tmp_path / "s", "old")
    with pytest.raises(error), whole_folder(tmp_path / "s", replace=True) as folder:
        fill(folder / "x")
        raise error
    with pytest.raises(error), whole_folder(tmp_path / "other" / "s") as folder:
        fill(folder / "x")
        raise error
    assert names(tmp_path) == ["s/a", "s/in/b"] and (tmp_path / "s" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("dies_at", range(12))  # flushes, renames, removals
@pytest.mark.parametrize("next_run", ["writes", "settles"])
def test_a_run_killed_anywhere_loses_no_folder_and_the_next_leaves_nothing(tmp_path, dies_at, next_run):
    fill(tmp_path / "s", "old")
    assert killed(tmp_path / "s", dies_at)
    if next_run == "writes":
        with whole_folder(tmp_path / "s", replace=True) as folder:
            fill(folder, "third")
    else:
        settle(tmp_path)
    assert names(tmp_path) == ["s/a", "s/in/b"] and [path.name for path in tmp_path.iterdir()] == ["s"]
    found = {(tmp_path / "s" / name).read_text() for name in ("a", "in/b")}
    assert found == {"third" if next_run == "writes" else "old" if dies_at < 7 else "new"}


def test_a_folder_that_another_process_writes_is_refused_or_waited_for_and_let_be(tmp_path):
    with whole_folder(tmp_path / "s") as folder:
        fill(folder, "first")
        with pytest.raises(FileExistsError, match="another process is writing"), whole_folder(tmp_path / "s"):
            pass
        settle(tmp_path)
        assert names(folder) == ["a", "in/b"]
        waiting = threading.Thread(target=lambda: _write_waiting(tmp_path / "s"))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(10)
    assert (tmp_path / "s" / "a").read_text() == "second" and names(tmp_path) == ["s/a", "s/in/b"]


def _write_waiting(place):
    with whole_folder(place, replace=True, wait=True) as folder:
        fill(folder, "second")


def test_here_is_a_folder_too(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    monkeypatch.chdir(tmp_path / "s")
    with whole_folder(Path(), replace=True) as folder:
        fill(folder)
    assert names(tmp_path) == ["s/a", "s/in/b"]


def test_a_removed_folder_is_gone(tmp_path):
    fill(tmp_path / "s")
    fill(tmp_path / ".s.gone")
    remove_folder(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


# --- what killed runs left ---


def test_all_that_killed_runs_left_of_these_names_is_cleared_and_said(tmp_path, caplog):
    caplog.set_level("INFO", "remos_hf.whole")
    fill(tmp_path / "run-1", "kept")
    for name in (".run-1.writing", ".run-2.old", ".run-1.old", ".run-3.gone"):
        fill(tmp_path / name, name)
    (tmp_path / ".run-4.json.writing").touch()
    (tmp_path / ".run-4.json.1234.tmp").touch()  # as earlier versions wrote
    theirs = [".bashrc.old", ".run-4.json.bak", ".run-5.tmp"]
    for name in theirs:
        (tmp_path / name).touch()
    settle(tmp_path, "run-*")
    assert names(tmp_path) == sorted([*theirs, "run-1/a", "run-1/in/b", "run-2/a", "run-2/in/b"])
    assert (tmp_path / "run-1" / "a").read_text() == "kept" and (tmp_path / "run-2" / "a").read_text() == ".run-2.old"
    assert "what a killed run left of" in caplog.text and "run-4.json" in caplog.text
    settle(tmp_path / "nowhere")
