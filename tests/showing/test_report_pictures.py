import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remos_hf.evaluation.measures import Rate
from remos_hf.judging.report import DefectReport
from remos_hf.showing import canvas, report_pictures
from tests.showing.test_pictures import RECORDS, legend_of, lines, record, report, titles, with_curves


def test_reactivation_is_a_line_a_student_with_the_floor_dashed():
    records = [
        with_curves("finetune", (90, 95, 99), (1, 9, 50)),
        with_curves("remos", (2, 30, 80), (1, 8, 40)),
        with_curves("retrain", (0, 5, 10)),
        record("without", 90, 90),
    ]
    figure = report_pictures._reactivation_figure(records)
    (axes,) = figure.axes
    solid, dashed = lines(axes), lines(axes, "--")
    assert [list(line.get_ydata()) for line in solid] == [[0.9, 0.95, 0.99], [0.02, 0.3, 0.8], [0.0, 0.05, 0.1]]
    assert [list(line.get_ydata()) for line in dashed] == [[0.01, 0.09, 0.5], [0.01, 0.08, 0.4]]
    assert [line.get_color() for line in dashed] == [line.get_color() for line in solid[:2]]
    assert list(solid[0].get_xdata()) == [0, 5, 50] == list(axes.get_xticks())
    assert sorted(legend_of(figure)) == ["dashed: benign twin (floor)", "finetune", "remos", "retrain"]
    assert "A to B: word" in figure._suptitle.get_text() and "n = 100 samples" in axes.get_title("left")


def test_error_bars_are_the_intervals():
    (axes,) = report_pictures._reactivation_figure([with_curves("finetune", (90, 95, 99))]).axes
    (bars,) = axes.containers
    ends = [segment[:, 1] for segment in bars[2][0].get_segments()]
    assert np.allclose(ends, [[Rate.of(count, 100).low, Rate.of(count, 100).high] for count in (90, 95, 99)])


def test_seeds_of_a_student_are_pooled():
    both = [with_curves("remos", (10, 20, 30), seed=0), with_curves("remos", (30, 40, 50), seed=1)]
    (axes,) = report_pictures._reactivation_figure(both).axes
    assert list(lines(axes)[0].get_ydata()) == [0.2, 0.3, 0.4]
    assert "n = 200 samples" in axes.get_title("left")


def test_records_of_several_defects_or_of_none_are_refused(tmp_path):
    path = tmp_path / "picture.png"
    two = [with_curves("remos", (1, 2, 3)), with_curves("remos", (1, 2, 3), defect="ep")]
    with pytest.raises(ValueError, match=r"'ep'.*'word'.*Choose the records of one"):
        report_pictures.reactivation_curve(two, path)
    for nothing in ([], [record("finetune", 90, 90)], [{**record("a", 1, 1), "reactivation": None}]):
        with pytest.raises(ValueError, match="no record holds any"):
            report_pictures.reactivation_curve(nothing, path)
    assert report_pictures.reactivation_curve(two[0], path).exists()


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
        (bars[0].get_color(), bars[0].get_marker()): [tuple(map(float, place)) for place in bars[0].get_xydata()]
        for bars in axes.containers
    }


