from dataclasses import fields
from pathlib import Path

import pytest

from remos_hf.cli.command_line import command_line, option_of, shown_name
from remos_hf.cli.options import AuditOptions, ProfileOptions, ReportOptions


def audit(**options):
    return command_line("audit", AuditOptions(**{"teacher": "t", "data": "d", "output": Path("a"), **options}))


def test_what_differs_from_the_defaults_is_written_as_it_was_asked_for():
    assert audit() == "remos audit t --data d --output a"
    asked = {"defects": ["word", "ep"], "seeds": [0, 1, 2], "slice_ratios": [0.5], "quick": True, "max_samples": 200}
    assert audit(**asked, text_columns=["a b"], name="it's") == (
        "remos audit t --data d --output a --defects word ep --slice-ratios 0.5 --quick --name 'it'\"'\"'s' "
        "--text-column 'a b' --max-samples 200"
    )
    assert command_line("report", ReportOptions(Path("r.json"))) == "remos report r.json"


def test_nothing_says_where_files_of_this_machine_lie(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tsv").write_text("")
    monkeypatch.chdir(tmp_path)
    told = audit(
        teacher=str(tmp_path / "data"), data="data/train.tsv", output=tmp_path / "out" / "a", test_data="./gone.tsv"
    )
    assert told == "remos audit data --data train.tsv --output a --test-data gone.tsv"
    assert shown_name(f"{tmp_path}/data:test") == shown_name("data:test") == "data:test"
    assert shown_name("stanfordnlp/sst2:train") == "stanfordnlp/sst2:train" and shown_name("timm/x.y") == "timm/x.y"
    assert shown_name("i watch " * 1000) == "i watch " * 1000


@pytest.mark.parametrize(("field", "option"), [("text_columns", "--text-column"), ("max_length", "--max-length")])
def test_an_option_is_named_as_it_is_typed(field, option):
    (one,) = [one for one in fields(ProfileOptions) if one.name == field]
    assert option_of(one) == option
