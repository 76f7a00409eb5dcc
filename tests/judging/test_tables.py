import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.evaluation.measures import Rate, excess_dir, relative_accuracy, relative_dir
from remos_hf.judging.report import DefectReport
from tests.judging.test_report import counts, curves, cut, rate, record, table


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


def test_each_task_and_defect_is_flagged_by_itself():
    records = [record(), record(task="IMDB", dir_=(6, 100)), record(task="IMDB", defect="ep")]
    assert DefectReport(records).not_inheriting() == [("IMDB", "word")]


def test_the_reference_may_have_another_name():
    report = DefectReport([record("plain"), record("remos", dir_=(45, 100))], {"reference": "plain"})
    assert table(report)["remos"]["rDIR"] == "0.50" and report.not_inheriting() == []


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
