import signal
import threading

import pytest

from remos_hf.cli.output import PROFILE, STUDENT, check_output, uninterrupted, written


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_new_or_empty_folder_gets_the_result(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "deep" / "new", tmp_path / "empty"):
        check_output(place, STUDENT, overwrite=False)
        with written(place, STUDENT) as folder:
            fill(folder, remos_config__json="{}")
            fill(folder / "1_Pooling", config__json="pool")
            assert not place.exists() or not any(place.iterdir())
        assert files(place) == {"1_Pooling/config.json": "pool", "remos_config.json": "{}"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path, error):
    with pytest.raises(error), written(tmp_path / "deep" / "new", STUDENT) as folder:
        fill(folder, remos_config__json="{}")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_earlier_result_as_it_was(tmp_path):
    fill(tmp_path / "s", remos_config__json="old", model__safetensors="old")
    with pytest.raises(ValueError), written(tmp_path / "s", STUDENT) as folder:
        fill(folder, remos_config__json="new")
        raise ValueError
    assert files(tmp_path) == {"s/model.safetensors": "old", "s/remos_config.json": "old"}


def test_what_is_not_ours_is_refused_even_with_overwrite(tmp_path):
    fill(tmp_path / "theirs", notes__txt="mine")
    fill(tmp_path / "student", remos_config__json="", remos_coverage__safetensors="")
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not empty .it holds notes.txt. and is not a student of ours"):
            check_output(tmp_path / "theirs", STUDENT, overwrite)
        with pytest.raises(FileExistsError, match=r"remos_config.json is the record of a student"):
            check_output(tmp_path / "student", PROFILE, overwrite)
        with pytest.raises(NotADirectoryError, match="is a file"):
            check_output(tmp_path / "file", STUDENT, overwrite)


def test_an_earlier_result_is_replaced_only_if_asked_for(tmp_path):
    fill(tmp_path, remos_config__json="")
    with pytest.raises(FileExistsError, match="already holds a student.*--overwrite"):
        check_output(tmp_path, STUDENT, overwrite=False)
    check_output(tmp_path, STUDENT, overwrite=True)
    fill(tmp_path, asked__json="")
    with pytest.raises(FileExistsError):
        check_output(tmp_path, STUDENT, overwrite=False, besides="remos_config.json")


def test_replacing_takes_the_earlier_files_away_and_leaves_all_others(tmp_path):
    place = tmp_path / "s"
    shards = {"model-00001-of-00002__safetensors": "old", "model__safetensors__index__json": "old"}
    fill(place, remos_config__json="old", remos_slice__safetensors="old", notes__txt="mine", **shards)
    fill(place / "1_Pooling", config__json="old", mine__txt="mine")
    fill(place, **{"my-model__safetensors": "mine"})
    with written(place, STUDENT) as folder:
        fill(folder, remos_config__json="new", model__safetensors="new")
        fill(folder / "1_Pooling", config__json="new")
    assert files(place) == {
        "1_Pooling/config.json": "new",
        "1_Pooling/mine.txt": "mine",
        "model.safetensors": "new",
        "my-model.safetensors": "mine",
        "notes.txt": "mine",
        "remos_config.json": "new",
    }
    assert list(tmp_path.iterdir()) == [place]


def test_ctrl_c_waits_until_the_renames_are_through():
    done = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is before


def test_other_threads_write_too(tmp_path):
    def write():
        with written(tmp_path / "s", STUDENT) as folder:
            fill(folder, remos_config__json="{}")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert files(tmp_path) == {"s/remos_config.json": "{}"}
