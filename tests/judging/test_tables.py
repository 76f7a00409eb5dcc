from remos_hf.evaluation.measures import Rate
from remos_hf.judging.tables import Table, markdown_of, tables_of
from tests.judging.reports import PLAIN, RANDOM, REMOS, USUAL, records, report, teachers


def cells(*several, number=0, **options):
    (section,) = report(*several, **options).sections(budgets=(0.02,))
    table = tables_of(section)[number]
    return {line[0]: dict(zip(table.header, line, strict=True)) for line in table.lines}


def test_the_teachers_stand_first():
    rows = cells(*USUAL)
    assert list(rows)[:3] == ["teacher", "the same teacher, never poisoned", "finetune"]
    assert rows["teacher"]["DIR % [95 %] (by seed)"].startswith("99.0 [") and rows["teacher"]["seeds"] == "3"
    assert rows["the same teacher, never poisoned"]["DIR % [95 %] (by seed)"].startswith("-")
    assert "teacher" not in cells(*USUAL, taught={})


def test_rates_have_intervals_over_seeds_the_seeds_themselves_and_the_samples_of_one():
    row = cells(records("finetune", (180, 190, 170)))["finetune"]
    assert row["DIR % [95 %] (by seed)"].startswith("90.0 [") and row["DIR % [95 %] (by seed)"].endswith(
        "(90.0, 95.0, 85.0)"
    )
    assert row["n"] == "200" and row["benign floor %"] == "2.0" and row["excess DIR [95 %]"].startswith("88.0 [")
    two = cells(records("finetune", (180, 190, 170))[:2])["finetune"]
    assert two["DIR % [95 %] (by seed)"] == "92.5 (90.0, 95.0)" and two["excess DIR [95 %]"] == "90.5"


def test_what_has_no_denominator_shows_a_dash():
    row = cells(records("finetune", (0, 0, 0), floors=None, of=0))["finetune"]
    assert row["DIR % [95 %] (by seed)"] == "- (-, -, -)" and row["n"] == "0"
    assert [row[name] for name in ("benign floor %", "excess DIR [95 %]", "rDIR", "squares reset %")] == ["-"] * 4


def test_nothing_is_not_written_as_minus_nothing():
    row = cells(records("finetune", (1000, 1000, 1000), floors=(1001, 1001, 1001), of=10_000))["finetune"]
    assert row["excess DIR [95 %]"].startswith("0.0 [")


def test_accuracy_is_told_against_plain_fine_tuning():
    assert cells(PLAIN, REMOS)["remos 0.9"]["ACC − plain [95 %]"].startswith("-1.0 [")


def test_rules_at_equal_accuracy_have_their_own_table():
    rows = cells(PLAIN, RANDOM, records("remos 0.7", (4, 4, 4), acc=(120, 120, 120)), number=1)
    assert rows["random"]["slice ratio"] == "0.9" and rows["random"]["DIR % [95 %]"].startswith("61.7 [")
    assert rows["remos"]["slice ratio"] == "none"


def test_reactivation_stands_beside_the_benign_twin():
    def curve(*counts):
        return {str(place): Rate.of(count, 100).to_dict() for place, count in zip((0, 5, 50), counts, strict=True)}

    own = records("finetune", (9, 9, 9), reactivation=curve(15, 55, 95), floor_reactivation=curve(1, 7, 70))
    rows = cells(own, records("remos 0.9", (9, 9, 9), reactivation=curve(0, 10, 20)), RANDOM, number=2)
    assert rows["finetune"] == {
        "student": "finetune",
        "0": "15.0 (1.0)",
        "5": "55.0 (7.0)",
        "50": "95.0 (70.0)",
        "needed": "5 (50)",
    }
    unknown = {"0": Rate.of(0, 9).to_dict(), "5": Rate.of(0, 0).to_dict()}
    few = cells(records("finetune", (9, 9, 9), reactivation=unknown), number=1)
    none = cells(records("finetune", (9, 9, 9), reactivation={"5": Rate.of(0, 0).to_dict()}), number=1)
    assert few["finetune"]["needed"] == "more than 0" and none["finetune"]["needed"] == "-"
    assert rows["remos 0.9"]["needed"] == "more than 50" and "random 0.9" not in rows


def test_no_name_leaves_its_cell_in_markdown():
    table = Table("x", ("student", "n"), [["a|b\nc <i>`*[x](y)", "1"], ["plain", "-1.0 [-2.0, 0.0]"]])
    lines = markdown_of(table)
    assert len(lines) == 4 and lines[2] == "| a\\|b c &lt;i&gt;\\`\\*\\[x\\](y) | 1 |"
    assert lines[3] == "| plain | -1.0 [-2.0, 0.0] |"


def test_the_share_of_teachers_that_fool_is_told_where_it_was_measured():
    both = records("finetune", (90, 90, 90), dir_fooled=Rate.of(80, 100).to_dict())
    assert cells(both)["finetune"]["DIR % on what fools the teacher [95 %] (n)"].endswith("(100)")
    assert teachers()
