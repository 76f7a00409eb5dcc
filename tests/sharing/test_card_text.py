import ast
import re

import pytest
import yaml

from remos_hf.sharing.hub_results import eval_result_files
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.slice_and_reset import Remos
from tests.judging.reports import records, report
from tests.sharing.test_model_card import WEIGHTS, card_of

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


HOSTILE = (
    "x | y\n---\nlicense: evil\n# Heading\n<script>alert(1)</script> {{ 7 * 7 }} {% raw %} [a](http://e.vil) "
    "![p](http://e.vil/p.png) `code` **bold** \r\n```\n\x1b[31m' \" https://e.vil \u2028 $x$"
)


@pytest.fixture
def hostile():
    strategy = {**Remos(0.9).to_dict(), "scope": HOSTILE}
    config = {
        "strategy": strategy,
        "teacher": {"id": HOSTILE, "revision": HOSTILE, "hash": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "coverage": {"criterion": {HOSTILE: 1}, "data_fingerprint": HOSTILE, "num_samples": 3},
        "student": {"class": HOSTILE, "library": "timm", "architecture": 'a"); import os #' + HOSTILE},
    }
    given = {"weights": WEIGHTS, "from": HOSTILE}
    held = [
        {**one, "task": HOSTILE, "defect": HOSTILE, "given": given if name == "b" else None}
        for name in "ab"
        for one in records(f"{HOSTILE}{name}", (190,), acc=(170,), floors=(4,))
    ]
    defects = {HOSTILE: {"name": "TriggerWords", "more": HOSTILE}}
    made = report(held, taught={}, reference=f"{HOSTILE}a", audits={HOSTILE: {"defects": defects}})
    return Sidecars(config), made


def test_hostile_names_stay_text(hostile):
    record, measured = hostile
    said = {"dataset": HOSTILE, "license": HOSTILE, "language": HOSTILE}
    card = card_of(record, measured, student=f"{HOSTILE}b", weights=WEIGHTS, **said)
    head, body = re.match(r"---\n(.*?)\n---\n(.*)", str(card), re.S).groups()
    data = yaml.safe_load(head)
    assert data["license"].startswith("x | y --- license: evil") and "evil" not in data
    assert set(data) <= {"language", "license", "library_name", "metrics", "pipeline_tag", "tags", "model-index"}
    prose = re.sub(r"(?s)(`{3,}).*?\n\1", "", body)
    assert "<script" not in prose and "https://" not in prose and "](" not in prose.replace("\\](", "")
    assert "49" not in prose and "{{ 7 * 7 }}" in prose.replace("\\*", "*")
    assert [line for line in prose.splitlines() if line.startswith("#") and "Heading" in line[:12]] == []
    assert len(re.findall(r"(?m)^# ", prose)) == 1 and "\x1b" not in body and "\u2028" not in body
    for line in prose.splitlines():
        if line.startswith("| **"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 12, line
    assert not re.search(r"(?<!\\)`", prose.replace("`body.`", ""))
    code = [block for _, block in re.findall(r"(?s)(`{3,})python\n(.*?)\n\1", body)]
    for block in code:
        names = {node.name for node in ast.walk(ast.parse(block)) if isinstance(node, ast.alias)}
        assert names <= {"Sidecars", "hf_hub_download", "image_classifier"}


def test_hostile_names_stay_text_in_the_results_too(hostile):
    _, measured = hostile
    (path, content), *more = eval_result_files(measured, weights=WEIGHTS, benchmark="o/d").items()
    assert not more and re.fullmatch(r"\.eval_results/remos_[a-z0-9_]+\.yaml", path)
    (entry,) = yaml.safe_load(content)
    assert entry["value"] == 0.95 and "\n" not in entry["notes"]
