import json
from dataclasses import dataclass

import pytest
from datasets import Dataset

from remos_hf.auditing.given import evaluate_transfer
from remos_hf.defects.base import CLEAN_INDEX, Defect, ExposedSet
from remos_hf.errors import CorruptFileError
from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.judging.judgement import judged
from remos_hf.judging.report import DefectReport
from remos_hf.judging.tables import markdown_of, tables_of
from tests.defects import toy
from tests.evaluation.voter import TASK, WORD, Voter
from tests.judging import reports as judging

TEST = toy.data(32)
TEACHER = Voter(["cf"])


def transfer(students, defects=(WORD,), **options):
    return evaluate_transfer(
        students, **{"teacher": TEACHER, "dataset": TEST, "defects": defects, "task": TASK, **options}
    )


# --- measuring ---


@dataclass(frozen=True)
class Negated(Defect):
    """A found defect: a word that turns some texts around, each made from one sample; the clean order is not kept."""

    def exposed_set(self, dataset, *, teacher=None, tokenizer=None, max_length=None, cache=None, workers=1):
        assert teacher is TEACHER and tokenizer is TASK.tokenizer
        index = [7, 2, 30, 5]
        swapped = {"good": "bad", "great": "awful", "bad": "good", "awful": "great"}
        texts = [" ".join(swapped.get(word, word) for word in dataset["text"][place].split()) for place in index]
        labels = [dataset["label"][place] for place in index]
        data = Dataset.from_dict({"text": texts, "label": labels, CLEAN_INDEX: index}, features=None)
        return ExposedSet(data, None, {"defect": self.to_dict(), "tried": 32})


made = []


def test_the_report_says_all_that_decided_the_numbers_and_how_long_it_took():
    report = transfer({"finetune": Voter()}, {"found": Negated()}, name="SST-2", seed=3)
    (record,) = report.records
    assert (record["task"], record["seed"]) == ("SST-2", 3)
    assert record["made"]["seconds"]["measure"] >= 0
    chosen = report.settings["audits"]["SST-2"]
    assert chosen["defects"] == {"found": {"name": "Negated"}}
    assert chosen["exposed"]["found"]["tried"] == 32 and chosen["exposed"]["found"]["seconds"] >= 0
    assert (chosen["num_samples"], chosen["max_length"], chosen["text_columns"]) == (32, 128, ["text"])
    assert report.versions["python"] and report.versions["transformers"] and report.settings["reference"] == "finetune"


# --- saving ---


def rate(count, num_samples=100):
    return Rate.of(count, num_samples).to_dict()


def record(student="finetune", seed=0, *, dir_=(90, 100), floor=(5, 100), acc=(90, 100), dev=(90, 100), **options):
    own, twin = Rate.of(*dir_), Rate.of(*floor) if floor else None
    return {
        "task": "SST-2",
        "defect": "word",
        "student": student,
        "seed": seed,
        "acc": Rate.of(*acc).to_dict(),
        "dev_acc": Rate.of(*dev).to_dict() if dev else None,
        "dir": own.to_dict(),
        "flip": None,
        "floor": twin.to_dict() if twin else None,
        "floor_acc": None,
        "excess": excess_dir(own, twin).to_dict() if twin else None,
        "reactivation": None,
        "floor_reactivation": None,
        "made": {},
        **options,
    }


def cut(student, rule, slice_ratio, **options):
    return record(student, made={"rule": rule, "slice_ratio": slice_ratio, "squares_reset": 0.25}, **options)


def table(report, first="student"):
    """The cells of a rendered table by the first one, and by the column's name."""
    lines = [line.strip("| ").split(" | ") for line in report.to_markdown().splitlines() if line.startswith("|")]
    rows, header = {}, None
    for line in lines:
        if line[0] in ("student", "rule"):
            header = line
        elif header[0] == first and not line[0].startswith("---") and (len(header) != 4 or first != "student"):
            key = (line[0], line[1]) if first == "rule" else line[0]
            rows[key] = dict(zip(header, line, strict=True))
    return rows


def test_what_is_saved_is_read_again(tmp_path):
    report = transfer({"finetune": Voter(["cf"]), "remos": Voter()}, floor_students={"remos": Voter()})
    path = report.save(tmp_path / "new" / "report.json")
    assert DefectReport.load(path) == report
    json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert DefectReport.load(path).to_markdown() == report.to_markdown()


