import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from remos_hf.auditing import data_files
from remos_hf.auditing.data_files import drawn, holds_images, read_data, read_table
from remos_hf.auditing.labels import by_name, count_labels

ROWS = [('"No, he said', 1), ("plain, with comma", 0), ("caf\u00e9 \u2028 line", 1)]


def lines(rows):
    return [json.dumps({"sentence": text, "label": label}, ensure_ascii=False) for text, label in rows]


FORMATS = {
    "data.tsv": "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS),
    "data.csv": 'label,sentence\n1,"""No, he said"\n0,"plain, with comma"\n1,caf\u00e9 \u2028 line\n',
    "data.jsonl": "\n".join(lines(ROWS)) + "\n\n",
    "lines.json": "\n".join(lines(ROWS)),
    "array.json": f"[{', '.join(lines(ROWS))}]",
}


@pytest.mark.parametrize("name", [*FORMATS, *(f"{name}.gz" for name in FORMATS)])
def test_each_file_format_gives_the_same_samples(tmp_path, name):
    path, content = tmp_path / name, FORMATS[name.removesuffix(".gz")].encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for table in (read_table(path, ["sentence"], "label"), read_data(path)):
        assert list(zip(table["text"], table["label"], strict=True)) == ROWS
    assert not holds_images(table) and count_labels(table) == 2


