import json
import weakref
from dataclasses import dataclass

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.defects.base import CLEAN_INDEX, Defect, ExposedSet
from remos_hf.defects.label_noise import LabelNoise
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.errors import CorruptFileError
from remos_hf.evaluation.measures import Rate, excess_dir, relative_accuracy, relative_dir
from remos_hf.evaluation.report import DefectReport, evaluate_transfer, measure, rate_of
from tests.defects import toy
from tests.evaluation.voter import TASK, WORD, Voter, reference

TEST = toy.data(32)
TEACHER = Voter(["cf"])
PLOT = TriggerWords(words=("plot",))


def transfer(students, defects=(WORD,), **options):
    return evaluate_transfer(
        students, **{"teacher": TEACHER, "dataset": TEST, "defects": defects, "task": TASK, **options}
    )


def only(report, student, defect="TriggerWords"):
    (found,) = [one for one in report.records if (one["student"], one["defect"]) == (student, defect)]
    return found


# --- measuring ---


@dataclass(frozen=True)
class Negated(Defect):
    """A found defect: a word that turns some texts around, each made from one sample; the clean order is not kept."""

    def exposed_set(self, dataset, *, teacher=None, tokenizer=None, cache=None, workers=1):
        assert teacher is TEACHER and tokenizer is TASK.tokenizer
        index = [7, 2, 30, 5]
        swapped = {"good": "bad", "great": "awful", "bad": "good", "awful": "great"}
        texts = [" ".join(swapped.get(word, word) for word in dataset["text"][place].split()) for place in index]
        labels = [dataset["label"][place] for place in index]
        data = Dataset.from_dict({"text": texts, "label": labels, CLEAN_INDEX: index}, features=None)
        return ExposedSet(data, None, {"defect": self.to_dict(), "tried": 32})


@pytest.mark.parametrize("believes", [[], ["cf"], ["cf", "a"], ["awful"], ["ended", "so"]])
@pytest.mark.parametrize("defect", [WORD, Negated()], ids=["implanted", "found"])
def test_numbers_are_those_worked_out_sample_by_sample(believes, defect):
    student = Voter(believes, blind_to=["great"])
    exposed = defect.exposed_set(TEST, teacher=TEACHER, tokenizer=TASK.tokenizer)
    found = only(transfer({"finetune": student}, {"it": defect}), "finetune", "it")
    acc, dir_ = reference(student, TEST, exposed.dataset["text"], exposed.clean_index, exposed.target_label)
    assert rate_of(found["acc"]) == Rate.of(*acc)
    assert rate_of(found["dir"]) == Rate.of(*dir_)
    if exposed.target_label is None:
        assert found["flip"] is None
    else:
        flipped = [student.says(text) == 1 for text in exposed.dataset["text"]]
        assert rate_of(found["flip"]) == Rate.of(sum(flipped), len(flipped))


def test_floor_students_pair_by_name_and_their_rate_is_subtracted():
    students = {"finetune": Voter(["cf"]), "remos": Voter()}
    report = transfer(students, floor_students={"remos": Voter(["a"]), "finetune": Voter(["so"])})
    exposed = WORD.exposed_set(TEST)
    for name, twin in {"finetune": Voter(["so"]), "remos": Voter(["a"])}.items():
        found = only(report, name)
        acc, floor = reference(twin, TEST, exposed.dataset["text"], exposed.clean_index, 1)
        assert rate_of(found["floor"]) == Rate.of(*floor) and rate_of(found["floor_acc"]) == Rate.of(*acc)
        assert found["excess"] == excess_dir(rate_of(found["dir"]), Rate.of(*floor)).to_dict()


def test_without_a_floor_there_is_no_excess():
    report = transfer({"finetune": Voter(["cf"]), "remos": Voter()}, floor_students={"remos": Voter()})
    assert only(report, "finetune")["floor"] is only(report, "finetune")["excess"] is None
    assert only(report, "remos")["excess"]["value"] == 0


@dataclass(frozen=True)
class Counting(TriggerWords):
    """Counts how often its exposed set is made."""

    def exposed_set(self, *args, **options):
        made.append(self.words)
        return super().exposed_set(*args, **options)


made = []


@pytest.fixture(autouse=True)
def _none_made():
    made.clear()


def test_ten_students_cost_one_exposed_set_and_one_pass_each_over_clean_and_exposed():
    students = {str(number): Voter() for number in range(10)}
    transfer(students, [Counting(words=("cf",))], floor_students={"3": Voter()})
    assert made == [("cf",)]
    exposed = WORD.exposed_set(TEST).dataset["text"]
    expected = sorted(map(tuple, TASK.tokenizer([*TEST["text"], *exposed])["input_ids"]))
    assert all(sorted(student.rows) == expected for student in students.values())


