import re

import pytest
from PIL import Image

from remos_hf.auditing.class_folders import IMAGES, read_folder
from remos_hf.auditing.data_files import holds_images, read_data
from remos_hf.auditing.labels import by_name, count_labels


def image_folder(folder, classes=("cat", "dog"), count=2):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.PNG").write_bytes(f"{name}{number}".encode())
    return folder


def test_a_folder_of_class_folders_gives_the_files_as_they_are(tmp_path):
    (image_folder(tmp_path) / "cat" / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match=r"entries left out of the images in .*: cat/notes\.txt\. Images are"):
        found = read_data(tmp_path)
    assert holds_images(found) and count_labels(found) == 2 and found["label"][:] == [0, 0, 1, 1]
    assert found["image"][:][3] == {"bytes": b"dog1", "path": "dog/1.PNG"}
    assert found.features["label"].names == ["cat", "dog"]


def test_folders_that_hold_no_task_are_refused(tmp_path):
    image_folder(tmp_path / "train")
    (tmp_path / "train" / "owl").mkdir()
    with pytest.raises(ValueError, match="owl holds no image"):
        read_folder(tmp_path / "train")
    image_folder(tmp_path / "one", classes=("cat",))
    with pytest.raises(ValueError, match="a folder of images for each class, but holds .'cat'."):
        read_folder(tmp_path / "one")
    with pytest.raises(ValueError, match=r"but holds \[\]"):
        read_folder(tmp_path / "missing")


def left_by_notebooks(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(b"")


def left_by_archives(folder):
    (folder / "__MACOSX").mkdir()
    (folder / "cat" / "._0.png").write_bytes(b"")


def deeper(folder):
    (folder / "dog" / "puppies").mkdir()
    (folder / "dog" / "puppies" / "0.png").write_bytes(b"")


def called_like_an_image(folder):
    (folder / "cat" / "album.jpg").mkdir()


@pytest.mark.parametrize(
    ("leave", "told"),
    [
        (left_by_notebooks, r"\.ipynb_checkpoints/"),
        (left_by_archives, r"__MACOSX/, cat/\._0\.png"),
        (deeper, "dog/puppies/"),
        (called_like_an_image, r"cat/album\.jpg/"),
    ],
)
def test_what_is_no_class_and_no_image_is_left_out_and_told(tmp_path, leave, told):
    leave(image_folder(tmp_path))
    with pytest.warns(UserWarning, match=f"entries left out of the images in .*: {told}"):
        found = read_folder(tmp_path)
    assert found.features["label"].names == ["cat", "dog"] and found["label"][:] == [0, 0, 1, 1]
    # It stays with the data, whatever becomes of it.
    kept = by_name(found.select([0, 1]), "test", ["dog", "cat"], "train")
    assert re.search(told, kept.info.description) and kept["label"][:] == [1, 1]


def test_every_kind_of_image_file_is_read_where_it_lies(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for ending in IMAGES:
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"0{ending}")
    assert len(read_folder(tmp_path)) == 2 * len(IMAGES)


def test_a_folder_of_splits_is_no_folder_of_classes_but_each_split_is(tmp_path):
    for split in ("train", "test"):
        image_folder(tmp_path / split)
    with pytest.raises(ValueError, match="holds no image .* splits, not classes"):
        read_folder(tmp_path)
    assert read_data(f"{tmp_path}:test").to_list() == read_data(tmp_path / "test").to_list()
