import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remos_hf.judging.report import DefectReport
from remos_hf.showing import report_pictures
from remos_hf.showing.palette import MARKERS, looks_of
from tests.showing.test_pictures import (
    RECORDS,
    accuracy_figure,
    legend_of,
    lines,
    reactivation_figure,
    record,
    report,
    sliced,
    titles,
    with_curves,
)


def test_reactivation_is_a_line_a_student_with_the_floor_dashed():
    records = [
        with_curves("finetune", (90, 95, 99), (1, 9, 50)),
        with_curves("remos 0.9", (2, 30, 80), (1, 8, 40), **sliced("Remos", 0.9)),
        with_curves("theirs", (0, 5, 10)),
        record("without", 90, 90),
    ]
    figure = reactivation_figure(records)
    (axes,) = figure.axes
    solid, dashed = lines(axes), lines(axes, "--")
    assert [list(line.get_ydata()) for line in solid] == [[0.9, 0.95, 0.99], [0.02, 0.3, 0.8], [0.0, 0.05, 0.1]]
    assert [list(line.get_ydata()) for line in dashed] == [[0.01, 0.09, 0.5], [0.01, 0.08, 0.4]]
    assert [line.get_color() for line in dashed] == [line.get_color() for line in solid[:2]]
    assert list(solid[0].get_xdata()) == [0, 5, 50] == list(axes.get_xticks())
    assert sorted(legend_of(figure)) == ["ReMoS", "dashed: benign twin (floor)", "plain fine-tuning", "theirs"]
    assert [text.get_text() for text in axes.texts] == ["0.9"]
    assert "A to B: word" in figure._suptitle.get_text() and "n = 100 samples" in axes.get_title("left")


def of_three_seeds(make, *counts):
    return [make(count, seed) for seed, count in enumerate(counts)]


def test_intervals_are_those_of_the_rows_and_below_three_seeds_there_is_none():
    records = of_three_seeds(lambda count, seed: with_curves("finetune", (count, 95, 99), seed=seed), 90, 80, 70)
    (axes,) = reactivation_figure(records).axes
    ((row,),) = DefectReport(records).tables().values()
    ends = [segment[:, 1].tolist() for segment in axes.containers[0][2][0].get_segments()]
    assert np.allclose(ends, [[rate.low, rate.high] for rate in row["reactivation"].values()])
    (axes,) = reactivation_figure(records[:2]).axes
    assert not axes.containers and list(lines(axes)[0].get_ydata()) == pytest.approx([0.85, 0.95, 0.99])


def test_ratios_stand_beside_lines_where_they_lie_apart_and_never_on_each_other():
    records = [
        with_curves(f"remos {ratio}", (own, 99, 100), **sliced("Remos", ratio))
        for ratio, own in ((0.5, 10), (0.7, 12), (0.9, 60))
    ]
    (axes,) = reactivation_figure(records).axes
    assert [(text.get_text(), *text.xy) for text in axes.texts] == [("0.5", 0, 0.1), ("0.9", 0, 0.6)]


def test_records_of_several_defects_or_of_none_are_refused(tmp_path):
    path = tmp_path / "picture.png"
    two = DefectReport([with_curves("remos", (1, 2, 3)), with_curves("remos", (1, 2, 3), defect="ep")])
    with pytest.raises(ValueError, match=r"'ep'.*'word'.*Choose one by defect="):
        report_pictures.reactivation_curve(two, path)
    for nothing in ([record("finetune", 90, 90)], [{**record("a", 1, 1), "reactivation": None}]):
        with pytest.raises(ValueError, match="no record holds any"):
            report_pictures.reactivation_curve(DefectReport(nothing), path)
    assert report_pictures.reactivation_curve(two, path, "ep").exists()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_holds_those_that_nobody_beats(points):
    front = report_pictures._front(points)

    def beaten(one):
        return any(other[0] <= one[0] and other[1] >= one[1] and other != one for other in points)

    assert sorted(front) == sorted({one for one in points if not beaten(one)})
    assert front == sorted(front)


def scatter(axes):
    """Points by colour and marker, joined ones together."""
    return {
        (line.get_color(), line.get_marker()): [tuple(map(float, place)) for place in line.get_xydata()]
        for line in lines(axes)
        if line.get_marker() in MARKERS
    }


def look(key):
    made = looks_of({key: ""})[key]
    return made.colour, made.marker