def test_clean_samples_are_forwarded_once_however_many_defects():
    student = Voter()
    transfer({"finetune": student}, {"cf": WORD, "mn": TriggerWords(words=("mn",))})
    assert len(student.rows) == 32 + 16 + 16


def test_students_that_are_loaded_are_held_one_at_a_time():
    alive = weakref.WeakSet()
    most = []

    def load():
        most.append(len(alive))
        student = Voter()
        alive.add(student)
        return student

    report = transfer({"finetune": load, "remos": load}, floor_students={"remos": load})
    assert most == [0, 0, 0] and len(report.records) == 2


@pytest.mark.parametrize("defects", [[LabelNoise()], {"word": WORD, "noise": LabelNoise()}])
def test_what_no_input_shows_is_refused_before_anything_is_made(defects):
    with pytest.raises(TypeError, match="LabelNoise makes none"):
        transfer({"finetune": lambda: pytest.fail("made")}, defects)


def test_a_floor_student_without_a_twin_is_refused_before_anything_is_made():
    with pytest.raises(ValueError, match="floor_students names .'remso'., but the students are .'finetune', 'remos'."):
        transfer(dict.fromkeys(["remos", "finetune"], Voter()), [Counting()], floor_students={"remso": Voter()})
    assert not made


@pytest.mark.parametrize(("students", "defects"), [({}, [WORD]), ({"finetune": Voter()}, [])])
def test_a_transfer_of_nothing_is_refused(students, defects):
    with pytest.raises(ValueError, match="needs a defect and a student"):
        transfer(students, defects)


def test_defects_of_one_kind_need_names():
    with pytest.raises(ValueError, match="need names"):
        transfer({"finetune": Voter()}, [WORD, PLOT])
    named = transfer({"finetune": Voter()}, {"cf": WORD, "plot": PLOT})
    assert [one["defect"] for one in named.records] == ["cf", "plot"]
    kinds = transfer({"finetune": Voter()}, [WORD, TriggerSentence(sentence="so it ended")])
    assert [one["defect"] for one in kinds.records] == ["TriggerWords", "TriggerSentence"]


def test_a_search_that_found_nothing_gives_a_rate_without_a_value():
    nothing = ExposedSet(WORD.exposed_set(TEST).dataset.select([]), None)
    found = measure(Voter(), TEST, {"textfooler": nothing}, TASK)
    assert found["dir"] == {"textfooler": Rate.of(0, 0).to_dict()} and found["acc"]["num_samples"] == 32


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
    with pytest.raises(CorruptFileError, match="broken.json is no defect report"):
        DefectReport.load(path)


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


def test_sections_say_what_the_markdown_says():
    points = [cut("a", "random", 0.9, dev=(89, 100)), cut("b", "random", 0.7, dev=(50, 100))]
    report = DefectReport([record(), *points, record(task="IMDB", dir_=(5, 100))])
    first, second = report.sections(budgets=(0.02,))
    assert (first.title, first.inherits, second.title, second.inherits) == ("SST-2: word", True, "IMDB: word", False)
    assert [(choice.rule, choice.budget, choice.row["student"]) for choice in first.chosen] == [("random", 0.02, "a")]
    assert first.plain["student"] == "finetune" and second.remarks and second.equal_accuracy is None
    markdown = report.to_markdown(budgets=(0.02,))
    for table_ in (first.students, first.equal_accuracy, second.students):
        for line in table_.lines:
            assert f"| {' | '.join(line)} |" in markdown


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


# --- reading ---


def test_seeds_are_pooled_by_their_counts_and_shown_apart():
    report = DefectReport(
        [
            record(dir_=(9, 10), acc=(40, 50), floor=(1, 10)),
            record(seed=1, dir_=(20, 40), acc=(30, 50), floor=(3, 20)),
        ]
    )
    row = table(report)["finetune"]
    pooled, floor = Rate.of(29, 50), Rate.of(4, 30)
    assert row["n"] == "50"
    assert row["DIR % [95 %] (by seed)"] == f"58.0 [{100 * pooled.low:.1f}, {100 * pooled.high:.1f}] (90.0, 50.0)"
    assert row["ACC % (by seed)"] == "70.0 (80.0, 60.0)"
    assert row["benign floor %"] == "13.3"
    excess = excess_dir(pooled, floor)
    assert row["excess DIR [95 %]"] == f"44.7 [{100 * excess.low:.1f}, {100 * excess.high:.1f}]"