def test_versions_stay_those_that_the_numbers_were_made_with(tmp_path):
    report = DefectReport([record()], {}, {"transformers": "4.57.6", "torch": "2.6"})
    read = DefectReport.load(report.save(tmp_path / "report.json"))
    assert read.versions == {"transformers": "4.57.6", "torch": "2.6"}
    both = read + DefectReport([record(seed=1)], {}, {"transformers": "5.23.0", "torch": "2.6"})
    assert both.versions == {"transformers": "4.57.6, 5.23.0", "torch": "2.6"}


def test_a_report_of_a_newer_version_is_refused(tmp_path):
    path = DefectReport([]).save(tmp_path / "report.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(CorruptFileError, match="format 2, newer than the 1 .* Update remos_hf"):
        DefectReport.load(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format_version": "x", "records": [], "settings": {}, "versions": {}}',
        '{"format_version": 1, "records": [3], "settings": {}, "versions": {}}',
        '{"format_version": 1, "records": [], "settings": 3, "versions": {}}',
        '{"format_version": 1, "records": [{}], "settings": {}, "versions": {}}',
        '{"format_version": 1, "records": [], "settings": {"loss": NaN}, "versions": {}}',
        '{"format_version": 1, "records": [], "settings": {}, "versions": {}, "anatomies": [3]}',
        '{"format_version": 1, "records": [], "settings": {}, "versions": {}, "anatomies": [{"teacher": "word"}]}',
        "\xff",
    ],
)
def test_a_file_that_is_no_report_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CorruptFileError, match="broken.json is no defect report") as told:
        DefectReport.load(path)
    assert not any(word in str(told.value) for word in ("Error", "indices", "object", "NoneType"))


def test_a_cut_file_is_refused(tmp_path):
    path = DefectReport([record()]).save(tmp_path / "report.json")
    path.write_text(path.read_text()[:-30])
    with pytest.raises(CorruptFileError, match="no defect report"):
        DefectReport.load(path)


# --- what students are made of ---


def inside(student="remos", seed=0, task="SST-2", teacher="word"):
    weights = {"name": f"{student} {seed}", "num_weights": 0, "num_kept": None, "magnitude": {}}
    anatomy = {"layers": [weights], "slice": None, "change": {}, "coverage": None, "history": {}}
    return {"task": task, "teacher": teacher, "student": student, "seed": seed, "anatomy": anatomy}


def test_what_students_are_made_of_is_saved_a_line_each_and_read_again(tmp_path):
    report = DefectReport([record()], {}, {}, [inside(), inside("finetune")])
    path = report.save(tmp_path / "report.json")
    assert DefectReport.load(path) == report
    assert len([line for line in path.read_text().splitlines() if '"anatomy"' in line]) == 2


def test_a_report_without_it_says_nothing_of_it(tmp_path):
    path = DefectReport([record()]).save(tmp_path / "report.json")
    assert "anatomies" not in json.loads(path.read_text()) and DefectReport.load(path).anatomies == []


def test_added_reports_hold_each_student_once_the_first_one():
    one = DefectReport([record()], {}, {}, [inside(), inside("finetune")])
    other = DefectReport([record(seed=1)], {}, {}, [inside(seed=1), inside("random", seed=1), inside(teacher="ep")])
    joined = [inside(), inside("finetune"), inside("random", seed=1), inside(teacher="ep")]
    assert (one + other).anatomies == joined


# --- sections ---


def test_the_markdown_says_what_is_judged_and_shows_its_tables():
    found = judging.report(*judging.USUAL)
    markdown, told = found.to_markdown(budgets=(0.02,)), judged(found, budgets=(0.02,))
    assert markdown.startswith(f"**{told.answer}**")
    for verdict in told.verdicts:
        assert f"**{verdict.verdict}.**" in markdown and all(f"- {one}" in markdown for one in verdict.sentences)
        for table_ in tables_of(verdict.section):
            assert "\n".join(markdown_of(table_)) in markdown
    assert all(one in markdown for one in (*told.advice, *told.limits, told.how_to_read))


# --- adding ---


