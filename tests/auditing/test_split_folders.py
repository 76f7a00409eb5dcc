import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from remos_hf.auditing.class_folders import read_folder
from remos_hf.auditing.data_files import read_data
from remos_hf.auditing.split_folders import read_split, split_folder


def tables(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        stem, _, ending = name.rpartition("_")
        separator = "\t" if ending == "tsv" else ","
        (folder / f"{stem}.{ending}").write_text(f"text{separator}label\n{text}{separator}0\n")
    return folder


@pytest.mark.parametrize("asked", ["dev", "validation", "val"])
@pytest.mark.parametrize("called", ["dev", "validation", "my-valid"])
def test_a_split_may_be_called_by_any_of_its_usual_names(tmp_path, called, asked):
    tables(tmp_path, train_csv="a", **{f"{called}_csv": "b"})
    assert read_split(tmp_path, asked)["text"][:] == ["b"] and read_split(tmp_path, "")["text"][:] == ["a"]
    saved = DatasetDict({"train": Dataset.from_dict({"text": ["a"]}), called: Dataset.from_dict({"text": ["b"]})})
    saved.save_to_disk(tmp_path / "saved")
    assert read_split(tmp_path / "saved", asked)["text"][:] == ["b"]


def test_files_of_different_kinds_and_what_lies_beside_them_do_no_harm(tmp_path):
    tables(tmp_path, train_tsv="a", dev_csv="b", vocab_csv="c")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("README.md", "._train.csv", ".ipynb_checkpoints/train-checkpoint.csv"):
        (tmp_path / name).write_text("nothing")
    assert read_split(tmp_path, "train")["text"][:] == ["a"] and read_split(tmp_path, "dev")["text"][:] == ["b"]
    assert read_split(tmp_path, "vocab")["text"][:] == ["c"]


def test_the_exact_name_goes_before_one_that_has_it_for_a_part(tmp_path):
    tables(tmp_path, test_tsv="a", **{"test-labeled_tsv": "b", "test_12_tsv": "c"})
    assert read_split(tmp_path, "test")["text"][:] == ["a"] and read_split(tmp_path, "test-labeled")["text"][:] == ["b"]


def test_parts_of_a_split_are_joined_in_order_if_they_have_the_same_columns(tmp_path):
    tables(tmp_path, **{"train-00001-of-00002_csv": "b", "train-00000-of-00002_csv": "a", "test_csv": "c"})
    assert read_split(tmp_path, "")["text"][:] == ["a", "b"]
    (tmp_path / "train-00001-of-00002.csv").write_text("text\nb\n")
    with pytest.raises(ValueError, match=r"should be parts of one split, but one has the columns"):
        read_split(tmp_path, "")


@pytest.mark.parametrize(
    ("files", "asked", "told"),
    [
        ({"train_csv": "a", "train_tsv": "b"}, "", "holds train.csv and train.tsv: name the file that is meant"),
        ({"a-dev_csv": "a", "b-dev_csv": "b"}, "dev", "holds a-dev and b-dev: name one, as in .*:a-dev"),
        ({"train_0_csv": "a", "train_1_csv": "b"}, "train", "holds train_0 and train_1: name one"),
        ({"dev_csv": "a", "train_csv": "b"}, "gold", "holds the splits train, dev: name one, as in .*:train"),
        ({"one_csv": "a", "two_csv": "b"}, "", "holds the splits one, two"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path, files, asked, told):
    with pytest.raises(ValueError, match=told):
        read_split(tables(tmp_path, **files), asked)


def test_the_only_file_needs_no_name(tmp_path):
    assert read_split(tables(tmp_path, reviews_csv="a"), "")["text"][:] == ["a"]


def test_a_broken_saved_data_set_is_told(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="looks like a saved data set, but cannot be loaded"):
        read_split(tmp_path, "")


def test_folders_of_images_have_splits_by_the_same_names(tmp_path):
    for split, classes in (("train", "ab"), ("val", "b")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,caption\n")  # beside folders of images: no split
    assert read_split(tmp_path / "train", "") is None
    assert split_folder(tmp_path, "validation").name == "val" and split_folder(tmp_path, "") == tmp_path
    assert read_data(f"{tmp_path}:training").to_list() == read_folder(tmp_path / "train").to_list()
    with pytest.raises(ValueError, match="holds the splits train, val: name one"):
        split_folder(tmp_path, "test")
    with pytest.raises(ValueError, match="holds no split 'test'"):
        split_folder(tmp_path / "train" / "a", "test")