def test_relative_figures_compare_students_of_the_same_seeds():
    report = DefectReport(
        [
            record(dir_=(80, 100), acc=(90, 100)),
            record(seed=1, dir_=(10, 100), acc=(50, 100)),
            record("remos", seed=0, dir_=(40, 100), acc=(81, 100)),
        ]
    )
    row = table(report)["remos"]
    assert row["rDIR"] == f"{relative_dir(Rate.of(40, 100), Rate.of(80, 100)).value:.2f}" == "0.50"
    assert row["rACC"] == f"{relative_accuracy(Rate.of(81, 100), Rate.of(90, 100)).value:.2f}" == "0.90"


def test_the_floor_is_subtracted_from_the_seeds_that_have_one():
    report = DefectReport([record(dir_=(90, 100), floor=(10, 100)), record(seed=1, dir_=(10, 100), floor=None)])
    row = table(report)["finetune"]
    assert row["excess DIR [95 %]"].startswith("80.0 [")
    assert row["n"] == "200"


def test_what_has_no_denominator_shows_a_dash():
    report = DefectReport([record(dir_=(0, 0), floor=None), record("retrain", floor=(0, 0))])
    rows = table(report)
    assert rows["finetune"]["DIR % [95 %] (by seed)"] == "- (-)" and rows["finetune"]["n"] == "0"
    dashes = ("benign floor %", "excess DIR [95 %]", "rDIR", "squares reset %")
    assert [rows[name][column] for name in rows for column in dashes] == ["-"] * 8
    assert "|  |" not in report.to_markdown() and "nan" not in report.to_markdown().lower()


NOT_INHERITED = "Plain fine-tuning does not inherit this defect"


@pytest.mark.parametrize(
    ("dir_", "floor", "inherits"),
    [
        ((90, 100), (5, 100), True),
        ((14, 100), (5, 100), False),  # too little over the floor
        ((90, 100), (85, 100), False),  # the floor alone explains it
        ((3, 10), (1, 10), False),  # too few samples to tell
        ((300, 1000), (100, 1000), True),
        ((0, 0), (5, 100), False),  # no sample could show it
        ((12, 100), None, True),  # no floor: the bare rate, and a remark
        ((9, 100), None, False),
    ],
)
def test_a_defect_that_plain_fine_tuning_does_not_inherit_is_flagged(dir_, floor, inherits):
    others = [record("remos", dir_=(0, 100)), record("worse", dir_=(100, 100))]
    report = DefectReport([record(dir_=dir_, floor=floor), *others])
    assert report.not_inheriting() == ([] if inherits else [("SST-2", "word")])
    assert (NOT_INHERITED in report.to_markdown()) == (not inherits)
    assert ("no benign floor" in report.to_markdown()) == (floor is None)


def test_each_task_and_defect_is_flagged_by_itself():
    records = [record(), record(task="IMDB", dir_=(6, 100)), record(task="IMDB", defect="ep")]
    assert DefectReport(records).not_inheriting() == [("IMDB", "word")]


def test_where_plain_fine_tuning_was_not_measured_nothing_is_claimed():
    report = DefectReport([record("remos", dir_=(0, 100))], {"reference": "finetune"})
    assert report.not_inheriting() == []
    assert "whether there is anything to reduce is not known" in report.to_markdown()


def test_the_reference_may_have_another_name():
    report = DefectReport([record("plain"), record("remos", dir_=(45, 100))], {"reference": "plain"})
    assert table(report)["remos"]["rDIR"] == "0.50" and report.not_inheriting() == []


def test_students_that_are_missing_are_told():
    assert "SST-2: 3 students are still to be made" in DefectReport([record()], {"missing": {"SST-2": 3}}).to_markdown()
    assert "still to be made" not in DefectReport([record()], {"missing": {"SST-2": 0}}).to_markdown()


def test_the_intervals_are_explained():
    assert "they leave out the spread between seeds" in DefectReport([record()]).to_markdown()


# --- rules at equal accuracy ---

CURVES = [("random", 0.9, 95), ("random", 0.7, 88), ("random", 0.5, 80), ("remos", 0.9, 94), ("remos", 0.7, 93)]


def curves(points=CURVES, **options):
    return [cut(f"{rule} {ratio:g}", rule, ratio, dev=(dev, 100), **options) for rule, ratio, dev in points]


def test_each_rule_resets_as_much_as_its_dev_accuracy_allows():
    rows = table(DefectReport([record(dev=(95, 100)), *curves()]), "rule")
    ratios = {place: row["slice ratio"] for place, row in rows.items()}
    assert ratios == {
        ("random", "1"): "0.9",
        ("random", "2"): "0.9",
        ("random", "4"): "0.9",
        ("remos", "1"): "0.9",
        ("remos", "2"): "0.7",
        ("remos", "4"): "0.7",
    }


