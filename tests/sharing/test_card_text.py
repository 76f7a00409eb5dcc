import ast
import re

import pytest
import yaml

from remos_hf.judging.report import DefectReport
from remos_hf.sharing.model_card import eval_result_files
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.slice_and_reset import Remos
from tests.sharing.reports import cell
from tests.sharing.test_model_card import card_of

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
    cells = [cell(f"{HOSTILE}{name}", (9, 10), (9, 10), task=HOSTILE, defect=HOSTILE) for name in "ab"]
    made = DefectReport(cells, {"reference": f"{HOSTILE}a"})
    return Sidecars(config), made


def test_hostile_names_stay_text(hostile):
    record, measured = hostile
    card = card_of(record, measured, student=f"{HOSTILE}b", dataset=HOSTILE, license=HOSTILE, language=HOSTILE)
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
            assert len(re.findall(r"(?<!\\)\|", line)) == 8, line
    assert not re.search(r"(?<!\\)`", prose.replace("`body.`", ""))
    code = [block for _, block in re.findall(r"(?s)(`{3,})python\n(.*?)\n\1", body)]
    for block in code:
        names = {node.name for node in ast.walk(ast.parse(block)) if isinstance(node, ast.alias)}
        assert names <= {"Sidecars", "hf_hub_download", "image_classifier"}


def test_hostile_names_stay_text_in_the_results_too(hostile):
    _, measured = hostile
    (path, content), *more = eval_result_files(measured, student=f"{HOSTILE}b", dataset="o/d").items()
    assert not more and re.fullmatch(r"\.eval_results/remos_[a-z0-9_]+\.yaml", path)
    assert [entry["value"] for entry in yaml.safe_load(content)] == [0.9, 0.9]