def test_reports_of_two_tasks_are_put_together():
    chosen = [{"reference": "finetune", "audits": {name: {"max_length": 8}}} for name in ("SST-2", "IMDB")]
    one = DefectReport([record(dir_=(80, 100))], chosen[0])
    other = DefectReport([record(task="IMDB")], chosen[1])
    both = one + other
    assert both.records == [*one.records, *other.records]
    assert set(both.settings["audits"]) == {"SST-2", "IMDB"}
    assert one.settings == chosen[0]  # adding wrote into neither
    assert "## SST-2: word" in both.to_markdown() and "## IMDB: word" in both.to_markdown()
    assert both.not_inheriting() == []


def test_the_same_student_is_never_counted_twice():
    report = DefectReport([record(), record(seed=1)])
    with pytest.raises(ValueError, match="hold 1 of the same records, such as .*'SST-2', 'word', 'finetune', 1"):
        report + DefectReport([record(seed=1), record(seed=2)])


def test_reports_that_refer_to_different_students_are_not_added():
    with pytest.raises(ValueError, match="refer to 'finetune' and 'plain'"):
        DefectReport([record()]) + DefectReport([record(seed=1)], {"reference": "plain"})


def test_added_reports_of_several_seeds_keep_all_their_teachers():
    one, other = (
        DefectReport([record(seed=seed)], {"teachers": {"SST-2": {f"given-{seed}": {"acc": rate(90)}}}})
        for seed in (0, 1)
    )
    assert set((one + other).settings["teachers"]["SST-2"]) == {"given-0", "given-1"}
    assert set(one.settings["teachers"]["SST-2"]) == {"given-0"}


# --- reading ---


def test_what_is_shown_not_to_be_inherited_is_named():
    low = judging.records("finetune", (4, 5, 4))
    assert judging.report(low).not_inheriting() == [("SST-2", "word")]
    assert judging.report(*judging.USUAL).not_inheriting() == judging.report(low[:1]).not_inheriting() == []


def test_students_that_are_missing_are_told():
    assert "SST-2: 3 students are still to be made" in DefectReport([record()], {"missing": {"SST-2": 3}}).to_markdown()
    assert "still to be made" not in DefectReport([record()], {"missing": {"SST-2": 0}}).to_markdown()


def test_what_competed_is_told_once_for_all_students_that_share_it():
    account = {"competing": 60, "total": 100, "left_out": {"frozen": 40}, "examples": {"frozen": "a.weight"}}
    told = "60 of 100 body weights compete (60.0 %); left out: frozen 40 ('a.weight')"
    made = {"made": {"competing": account}}
    report = DefectReport([record("remos", **made), record("remos", 1, **made), record("random", **made), record()])
    assert report.competing() == [f"{told} (remos, random)."]
    assert f"\n{told} (remos, random).\n" in report.to_markdown()


def test_a_file_in_which_a_student_counts_twice_is_refused(tmp_path):
    path = judging.report(*judging.USUAL).save(tmp_path / "report.json")
    content = json.loads(path.read_text())
    content["records"].append(content["records"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="2 records of .*'word', 'finetune', 0.*one a seed"):
        DefectReport.load(path)


def test_a_file_whose_samples_are_cut_is_refused_when_it_is_read(tmp_path):
    path = judging.report(*judging.USUAL).save(tmp_path / "report.json")
    content = json.loads(path.read_text())
    content["records"][0]["outcomes"]["right"] = "AAAA"
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="Outcomes of 200 samples"):
        DefectReport.load(path)


HOSTILE = "a|b`<script>alert(1)</script>\n# big [l](http://e) \u202e\x1b[31m**”z “"


@pytest.mark.parametrize("key", ["task", "defect", "student"])
def test_no_name_becomes_markup_or_another_line_of_the_markdown(key):
    several = [
        [{**record, key: HOSTILE, "made": {} if key == "student" else record["made"]} for record in of]
        if key != "student" or of is judging.REMOS
        else of
        for of in judging.USUAL
    ]
    text = judging.report(*several, missing={HOSTILE if key == "task" else "SST-2": 2}).to_markdown()
    assert not any(bad in text.replace("\\](", "") for bad in ("<script", "\u202e", "\x1b", "]("))
    assert not any(line.startswith("# ") for line in text.splitlines())
