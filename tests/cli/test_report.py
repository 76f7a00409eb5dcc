import json

import pytest
from PIL import Image

from remos_hf.judging.report import DefectReport


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
            "seed": seed,
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
        for seed in (0, 1, 2)
    ]
    return DefectReport(records, {"reference": "finetune"}).save(tmp_path / "report.json")


def test_a_report_is_rendered_beside_its_json(remos, report, tmp_path):
    told = remos("report", report, "--title", "A toy", "--json")
    assert told.exit_code == 0, told.stderr
    files = json.loads(told.stdout)
    assert files["html"] == str(tmp_path / "report.html") and "A toy" in (tmp_path / "report.html").read_text()
    expected = DefectReport.load(report).to_markdown()
    assert (tmp_path / "report.md").read_text() == expected
    assert list((tmp_path / "report_pictures").glob("*.png"))


def test_a_report_is_rendered_elsewhere(remos, report, tmp_path):
    result = remos("report", report, "--output", tmp_path / "page" / "index.html")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"index.html", "index.md", "index_pictures"}


def test_a_report_of_which_nothing_can_be_said_is_rendered_and_ends_with_a_status_of_its_own(remos, report, tmp_path):
    held = DefectReport.load(report)
    DefectReport([one for one in held.records if one["seed"] == 0], held.settings).save(report)
    result = remos("report", report)
    assert result.exit_code == 3 and "cannot be said" in result.stdout and (tmp_path / "report.html").is_file()
    assert json.loads(remos("report", report, "--json").stdout)["can_be_said"] is False


SHARE = {"value": 0.25, "low": 0.2, "high": 0.3, "chance": 0.035, "num_samples": 729, "num_without_mass": 0}


def test_maps_are_shown_in_the_report_with_their_shares(remos, report, tmp_path):
    (tmp_path / "maps").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "maps" / "m.png")
    entry = {"title": "Where it looks", "png": "m.png", "caption": "Three of 729.", "share": {"finetune": SHARE}}
    (tmp_path / "maps" / "m.json").write_text(json.dumps({"maps": [entry]}))
    result = remos("report", report, "--maps", tmp_path / "maps" / "m.json")
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "Where it looks" in page and "25.0 [20.0, 30.0]" in page and "729" in page


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"maps": [3]}',
        '{"maps": [{"title": "a"}]}',
        '{"maps": [{"title": "a", "png": "../secret.png"}]}',
        '{"maps": [{"title": "a", "png": "/etc/secret.png"}]}',
        '{"maps": [{"title": 3, "png": "m.png"}]}',
        '{"maps": [{"title": "a", "png": "m.png", "share": [1]}]}',
    ],
)
def test_a_file_that_holds_no_maps_is_refused_and_reads_nothing_elsewhere(remos, report, tmp_path, content):
    (tmp_path / "maps.json").write_text(content)
    result = remos("report", report, "--maps", tmp_path / "maps.json")
    assert result.exit_code != 0 and "maps.json holds no maps for a report" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_report_is_refused(remos, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "other.json").write_text("[]")
    for name, told in (("none.json", "There is no file"), ("other.json", "is no defect report")):
        result = remos("report", tmp_path / name)
        assert result.exit_code == 1 and told in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