def test_a_panel_has_a_point_a_student_joined_by_rule_in_the_order_of_ratios():
    figure = report_pictures._accuracy_figure(DefectReport(RECORDS[::-1]), None)
    (axes,) = figure.axes
    assert sorted(scatter(axes).values()) == [[(0.2, 0.84), (0.05, 0.7)], [(0.5, 0.8)], [(1.0, 0.9)]]
    assert legend_of(figure) == ["random", "remos, model scope", "finetune", "Pareto front", "benign floor"]
    assert sorted(text.get_text() for text in axes.texts) == ["0.7", "0.9", "0.9"]
    (floor,) = lines(axes, ":")
    assert list(floor.get_xdata()) == [0.02, 0.02]
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert [tuple(place) for place in front.get_xydata()] == [(0.05, 0.7), (0.2, 0.84), (1.0, 0.9)]
    assert axes.get_title("left").splitlines() == ["word", "n: ACC 100, DIR 100", "no DIR: retrain"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("DIR (%)", "ACC (%)")


def test_points_have_their_intervals_both_ways():
    (axes,) = report_pictures._accuracy_figure(DefectReport([record("finetune", 90, 60)]), None).axes
    across, up = (bars.get_segments()[0] for bars in axes.containers[0][2])
    assert np.allclose(across[:, 0], [Rate.of(60, 100).low, Rate.of(60, 100).high])
    assert np.allclose(up[:, 1], [Rate.of(90, 100).low, Rate.of(90, 100).high])


def test_every_defect_has_a_panel_on_the_same_scales():
    made = report_pictures._accuracy_figure(report("word", "ep", "lwp"), None)
    drawn = [axes for axes in made.axes if axes.axison]
    assert [title.splitlines()[0] for title in titles(made)[:3]] == ["word", "ep", "lwp"]
    assert len({axes.get_xlim() for axes in drawn}) == len({axes.get_ylim() for axes in drawn}) == 1
    assert len({str(scatter(axes)) for axes in drawn}) == 1  # a kind looks the same everywhere
    assert [axes.get_xlabel() for axes in drawn] == ["", "DIR (%)", "DIR (%)"]
    (one,) = report_pictures._accuracy_figure(report("word", "ep"), "ep").axes
    assert one.get_title("left").startswith("ep\n")


def test_tasks_are_told_apart():
    both = DefectReport([record("finetune", 90, 60), record("finetune", 80, 50, task="A to C")])
    made = report_pictures._accuracy_figure(both, None)
    assert [title.splitlines()[0] for title in titles(made)] == ["A to B: word", "A to C: word"]


def test_one_task_is_drawn_in_the_colors_of_all():
    both = DefectReport([record("finetune", 90, 60), record("remos", 80, 50, task="A to C")])
    (axes,) = report_pictures._accuracy_figure(both, None, "A to C").axes
    ((look, points),) = scatter(axes).items()
    assert points == [(0.5, 0.8)] and look == list(canvas.looks_of_kinds())[1]


def test_seeds_are_pooled_and_the_reference_gives_the_floor():
    records = [record("remos", 70, 10, floor=50), record("plain", 90, 60, floor=4)]
    records.append(record("plain", 80, 40, seed=1, floor=2))
    (axes,) = report_pictures._accuracy_figure(DefectReport(records, {"reference": "plain"}), None).axes
    assert [(0.5, 0.85)] in scatter(axes).values()
    assert list(lines(axes, ":")[0].get_xdata()) == [0.03, 0.03]
    assert "n: ACC 100 to 200, DIR 100 to 200" in axes.get_title("left")


def test_a_report_without_a_floor_or_without_any_dir_still_has_a_picture(tmp_path):
    bare = [{**record("finetune", 90, 60), "floor": None, "made": None}, record("retrain", 50, 0, "ep", of=0)]
    made = report_pictures._accuracy_figure(DefectReport(bare), None)
    assert not lines(made.axes[0], ":")[1:] and "no DIR: retrain" in made.axes[1].get_title("left")
    assert report_pictures.accuracy_against_dir(DefectReport(bare), tmp_path / "picture.png").exists()


def test_a_defect_that_was_not_measured_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"\['word'\], but got 'ep'"):
        report_pictures.accuracy_against_dir(report("word"), tmp_path / "picture.png", defect="ep")
    with pytest.raises(ValueError, match=r"got 'word' for task 'B to C'"):
        report_pictures.accuracy_against_dir(report("word"), tmp_path / "picture.png", "word", task="B to C")
    with pytest.raises(ValueError, match=r"\[\]"):
        report_pictures.accuracy_against_dir(DefectReport([]), tmp_path / "picture.png")