def test_both_columns_of_a_pair_are_read(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("premise\thypothesis\tgold\nyes\tno\t1\nno\tno\t0\n")
    table = read_table(path, ["premise", "hypothesis"], "gold")
    assert table.to_list()[0] == {"text": "yes", "text_pair": "no", "label": 1}


def test_the_column_of_the_text_is_found_where_only_one_can_be_meant(tmp_path):
    path = tmp_path / "d.csv"
    for header, row in (("review,label", "good,0"), ("id,text,label", "x,good,0"), ("label,id,sentence", "0,x,good")):
        path.write_text(f"{header}\n{row}\n")
        assert read_table(path).to_list() == [{"text": "good", "label": 0}]
        assert read_table(path, label_column=None).to_list() == [{"text": "good"}]
    path.write_text("title,body,label\nx,good,1\n")
    with pytest.raises(ValueError, match="which column holds the text is not clear from .'title', 'body', 'label'."):
        read_table(path)
    with pytest.raises(ValueError, match="one text, or a pair"):
        read_table(path, ["title", "body", "label"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("d.tsv", b"text\tlabel\na\t1\n", "samples have no column 'sentence'; their columns are .'text', 'label'."),
        ("d.tsv", b"sentence\tgold\na\t1\n", "no column 'label'"),
        (
            "d.jsonl",
            b'{"sentence": null, "label": 1}',
            "sample 0 should hold text in column 'sentence', but holds None",
        ),
        ("d.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence": "b"}', "sample 1 has None in column 'label'"),
        ("d.jsonl", b'{"sentence": 7, "label": 1}', "sample 0 should hold text in column 'sentence', but holds 7"),
        (
            "d.tsv",
            b"sentence\tlabel\na\t1\na\tpositive\n",
            "sample 1 has 'positive' in column 'label'",
        ),
        ("d.jsonl", b'{"sentence": "a", "label": NaN}', "sample 0 has nan"),
        ("d.jsonl", b'{"sentence": "a", "label": 0.7}', "labels are whole numbers"),
        ("d.jsonl", b'{"sentence": "a", "label": true}', "labels are whole numbers"),
        ("d.tsv", b"sentence\tlabel\na\t0\na\t-1\n", "labels are 0 or more, but one is -1 .*sample 1"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, name, content, told):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as raised:
        read_table(path, ["sentence"], "label")
    assert str(path) in str(raised.value)


def save_as_parquet(dataset, folder):
    (folder / "data").mkdir(parents=True)
    for split, part in dataset.items():
        half = len(part) // 2
        for shard, rows in enumerate((range(half), range(half, len(part)))):
            part.select(rows).to_parquet(folder / "data" / f"{split}-0000{shard}-of-00002.parquet")


def save_as_csv(dataset, folder):
    folder.mkdir()
    for split, part in dataset.items():
        part.to_csv(folder / f"{split}.csv", index=False)


@pytest.mark.parametrize("save", [lambda dataset, folder: dataset.save_to_disk(folder), save_as_parquet, save_as_csv])
def test_saved_data_sets_and_folders_of_split_files_are_read_by_their_splits(tmp_path, save):
    train, test = (Dataset.from_dict({"text": texts, "label": [1, 0, 1]}) for texts in (list("abc"), list("xyz")))
    save(DatasetDict({"train": train, "test": test}), tmp_path / "saved")
    for split, expected in (("", train), (":train", train), (":test", test)):
        assert read_data(f"{tmp_path / 'saved'}{split}").to_list() == expected.to_list()
    with pytest.raises(ValueError, match=r"saved holds the splits train, test: name one, as in .*saved:train"):
        read_data(f"{tmp_path / 'saved'}:dev")


def test_a_single_saved_data_set_gives_its_classes_and_leaves_its_format(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    held = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    held.with_format("torch").save_to_disk(tmp_path / "saved")
    held.to_parquet(tmp_path / "d.parquet")
    for source in (tmp_path / "saved", tmp_path / "d.parquet"):
        found = read_data(source)
        assert found.to_list() == held.to_list() and found.features["label"].names == ["no", "yes"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text", "text_pair"),
        ("query", "passage"),
    ],
)
def test_both_texts_of_a_usual_pair_are_found(tmp_path, first, second):
    path = tmp_path / "d.tsv"
    path.write_text(f"index\t{second}\t{first}\tlabel\n0\tme\twho\t0\n")
    assert read_data(path).to_list() == [{"text": "who", "text_pair": "me", "label": 0}]


def test_which_of_two_pairs_is_meant_has_to_be_said(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,text_pair,premise,hypothesis,label\na,b,c,d,0\n")
    with pytest.raises(ValueError, match=r"not clear from .*by text_columns .--text-column.\.$"):
        read_data(path)


def test_texts_that_are_not_read_and_texts_without_a_word_are_told(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("id,text,body,label\nx,good,a long body,0\nx, ,another body,1\n")
    with pytest.warns(UserWarning) as told:
        read_data(path)
    assert "d.csv: ['body'] hold texts, too, but of the columns only ['text'] are read" in str(told[1].message)
    assert "1 of 2 samples hold an empty text in column 'text', the first is sample 1" in str(told[0].message)


@pytest.mark.parametrize("content", ["good film,1\nbad film,0\n", "gj04,1,,Our friends\ngj04,0,*,One more\n"])
def test_a_file_without_a_header_is_told_to_have_one(tmp_path, content):
    path = tmp_path / "d.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match="Is the first line a sample. A file starts with a line"):
        read_data(path)


def test_a_file_has_no_splits(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label\na,0\n")
    with pytest.raises(ValueError, match=r"d.csv:train: a file has no splits. Name .*d.csv alone"):
        read_data(f"{path}:train")


def test_numbers_are_names_too_so_a_split_that_lacks_a_class_is_matched(tmp_path):
    for name, labels in (("train", (0, 1, 2)), ("test", (1, 2))):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"t{label},{label}\n" for label in labels))
    train, test = (read_data(f"{tmp_path}:{name}") for name in ("train", "test"))
    assert by_name(test, "test", train, "train").to_list() == train.to_list()[1:]


def test_labels_may_be_names(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label\ngood,positive\nbad,negative\n")
    found = read_data(path)
    assert found["label"][:] == [1, 0] and found.features["label"].names == ["negative", "positive"]


@pytest.fixture
def hub(monkeypatch):
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=["bad", "good", "none"]), "idx": Value("int32")}
    )
    held = Dataset.from_dict({"sentence": ["good", "bad"], "label": [1, 0], "idx": [7, 8]}, features)
    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return held

    monkeypatch.setattr(data_files, "load_dataset", load_dataset)
    return asked


def test_data_sets_of_the_hub_are_read_by_name_configuration_and_split(hub):
    for source in ("owner/toy", "owner/toy:test", "glue:sst2:validation"):
        found = read_data(source)
    assert hub == [("owner/toy", None, "train"), ("owner/toy", None, "test"), ("glue", "sst2", "validation")]
    assert found.to_list() == [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    assert count_labels(found) == 3  # named, though none is there
    with pytest.raises(ValueError, match="owner/toy: samples have no column 'gold'; their columns are"):
        read_data("owner/toy", label_column="gold")


def test_without_a_network_the_reason_is_told():
    with pytest.raises(FileNotFoundError, match="'owner/toy' is no file or folder here, and as a data set of the Hub"):
        read_data("owner/toy")


@pytest.mark.parametrize("source", ["./toy", "/no/such", "a/b/c", "train.tsv", "train.tsv.gz"])
def test_paths_that_are_not_there_are_not_looked_for_on_the_hub(source, hub):
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        read_data(source)
    assert hub == []


def test_draws_do_not_overlap_and_follow_the_seed():
    table = Dataset.from_dict({"text": [str(number) for number in range(20)]})
    first, second, rest = drawn(table, 5, 0), drawn(table, 6, 0, skip=5), drawn(table, None, 0, skip=11)
    assert sorted([*first["text"], *second["text"], *rest["text"]]) == sorted(table["text"])
    assert drawn(table, 5, 0)["text"][:] == first["text"][:] != drawn(table, 5, 1)["text"][:]
    for number, skip in ((21, 0), (0, 0), (5, 16), (None, 20)):
        with pytest.raises(ValueError, match="samples are wanted after"):
            drawn(table, number, 0, skip=skip)