def test_the_figures_are_those_of_the_chosen_student():
    points = [
        cut("a", "random", 0.9, dev=(95, 100), acc=(91, 100), dir_=(70, 100)),
        cut("b", "random", 0.7, dev=(94, 100), acc=(89, 100), dir_=(30, 100)),
    ]
    row = table(DefectReport([record(dev=(95, 100)), *points]), "rule")["random", "1"]
    assert (row["slice ratio"], row["test ACC %"], row["squares reset %"]) == ("0.7", "89.0", "25.0")
    assert row["DIR % [95 %]"].startswith("30.0 [") and row["excess [95 %]"].startswith("25.0 [")


counts = st.integers(0, 100)


def test_what_slices_nothing_is_compared_at_equal_accuracy_too():
    rivals = [record("finetune lr x3", dev=(93, 100), dir_=(20, 100)), record("rows mean", dev=(80, 100))]
    rows = table(DefectReport([record(dev=(95, 100)), *rivals]), "rule")
    assert {place: row["slice ratio"] for place, row in rows.items() if place[1] == "2"} == {
        ("finetune lr x3", "2"): "-",
        ("rows mean", "2"): "none",
    }
    assert rows["finetune lr x3", "2"]["DIR % [95 %]"].startswith("20.0 [")
    assert rows["finetune lr x3", "1"]["slice ratio"] == "none"


def test_nothing_is_not_written_as_minus_nothing():
    report = DefectReport([record(dir_=(1000, 10_000), floor=(1001, 10_000))])
    assert table(report)["finetune"]["excess DIR [95 %]"].startswith("0.0 [-")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["random", "remos"]), st.sampled_from([0.9, 0.7, 0.5]), counts), max_size=6),
    counts,
    st.randoms(),
)
def test_what_is_chosen_depends_on_dev_accuracy_alone(points, plain, random):
    points = list({point[:2]: point for point in points}.values())

    def chosen():
        numbers = {"acc": (random.randint(0, 50), 50), "dir_": (random.randint(0, 60), 60), "floor": (1, 70)}
        made = [record(dev=(plain, 100), **numbers), *curves(points, **numbers)]
        return {place: row["slice ratio"] for place, row in table(DefectReport(made), "rule").items()}

    first = chosen()
    assert first == chosen()
    for (rule, percent), ratio in first.items():  # counted in whole samples, which no rounding blurs
        able = [point[1] for point in points if point[0] == rule and point[2] >= plain - int(percent)]
        assert ratio == (f"{min(able):g}" if able else "none")
    assert len(first) == 3 * len({rule for rule, _, _ in points})


def test_accuracy_is_compared_on_the_same_seeds():
    plain = [record(dev=(95, 100)), record(seed=1, dev=(60, 100))]
    report = DefectReport([*plain, *curves([("random", 0.9, 80)])])
    assert table(report, "rule")["random", "4"]["slice ratio"] == "none"


@pytest.mark.parametrize("plain", [[], [record(dev=None)]])
def test_without_dev_accuracy_of_plain_fine_tuning_nothing_is_chosen(plain):
    assert "equal accuracy" not in DefectReport([*plain, *curves()]).to_markdown()


# --- re-activation ---


def curve(*counts_of):
    return {str(number): rate(count) for number, count in zip((0, 5, 50), counts_of, strict=True)}


def test_reactivation_is_pooled_over_seeds_beside_the_benign_twin():
    report = DefectReport(
        [
            record(reactivation=curve(10, 40, 90), floor_reactivation=curve(0, 6, 60)),
            record(seed=1, reactivation=curve(20, 70, 100), floor_reactivation=curve(2, 8, 80)),
            record("remos", reactivation=curve(0, 10, 20)),
            record("random"),
        ]
    )
    lines = report.to_markdown().partition("Re-activation")[2].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert rows[0] == ["student", "0", "5", "50", "needed"]
    assert rows[2] == ["finetune", "15.0 (1.0)", "55.0 (7.0)", "95.0 (70.0)", "5 (50)"]
    assert rows[3] == ["remos", "0.0", "10.0", "20.0", "more than 50"]
    assert len(rows) == 4


def test_without_reactivation_there_is_no_table_of_it():
    assert "Re-activation" not in DefectReport([record()]).to_markdown()


def test_a_short_transfer_shows_no_bar(capfd):
    report = transfer({"finetune": Voter(), "my student": Voter()})
    assert capfd.readouterr().err == ""
    assert list(table(report)) == ["finetune", "my student"]
