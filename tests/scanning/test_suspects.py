import json

import pytest

from remos_hf.errors import CorruptFileError
from remos_hf.scanning.suspects import Effect, Scan, Suspect


def scan(**changes):
    suspects = (
        Suspect(0, "cf", 3.5, Effect(9, 10, 2.5), Effect(1, 8, -2.0), token_ids=(12,)),
        Suspect(1, "lower right", 1.0, Effect(0, 0, None), size=4.0),
    )
    return Scan(**{
        "kind": "tokens", "suspects": suspects, "labels": ("bad", "good"), "num_scanned": 30,
        "left_out": {"special": 5}, "settings": {"seed": 3, "capped": (1, 2)}, **changes,
    })  # fmt: skip


def test_a_scan_read_again_is_the_same(tmp_path):
    assert Scan.load(scan().save(tmp_path / "scan.json")) == scan()


def test_a_rate_is_a_share_of_the_hosts_and_none_without_hosts():
    first, second = scan().suspects
    assert (first.effect.rate, second.effect.rate) == (0.9, None)
    assert scan().of_label(1) == (second,)
    assert scan().has_reference and not scan(suspects=(second,)).has_reference


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda values: values.pop("suspects"), "suspects"),
        (lambda values: values.update(format="remos_scan/9"), "Update remos_hf"),
        (lambda values: values.update(kind="sounds"), "'tokens', 'patch'"),
        (lambda values: values.update(labels=["bad"]), "label 1, but there are 1"),
        (lambda values: values.update(num_scanned=-1), "num_scanned"),
        (lambda values: values["suspects"][0]["effect"].update(flipped=11), "11 of 10"),
        (lambda values: values["suspects"][0].update(margin=None), "margin is a finite number"),
        (lambda values: values["suspects"][0].update(more=1), "more"),
    ],
)
def test_a_file_that_is_no_scan_is_refused_with_what_is_wrong(tmp_path, change, told):
    values = scan().to_dict()
    change(values)
    (tmp_path / "scan.json").write_text(json.dumps(values))
    with pytest.raises(CorruptFileError, match=told):
        Scan.load(tmp_path / "scan.json")


def test_a_file_that_is_cut_is_refused(tmp_path):
    path = scan().save(tmp_path / "scan.json")
    path.write_text(path.read_text()[:-30])
    with pytest.raises(CorruptFileError, match="Scan the student again"):
        Scan.load(path)
