import json

import pytest

from remos_hf.evaluation.report import DefectReport


def rate(count, number=100):
    value = count / number
    return {"value": value, "count": count, "num_samples": number, "low": value / 2, "high": min(1, value + 0.1)}


@pytest.fixture
def report(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {
            "task": "toy",
            "defect": "word",
            "student": student,
            "seed": 0,
            "acc": rate(90),
            "dev_acc": rate(91),
            "dir": rate(shown),
            "floor": rate(5),
            "floor_acc": rate(90),
            "excess": {"value": shown / 100 - 0.05, "low": 0.0, "high": 1.0},
            "reactivation": None,
            "floor_reactivation": None,
            "made": {},
        }
        for student, shown in (("finetune", 80), ("remos 0.9", 20))
    ]
    return DefectReport(records, {"reference": "finetune"}).save(tmp_path / "report.json")


def test_a_report_is_rendered_beside_its_json(remos, report, tmp_path):
    told = remos("report", report, "--title", "A toy", "--json")
    assert told.exit_code == 0, told.stderr
    files = json.loads(told.stdout)
    assert files["html"] == str(tmp_path / "report.html") and "A toy" in (tmp_path / "report.html").read_text()
    expected = DefectReport.load(report).to_markdown(budgets=(0.02, 0.05, 0.1))
    assert (tmp_path / "report.md").read_text() == expected
    assert list((tmp_path / "report_pictures").glob("*.png"))


def test_a_report_is_rendered_elsewhere(remos, report, tmp_path):
    result = remos("report", report, "--output", tmp_path / "page" / "index.html")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"index.html", "index.md", "index_pictures"}


def test_what_is_no_report_is_refused(remos, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "other.json").write_text("[]")
    for name, told in (("none.json", "There is no file"), ("other.json", "is no defect report")):
        result = remos("report", tmp_path / name)
        assert result.exit_code == 1 and told in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
