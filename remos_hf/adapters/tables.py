"""The rows of a file as they are written: no quote dropped, no "null" or "007" read as something else, no row cut.

`datasets` reads csv by pandas, which guesses types, renames a column that is named twice and takes a field too many for
an index. Labels and texts have to be what the file says, so text is parsed here, and everything else by `datasets`.
"""

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet
from datasets import Dataset
from datasets.table import InMemoryTable

TABLES = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
# A quote in a GLUE tsv is a character like any other; in a csv it may hold a comma or a line break.
_DIALECTS = {".csv": {"strict": True}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst")
_MOST_COLUMNS = 2000  # a JSON object of all samples is no row, and takes minutes as one
_LONGEST_FIELD = 2**31 - 1  # characters; the csv module stops at 131,072


def is_table(path: Path) -> bool:
    """Whether a file's name ends as one that `read_rows` knows, also with .gz."""
    return _kind(path) in TABLES


def read_rows(path: str | Path) -> Dataset:
    """Read all columns of a file, the values as they are written.

    Args:
        path: A csv, tsv, json (an array, or a line a row) or jsonl file, also .gz, in UTF-8, with or without a byte
            order mark; or a parquet file. Without an ending it is read as csv.

    Returns:
        A row a sample. Values of csv and tsv are strings.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It ends otherwise, holds no row, a column is named twice, a row does not fit the header, a column
            holds values of different kinds, or a text is no text; names the file, and the line or the sample (the
            first is 0).
    """
    path = Path(path)
    kind = _kind(path)
    if kind not in (*TABLES, "") and path.is_file():
        packed = " Unpack it first." if kind in _ARCHIVES else ""
        raise ValueError(f"{path} is none of the files that can be read: {', '.join(TABLES)}, also with .gz.{packed}")
    try:
        if kind == ".parquet":
            found = _parquet_rows(path)
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
                columns = _json_columns(path, file) if kind.startswith(".json") else _csv_columns(path, kind, file)
            if len(columns) > _MOST_COLUMNS:
                raise ValueError(f"{path} names {len(columns):,} columns: a row is one sample, not all of them.")
            found = Dataset.from_dict(columns)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        advice = " Save it as UTF-8 (of a spreadsheet: CSV UTF-8)." if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{path} cannot be read as {kind or '.csv'} text in UTF-8: {error}.{advice}") from error
    except (ValueError, TypeError, KeyError, OverflowError, NotImplementedError) as error:  # pyarrow raises all of them
        told = str(error)
        raise ValueError(told if told.startswith(str(path)) else f"{path} cannot be read as {kind}: {told}") from error
    if not len(found):
        raise ValueError(f"{path} holds no sample.")
    return found


def _kind(path: Path) -> str:
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def _parquet_rows(path: Path) -> Dataset:
    # By hand: `Dataset.from_parquet` would leave a copy of the data in the cache.
    try:
        return Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # pyarrow and `datasets` raise OSError, KeyError and others over damaged files
        raise ValueError(f"{path} cannot be read as .parquet: {error}") from error


def _csv_columns(path: Path, kind: str, file: TextIO) -> dict[str, list[str]]:
    with _long_fields():
        reader = csv.reader(file, **_DIALECTS.get(kind, _DIALECTS[".csv"]))
        try:
            header = next((row for row in reader if row), [])
            _check_header(path, header, "\t" if kind == ".tsv" else ",")
            rows = []
            for row in reader:
                if not row:  # a blank line
                    continue
                if len(row) != len(header):
                    raise ValueError(_unfit(f"{path}, line {reader.line_num}", row, header, kind))
                rows.append(row)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}. A quote inside a quoted text is written twice."
            ) from error
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def _check_header(path: Path, header: Sequence[str], separator: str) -> None:
    twice = [name for place, name in enumerate(header) if name in header[:place]]
    if twice:
        raise ValueError(f"{path}: the header names {twice[0]!r} twice ({list(header)}). Rename or delete a column.")
    other = [mark for mark in _SEPARATORS if mark != separator and len(header) == 1 and mark in header[0]]
    if other:
        raise ValueError(
            f"{path}: the header is one column, {header[0]!r}, so the file seems to be separated by "
            f"{_SEPARATORS[other[0]]}; expected {_SEPARATORS[separator]}. A csv has commas, a tsv has tabs."
        )


def _unfit(place: str, row: Sequence[str], header: Sequence[str], kind: str) -> str:
    advice = ""
    if len(row) > len(header):
        advice = " A text cannot hold a tab." if kind == ".tsv" else " A text that holds a comma is put in quotes."
    return (
        f"{place}: the row does not fit the header: it has {len(row)} fields, the header {len(header)} "
        f"({', '.join(header)}).{advice}"
    )


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_columns(path: Path, file: TextIO) -> dict[str, list[Any]]:
    text = file.read()
    if text.lstrip().startswith("["):
        rows = _parsed(str(path), text)
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [_parsed(f"{path}, line {number}", line) for number, line in lines]
    wrong = next((place for place, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise ValueError(f"{path}: sample {wrong} is no JSON object of columns, but {rows[wrong]!r}.")
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    for name, values in columns.items():
        _check_column(path, name, values)
    return columns


def _parsed(place: str, text: str) -> Any:  # noqa: ANN401 - any JSON
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            raise KeyError(next(name for name in names if names.count(name) > 1))
        return row

    try:
        return json.loads(text, object_pairs_hook=once)
    except KeyError as error:
        raise ValueError(f"{place}: an object names {error} twice.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: neither a JSON array nor a JSON object a line: {error}.") from error


def _check_column(path: Path, name: str, values: Sequence[Any]) -> None:
    """Refuse a column of several kinds, and texts that are no Unicode."""
    first = next((value for value in values if value is not None), None)
    for place, value in enumerate(values):
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{path}: sample {place} holds half a character in column {name!r} (a lone surrogate, "
                    f"{value[error.start]!r}): a text was cut inside an emoji. Mend or delete it."
                ) from None
        if value is not None and _sort(value) is not _sort(first):
            raise ValueError(
                f"{path}: sample {place} holds {value!r} in column {name!r}, but a sample before it {first!r}: a "
                "column holds values of one kind."
            )


def _sort(value: Any) -> type:  # noqa: ANN401 - any JSON
    kinds: Mapping[type, type] = {int: float}  # 1 and 0.5 are both numbers; true is none
    return kinds.get(type(value), type(value))