def test_a_panel_has_a_point_a_student_joined_by_rule_in_the_order_of_ratios():
    figure = accuracy_figure(DefectReport(RECORDS[::-1]))
    (axes,) = figure.axes
    assert scatter(axes) == {
        look("remos"): [(0.2, 0.84), (0.05, 0.7)],
        look("random"): [(0.5, 0.8)],
        look("plain"): [(1.0, 0.9)],
    }
    assert legend_of(figure) == ["a random reset", "ReMoS", "plain fine-tuning", "Pareto front", "benign floor"]
    assert sorted(text.get_text() for text in axes.texts) == ["0.7", "0.9", "0.9"]
    (floor,) = lines(axes, ":")
    assert list(floor.get_xdata()) == [0.02, 0.02]
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert [tuple(place) for place in front.get_xydata()] == [(0.05, 0.7), (0.2, 0.84), (1.0, 0.9)]
    assert axes.get_title("left").splitlines() == ["word", "n: ACC 100, DIR 100", "no DIR: retrain"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("DIR (%)", "ACC (%)")


def test_points_have_the_intervals_of_their_rows_both_ways_or_none():
    records = of_three_seeds(lambda count, seed: record("finetune", 90 - seed, count, seed=seed), 60, 50, 40)
    (axes,) = accuracy_figure(DefectReport(records)).axes
    ((row,),) = DefectReport(records).tables().values()
    across, up = (made[2][0].get_segments()[0] for made in axes.containers)
    assert np.allclose(across[:, 0], [row["dir"].low, row["dir"].high])
    assert np.allclose(up[:, 1], [row["acc"].low, row["acc"].high])
    assert not accuracy_figure(DefectReport(records[:2])).axes[0].containers


def test_every_defect_has_a_panel_on_the_same_scales():
    made = accuracy_figure(report("word", "ep", "lwp"))
    drawn = [axes for axes in made.axes if axes.axison]
    assert [title.splitlines()[0] for title in titles(made)[:3]] == ["word", "ep", "lwp"]
    assert len({axes.get_xlim() for axes in drawn}) == len({axes.get_ylim() for axes in drawn}) == 1
    assert len({str(scatter(axes)) for axes in drawn}) == 1  # a kind looks the same everywhere
    assert [axes.get_xlabel() for axes in drawn] == ["", "DIR (%)", "DIR (%)"]
    (one,) = accuracy_figure(report("word", "ep"), "ep").axes
    assert one.get_title("left").startswith("ep\n")


def test_tasks_are_told_apart():
    both = DefectReport([record("finetune", 90, 60), record("finetune", 80, 50, task="A to C")])
    made = accuracy_figure(both)
    assert [title.splitlines()[0] for title in titles(made)] == ["A to B: word", "A to C: word"]


def test_a_student_looks_the_same_in_reports_of_two_and_of_twenty():
    few = DefectReport([record("finetune", 90, 60), record("remos 0.9", 80, 50, **sliced("Remos", 0.9))])
    names = ("Random", "MagPrune", "TopMagnitude", "Renofeation", "Theirs")
    others = [record(f"{name} {n}", 70, n, **sliced(name, n / 10)) for name in names for n in range(1, 5)]
    many = DefectReport([*others, *few.records])
    small, large = (scatter(accuracy_figure(one).axes[0]) for one in (few, many))
    assert small.items() <= large.items() and small[look("remos")] == [(0.5, 0.8)]


def test_seeds_have_equal_weight_and_the_reference_gives_the_floor():
    records = [record("theirs", 70, 10, floor=50), record("plain", 90, 60, floor=4)]
    records.append(record("plain", 80, 40, seed=1, floor=2))
    (axes,) = accuracy_figure(DefectReport(records, {"reference": "plain"})).axes
    assert scatter(axes)[look("plain")] == [(0.5, pytest.approx(0.85))]
    assert list(lines(axes, ":")[0].get_xdata()) == [0.03, 0.03]
    assert "n: ACC 100, DIR 100" in axes.get_title("left")


def test_a_report_without_a_floor_or_without_any_dir_still_has_a_picture(tmp_path):
    bare = [{**record("finetune", 90, 60), "floor": None, "made": None}, record("retrain", 50, 0, "ep", of=0)]
    made = accuracy_figure(DefectReport(bare))
    assert not lines(made.axes[0], ":")[1:] and "no DIR: retrain" in made.axes[1].get_title("left")
    assert report_pictures.accuracy_against_dir(DefectReport(bare), tmp_path / "picture.png").exists()


def test_a_defect_that_was_not_measured_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"\['word'\], but got 'ep'"):
        report_pictures.accuracy_against_dir(report("word"), tmp_path / "picture.png", defect="ep")
    with pytest.raises(ValueError, match=r"got 'word' for task 'B to C'"):
        report_pictures.accuracy_against_dir(report("word"), tmp_path / "picture.png", "word", task="B to C")
    with pytest.raises(ValueError, match=r"\[\]"):
        report_pictures.accuracy_against_dir(DefectReport([]), tmp_path / "picture.png")
