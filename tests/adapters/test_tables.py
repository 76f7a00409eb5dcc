import csv
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.adapters.tables import is_table, read_rows

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_what_the_csv_and_json_modules_write_is_read_back(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "d.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("a", "b"), *rows])
    (folder / "d.jsonl").write_text("".join(f"{json.dumps(dict(zip('ab', row, strict=True)))}\n" for row in rows))
    for name in ("d.csv", "d.jsonl"):
        assert [tuple(row.values()) for row in read_rows(folder / name)] == rows


def test_a_quote_in_a_tsv_is_a_character_like_any_other(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_bytes(b'text\tlabel\r\n"No, he said\t007\r\n\r\nnull\tNA\r\n')
    assert read_rows(path).to_list() == [{"text": '"No, he said', "label": "007"}, {"text": "null", "label": "NA"}]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.json", "d.csv.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name):
    lines = {
        ".csv": '"text",label\ngood,1\n',
        ".tsv": "text\tlabel\ngood\t1\n",
        ".json": '[{"text": "good", "label": "1"}]',
    }
    text = lines.get(name[1:], lines[".csv"] if "csv" in name else '{"text": "good", "label": "1"}')
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert is_table(tmp_path / name) and read_rows(tmp_path / name).to_list() == [{"text": "good", "label": "1"}]


def test_a_long_text_is_read_and_the_limit_of_the_csv_module_stays(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "d.csv").write_text(f"text\n{'word ' * 40_000}\n")
    assert len(read_rows(tmp_path / "d.csv")[0]["text"]) == 200_000 and csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("d.csv", b"text,label,label\na,1,0\n", "names 'label' twice"),
        ("d.csv", b"label,text\n1,fine\n0,bad, really\n", "d.csv, line 3: .* 3 fields, the header 2 .*in quotes"),
        (
            "d.tsv",
            b"label\ttext\n1\ta\tb\n",
            "line 2: .* 3 fields, the header 2 .label, text.. A text cannot hold a tab",
        ),
        ("d.tsv", b"text\tlabel\na\t1\nb\n", "line 3: .* 1 fields"),
        ("d.csv", b"text;label\na;1\n", "separated by semicolons; expected commas"),
        ("d.csv", b"text\tlabel\na\t1\n", "separated by tabs; expected commas"),
        ("d.tsv", b"text,label\na,1\n", "separated by commas; expected tabs"),
        ("d.csv", b'text,label\n"a,1\nb,0\n', "line 3: unexpected end of data"),
        ("d.csv", b'text,label\n"a" b,1\n', "line 2: .*written twice"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}', "line 2: an object names 'text' twice"),
        ("d.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": "1"}', "sample 1 holds '1' in column 'label'"),
        ("d.jsonl", b'{"label": 1}\n{"label": true}', "sample 1 holds True in column 'label'"),
        ("d.jsonl", b'{"text": "good \\ud83d film"}', "sample 0 holds half a character in column 'text'"),
        ("d.jsonl", b'{"label": 730000000000000000000000}', "cannot be read as .jsonl"),
        ("d.jsonl", b'{"a": 1}\n' + b"[" * 100_000, "line 2: neither a JSON array nor"),
        ("d.jsonl", b'{"text": "a"', "line 1: neither a JSON array nor a JSON object a line"),
        ("d.json", b'["a"]', "sample 0 is no JSON object of columns, but 'a'"),
        ("d.tsv", b"text\tlabel\n", "holds no sample"),
        ("d.csv", b"\n\n", "holds no sample"),
        ("d.json", b"[]", "holds no sample"),
        ("d.tsv", b"", "holds no sample"),
        ("d.tsv", b"text\n\xff\n", "cannot be read as .tsv text in UTF-8"),
        ("d.tsv.gz", b"text\n", "cannot be read as .tsv"),
        ("d.tsv.gz", gzip.compress(b"text\nlong enough\n", mtime=0)[:-9], "cannot be read as .tsv"),
        ("d.parquet", b"PAR1", "cannot be read as .parquet"),
        ("d.parquet", b"PAR1" + b"\xff" * 20 + b"\x0a\0\0\0PAR1", "cannot be read as .parquet"),
        ("d.tsv", b"te\0xt\0\nb\n", "cannot be read as .tsv"),
    ],
)
def test_files_that_cannot_be_taken_at_their_word_are_refused(tmp_path, name, content, told):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as raised:
        read_rows(path)
    assert str(path) in str(raised.value)


def test_numbers_of_both_kinds_and_missing_values_are_one_column(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"score": 1}\n{"score": 0.5}\n{"other": "x"}\n')
    found = read_rows(tmp_path / "d.jsonl")
    assert found.to_dict() == {"score": [1.0, 0.5, None], "other": [None, None, "x"]}


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*d.csv"):
        read_rows(tmp_path / "d.csv")
