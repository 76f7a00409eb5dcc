import pytest

from remos_hf.auditing.cells import Cell
from remos_hf.auditing.progress import Progress, minutes_told


def test_a_line_as_each_student_ends_says_which_how_good_and_how_long_the_rest_takes():
    lines = []
    progress = Progress(6, lines.append, done=1, teacher_seconds=[300.0])
    progress.ended(Cell("word", 0, "random 0.9"), 0.8123, 60.0, 1)
    progress.ended(Cell("clean", 1, "retrain"), 0.5, 120.0, 0)
    assert lines == [
        "student 2 of 6, word, random 0.9, seed 0: accuracy 81.2 %; about 9 minutes left",
        "student 3 of 6, clean, retrain, seed 1: accuracy 50.0 %; about 4 minutes left",  # 3 students of 90 seconds
    ]


def test_a_teacher_that_nobody_timed_counts_as_a_student():
    lines = []
    Progress(2, lines.append).ended(Cell("word", 0, "retrain"), 1.0, 60.0, 2)
    assert lines[0].endswith("about 3 minutes left")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "less than a minute left"), (40, "about 1 minute left"), (72_000, "about 1,200 minutes left")],
)
def test_minutes_are_told_whole(seconds, told):
    assert minutes_told(seconds) == told
