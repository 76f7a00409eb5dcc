import copy
import inspect
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from remos_hf.errors import LayerMismatchError, NonFiniteError, TeacherMismatchError
from remos_hf.evaluation.anatomy import (
    anatomy,
    change_of_weights,
    coverage_of,
    curves_of,
    layers_of,
    slice_facts,
    weights_of,
)
from remos_hf.evaluation.measures import Rate
from remos_hf.judging.report import DefectReport
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.showing import pictures, report_pictures
from remos_hf.showing.maps import share_in_trigger
from remos_hf.showing.palette import looks_of
from remos_hf.slicing.refill import reset_outside
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice
from tests import tiny


def rate(count, of=100):
    return Rate.of(count, of).to_dict()


def record(student, acc, dir_, defect="word", task="A to B", seed=0, floor=2, of=100, **more):
    rates = {"acc": rate(acc), "dir": rate(dir_, of) if of else rate(0, 0), "floor": rate(floor)}
    return {"task": task, "defect": defect, "student": student, "seed": seed, **rates, "made": {}, **more}


def sliced(name, ratio):
    return {"made": {"rule": f"{name} rule", "slice_ratio": ratio, "strategy": {"name": name}}}


RECORDS = [
    record("finetune", 90, 100),
    record("remos 0.9", 84, 20, **sliced("Remos", 0.9)),
    record("remos 0.7", 70, 5, **sliced("Remos", 0.7)),
    record("random 0.9", 80, 50, **sliced("Random", 0.9)),
    record("retrain", 50, 0, of=0, made={"strategy": {"name": "Retrain"}}),
]


def with_curves(name, own, twin=None, **more):
    def curve(counts):
        return counts and {str(number): rate(round(count)) for number, count in zip((0, 5, 50), counts, strict=True)}

    return {**record(name, 90, 90, **more), "reactivation": curve(own), "floor_reactivation": curve(twin)}


def reactivation_figure(records, *place):
    return report_pictures.reactivation_figure(report_pictures.shown_of(DefectReport(records)), *place)


def accuracy_figure(made, *place):
    return report_pictures.accuracy_figure(report_pictures.shown_of(made), *place)


def report(*defects):
    return DefectReport([{**one, "defect": defect} for defect in defects for one in RECORDS])


def pair(seed=0):
    """A teacher, its slice, and the student that was reset and moved a little."""
    teacher = tiny.mlp(seed)
    relevant = choose_slice(teacher, slice_ratio=0.75, rule="top_magnitude", progress=False)
    student = reset_outside(copy.deepcopy(teacher), relevant)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return teacher, relevant, student


def profile():
    counts = {"0": torch.tensor([0, 0, 1, 4]), "2": torch.tensor([2, 4])}
    return CoverageProfile(counts, {"0": torch.tensor([0, 3]), "2": torch.tensor([4])}, 4, {"name": "Top", "k": 3})


def histories():
    ours = [{"step": step, "epoch": 0.1, "loss": 1 / step, "learning_rate": 0.1} for step in range(1, 501)]
    ours.insert(200, {"step": 200, "epoch": 1, "evaluation": {"accuracy": 0.5}})
    trainers = [{"step": step, "loss": 1.0 - step / 1000} for step in (100, 200)]
    trainers += [{"step": 200, "eval_accuracy": 0.75, "eval_loss": 0.2}, {"step": 200, "train_loss": 0.6}]
    return {"fit": ours, "trainer": trainers}


def images(count=2, height=8, width=8):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def corner(height=8, width=8):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[-2:, -2:] = True
    return mask


def many_layers():
    return choose_slice(tiny.bert(layers=12, hidden=4), slice_ratio=0.9, rule="random", progress=False)


def change(pair_, relevant=True):
    teacher, held, student = pair_
    before, after = (weights_of(model, list(held.kept), None) for model in (teacher, student))
    return change_of_weights(before, after, held if relevant else None)


def changes_figure(*pair_):
    return pictures._changes_figure(change(pair_))


def magnitudes_figure(teacher, relevant):
    return pictures._magnitudes_figure(layers_of(weights_of(teacher, list(relevant.kept), relevant), relevant))


def share_figure(relevant):
    return pictures._share_kept_figure(layers_of(None, relevant), slice_facts(relevant))


def convergence_figure(histories_):
    return pictures._convergence_figure({name: curves_of(one) for name, one in histories_.items()}, "accuracy", {})


def one_anatomy(sliced_=True):
    teacher, relevant, student = pair()
    before = {name: weight.detach().clone() for name, weight in teacher.named_parameters()}
    options = {"relevant": relevant, "profile": profile()} if sliced_ else {"head": ("4",)}
    return anatomy(before, student, history=histories()["fit"], **options)


PICTURES = {
    "overlay": lambda path: pictures.overlay(images(), images()[:, 0], path, ["a", "b"], mask=corner()),
    "weight_changes": lambda path: pictures.weight_changes(pair()[0], pair()[2], path, pair()[1])[0],
    "reset_magnitudes": lambda path: pictures.reset_magnitudes(pair()[0], pair()[1], path),
    "share_kept": lambda path: pictures.share_kept(pair()[1], path),
    "coverage_frequencies": lambda path: pictures.coverage_frequencies(profile(), path),
    "convergence": lambda path: pictures.convergence(histories(), path),
    "anatomy_pictures": lambda path: Path(
        pictures.anatomy_pictures(one_anatomy(sliced_=False), Path(path).with_suffix(""))["weight_changes"]
    ).rename(path),
    "reactivation_curve": lambda path: report_pictures.reactivation_curve(
        DefectReport([with_curves("finetune", (90, 95, 99), (1, 9, 50))]), path
    ),
    "accuracy_against_dir": lambda path: report_pictures.accuracy_against_dir(report("word"), path),
}

FIGURES = {
    "6 images": lambda: pictures._overlay_figure(images(6), images(6)[:, 0], ["a label of a class"] * 6, corner()),
    "1 image": lambda: pictures._overlay_figure(images(1), images(1)[:, 0], ["alone"], corner()),
    "4 upright images": lambda: pictures._overlay_figure(images(4, 12, 8), images(4)[:, 0], ["x"] * 4, corner(12, 8)),
    "2 images alone": lambda: pictures._overlay_figure(images(), images()[:, 0], None, None),
    "weight changes": lambda: changes_figure(*pair()),
    "magnitudes of 72 layers": lambda: magnitudes_figure(tiny.bert(layers=12, hidden=4), many_layers()),
    "share kept of 72 layers": lambda: share_figure(many_layers()),
    "share kept of 3 layers": lambda: share_figure(pair()[1]),
    "coverage": lambda: pictures._coverage_figure(coverage_of(profile())),
    "convergence": lambda: convergence_figure(histories()),
    "convergence of 9": lambda: convergence_figure(
        {f"top_magnitude 0.9{number}": histories()["fit"] for number in range(9)}
    ),
    "re-activation": lambda: reactivation_figure(
        [
            with_curves(f"{kind} {ratio}", (90 * ratio, 95, 99), (1, 9, 50), **sliced(kind, ratio))
            for kind in ("Remos", "Random", "MagPrune", "TopMagnitude")
            for ratio in (0.5, 0.7, 0.9)
        ]
    ),
    "5 defects": lambda: accuracy_figure(report("word", "sentence", "ripples", "ep", "lwp")),
    "1 defect": lambda: accuracy_figure(report("word", "ep"), "word"),
}


def words(figure):
    """All that is written on a figure, and where: corners in pixels."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    written = [figure._suptitle, *(text for legend in legends for text in legend.get_texts())]
    for axes in figure.axes:
        written += [axes.title, axes._left_title, axes._right_title, *axes.texts]
        if axes.axison:
            written += [axes.xaxis.label, axes.yaxis.label]
            written += [tick for axis in (axes.xaxis, axes.yaxis) for tick in shown_ticks(axis)]
    return {text: text.get_window_extent(renderer) for text in written if text.get_visible() and text.get_text()}


def shown_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    inside = [tick for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]
    return [label for tick in inside for label in (tick.label1, tick.label2)]


def lines(axes, style="-"):
    return [line for line in axes.lines if line.get_linestyle() == style and len(line.get_xdata())]


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def titles(figure):
    return [axes.get_title("left") or axes.get_title() for axes in figure.axes]


# --- every picture ---


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_whole_png_1280_pixels_wide(name, tmp_path):
    path = PICTURES[name](str(tmp_path / "new" / "picture.png"))
    assert path == tmp_path / "new" / "picture.png" and list(path.parent.iterdir()) == [path]
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width == 1280
        assert len(np.unique(np.asarray(image.convert("L")))) > 5


def test_every_public_picture_is_among_those_tested():
    made = {
        name
        for room in (pictures, report_pictures)
        for name, one in vars(room).items()
        if getattr(one, "__module__", "") == room.__name__ and not name.startswith("_")
        if {"path", "stem"} & set(inspect.signature(one).parameters)
    }
    assert made == {*PICTURES}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_written_overlaps_or_leaves_the_picture_or_is_too_small_for_a_phone(name):
    figure = FIGURES[name]()
    figure.set_dpi(50)  # sizes are in inches and points: the layout is the same
    places = words(figure)
    width, height = figure.get_size_inches() * 50
    for text, place in places.items():
        assert text.get_fontsize() >= 10, f"{text.get_text()!r} is smaller than 8.5 pixels at 390"
        inside = place.x0 >= -1 and place.y0 >= -1 and place.x1 <= width + 1 and place.y1 <= height + 1
        assert inside, f"{text.get_text()!r} leaves the picture: {place}"
    for (one, here), (other, there) in combinations(places.items(), 2):
        wide = min(here.x1, there.x1) - max(here.x0, there.x0)
        high = min(here.y1, there.y1) - max(here.y0, there.y0)
        assert wide < 1 or high < 1.5, f"{one.get_text()!r} overlaps {other.get_text()!r}"
    bottom = min(axes.get_tightbbox().y0 for axes in figure.axes if axes.axison)
    for legend in figure.legends:
        assert legend.get_window_extent().y1 <= bottom + 1, "the legend lies over data"
    assert not [axes for axes in figure.axes if axes.get_legend()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_its_n(name):
    figure = FIGURES[name]()
    told = " ".join([figure._suptitle.get_text(), *titles(figure)])
    assert "n = " in told or "n: ACC" in told


@pytest.mark.parametrize("name", ["coverage_frequencies", "accuracy_against_dir"])
def test_a_picture_is_the_same_file_whatever_style_the_caller_has_set(name, tmp_path):
    first = PICTURES[name](tmp_path / "first.png").read_bytes()
    with matplotlib.rc_context(
        {"font.size": 30, "savefig.bbox": "tight", "axes.facecolor": "red", "lines.marker": "o"}
    ):
        before = dict(matplotlib.rcParams)
        assert PICTURES[name](tmp_path / "second.png").read_bytes() == first
        assert dict(matplotlib.rcParams) == before
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("name", ["share_kept", "coverage_frequencies"])
def test_an_interrupted_write_leaves_the_old_picture(name, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def interrupted(*_):
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PICTURES[name](path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- images with maps ---


def test_under_each_image_stands_the_share_of_its_map_inside_the_trigger():
    maps = torch.stack([torch.ones(2, 2), torch.zeros(2, 2), torch.eye(2)])
    figure = pictures._overlay_figure(images(3), maps, ["one", "two", "three"], corner())
    shares = share_in_trigger(maps, corner())
    told = [axes.texts[0].get_text().replace("\n", " ") for axes in figure.axes[:3]]
    assert told == [
        f"in trigger {100 * shares[0]:.1f} % (area 6.2 %)",
        "in trigger no mass (area 6.2 %)",
        f"in trigger {100 * shares[2]:.1f} % (area 6.2 %)",
    ]
    assert titles(figure)[:3] == ["one", "two", "three"]
    assert len(figure.axes) == 4  # three images and the bar of colours


def test_masks_of_single_images_have_their_own_share_and_outline():
    masks = torch.stack([corner(), corner().flip(0, 1)])
    maps = torch.zeros(2, 8, 8)
    maps[:, :2, :2] = 1
    figure = pictures._overlay_figure(images(), maps, None, masks)
    assert [axes.texts[0].get_text()[:16] for axes in figure.axes[:2]] == ["in trigger 0.0 %", "in trigger 100.0"]
    assert all(axes.collections for axes in figure.axes[:2])


def test_without_a_mask_there_is_no_number_and_no_outline():
    figure = pictures._overlay_figure(images(5), images(5)[:, 0], None, None)
    assert not any(axes.texts or axes.collections for axes in figure.axes[:5])
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 5 and len(figure.axes) == 7  # 2 rows of 3, and the bar


def test_an_image_is_drawn_as_it_is_under_a_map_relative_to_its_maximum():
    shown = images(1, 4, 4)
    maps = torch.tensor([[[0.0, 2.0], [1.0, -3.0]]])
    first, second = pictures._overlay_figure(shown, maps, None, None).axes[0].images
    assert np.allclose(first.get_array(), shown[0].permute(1, 2, 0))
    assert second.get_array().shape == (4, 4)
    assert second.get_array().max() == 1 and second.get_array().min() == 0
    assert np.argmax(second.get_array()) == 3
    grey = pictures._overlay_figure(shown[:, :1], maps, None, None).axes[0].images[0]
    assert np.allclose(grey.get_array(), shown[0, 0])


def test_what_does_not_go_together_is_refused(tmp_path):
    path = tmp_path / "picture.png"
    for arguments in (
        (images(), images(3)[:, 0], path),
        (images(), images()[:, 0], path, ["one"]),
        (images()[:, :2], images()[:, 0], path),
        (images(0), images(0)[:, 0], path),
        (images()[0], images()[:, 0], path),
    ):
        with pytest.raises(ValueError, match="images"):
            pictures.overlay(*arguments)
    with pytest.raises(ValueError, match=r"\(8, 9\)"):
        pictures.overlay(images(), images()[:, 0], path, mask=corner(8, 9))
    with pytest.raises(TypeError, match="uint8"):
        pictures.overlay((255 * images()).byte(), images()[:, 0], path)
    with pytest.raises(NonFiniteError):
        pictures.overlay(images(), images()[:, 0] * float("nan"), path)
    assert not path.exists()


# --- weights ---


def test_bars_of_the_change_count_the_weights_between_their_edges():
    teacher, relevant, student = pair()
    figure = changes_figure(teacher, relevant, student)
    assert len(figure.axes) == 2
    for axes, (group, found) in zip(figure.axes, change(pair()).items(), strict=True):
        heights, edges, _ = axes.patches[-1].get_data()
        assert np.where(heights < 1, 0, heights).tolist() == found["histogram"]
        assert edges[0] == -edges[-1] == -found["reach"] and len(heights) % 2 == 1
        assert f"{group} weights: n = {found['num_weights']:,}" in axes.get_title("left")
        further = found["num_weights"] - sum(found["histogram"])
        assert (f"{further:,} further out" in axes.get_title("left")) == bool(further)
        assert axes.get_yscale() == "log"


def test_one_weight_far_out_does_not_squeeze_the_others_and_is_told():
    values = torch.cat([torch.linspace(-1, 1, 1001), torch.tensor([-500.0])])
    found = change_of_weights({"a": torch.zeros(1002)}, {"a": values})["all"]
    assert found["reach"] < 3 and sum(found["histogram"]) == 1001
    assert "not drawn: 1 further out, up to \N{MINUS SIGN}5e+02" in pictures._told_changes("all", found)


def test_the_numbers_beside_the_picture_are_exact_and_without_the_bars(tmp_path):
    teacher, relevant, student = pair()
    _, numbers = pictures.weight_changes(teacher, student, tmp_path / "a.png", relevant)
    for group, found in change(pair()).items():
        told = {key: found[key] for key in ("num_weights", "share_unchanged", "quantiles")}
        assert numbers[group] == told
    _, numbers = pictures.weight_changes(teacher.state_dict(), student.state_dict(), tmp_path / "a.png", relevant)
    assert numbers["kept"]["num_weights"] + numbers["reset"]["num_weights"] == relevant.num_weights
    plain = tiny.mlp()
    _, numbers = pictures.weight_changes(plain, tiny.mlp(1), tmp_path / "a.png", head=("4",))
    assert list(numbers) == ["all"] and numbers["all"]["num_weights"] == 5 * 7 + 7 * 6


def test_a_slice_that_keeps_all_has_an_empty_panel_of_reset_weights():
    teacher = tiny.mlp()
    relevant = choose_slice(teacher, slice_ratio=1.0, rule="random", progress=False)
    empty = changes_figure(teacher, relevant, tiny.mlp(1)).axes[1]
    assert empty.get_title("left") == "reset weights: n = 0"


def test_wrong_weights_are_refused(tmp_path):
    teacher, relevant, student = pair()
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="relevant="):
        pictures.weight_changes(teacher.state_dict(), student, path)
    with pytest.raises(TeacherMismatchError):
        pictures.weight_changes(student, teacher, path, relevant)
    with pytest.raises(TeacherMismatchError):
        pictures.reset_magnitudes(student, relevant, path)
    with pytest.raises(LayerMismatchError, match="no such weight"):
        pictures.weight_changes(teacher, {"0.weight": student[0].weight}, path, relevant)
    with pytest.raises(LayerMismatchError, match=r"\(7, 5\)"):
        pictures.weight_changes(teacher, tiny.mlp(sizes=(5, 8, 6, 3)), path, relevant)
    with pytest.raises(LayerMismatchError, match="in the teacher and"):
        pictures.weight_changes(teacher, tiny.mlp(sizes=(5, 8, 6, 3)), path)
    broken = {name: one.clone() for name, one in student.state_dict().items()}
    broken["2.weight"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        pictures.weight_changes(teacher, broken, path, relevant)
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        pictures.reset_magnitudes(broken, relevant, path)
    assert not path.exists()


def test_magnitudes_are_quartiles_of_the_kept_and_of_the_reset_weights_of_each_layer():
    teacher, relevant, _ = pair()
    (axes,) = magnitudes_figure(teacher, relevant).axes
    drawn = lines(axes)
    for row, (name, kept) in enumerate(relevant.kept.items()):
        magnitudes = dict(teacher.named_parameters())[name].detach().abs()
        parts = (magnitudes[kept], magnitudes[~kept])
        for number, part in enumerate(parts):
            bar, dot = drawn[4 * row + 2 * number : 4 * row + 2 * number + 2]
            low, middle, high = np.quantile(part.numpy(), (0.25, 0.5, 0.75), method="lower")
            assert list(bar.get_xdata()) == pytest.approx([low, high], rel=5e-3)
            assert list(dot.get_xdata()) == pytest.approx([middle], rel=5e-3)
            assert round(float(dot.get_ydata()[0])) == row
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "2", "4"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer on top
    assert f"n = {relevant.num_weights - relevant.num_kept:,} reset of {relevant.num_weights:,}" in axes.get_title(
        "left"
    )


def test_a_layer_that_lost_nothing_has_no_mark_of_reset_weights():
    teacher = tiny.mlp()
    kept = {f"{number}.weight": torch.ones_like(teacher[number].weight, dtype=torch.bool) for number in (0, 2)}
    kept["2.weight"][0] = False
    (axes,) = magnitudes_figure(teacher.state_dict(), RelevantSlice(kept, 0.9)).axes
    assert len(lines(axes)) == 2 * 3


# --- names of layers ---


def test_layers_keep_their_order_and_a_saved_slice_has_them_by_number(tmp_path):
    relevant = many_layers()
    given_ = [text.get_text() for text in share_figure(relevant).axes[0].get_yticklabels()]
    assert given_[0].startswith("0.attention.self.query") and given_[-1].startswith("11.")
    relevant.save_pretrained(tmp_path)
    read = RelevantSlice.from_pretrained(tmp_path)
    shown = [text.get_text() for text in share_figure(read).axes[0].get_yticklabels()]
    assert [int(name.split(".")[0]) for name in shown] == sorted(int(name.split(".")[0]) for name in given_)
    teacher = tiny.bert(layers=12, hidden=4)
    shown = [text.get_text() for text in magnitudes_figure(teacher, read).axes[0].get_yticklabels()]
    assert shown == given_  # the teacher tells


def test_bars_are_the_shares_kept():
    _, relevant, _ = pair()
    (axes,) = (figure := share_figure(relevant)).axes
    assert [bar.get_width() for bar in axes.patches] == list(relevant.share_by_parameter().values())
    assert axes.get_xlim() == (0, 1)
    assert legend_of(figure) == [f"all layers: {100 * relevant.share_kept:.1f} %"]
    assert lines(axes, "--")[0].get_xdata()[0] == relevant.share_kept


# --- coverage ---


def test_coverage_counts_every_neuron_once_and_tells_what_no_sample_covered():
    (axes,) = (figure := pictures._coverage_figure(coverage_of(profile()))).axes
    inputs, outputs = (patch.get_data().values for patch in axes.patches)
    # Frequencies 0, 0, 1/4, 1, 2/4, 1 and 0, 3/4, 1; a bar is 5 % wide.
    assert {place: count for place, count in enumerate(inputs) if count} == {0: 2, 5: 1, 10: 1, 19: 2}
    assert {place: count for place, count in enumerate(outputs) if count} == {0: 1, 15: 1, 19: 1}
    assert legend_of(figure) == [
        "input neurons: n = 6, never covered 33.3 %",
        "output neurons: n = 3, never covered 33.3 %",
    ]
    assert axes.get_title("left") == "n = 4 samples, 2 layers; Top 3"


def test_a_profile_of_nothing_is_refused(tmp_path):
    for nothing in (CoverageProfile({}, {}, 3), CoverageProfile({"0": torch.zeros(2)}, {"0": torch.zeros(1)}, 0)):
        with pytest.raises(ValueError, match="Profile some data first"):
            pictures.coverage_frequencies(nothing, tmp_path / "picture.png")


# --- convergence ---


def test_curves_come_from_the_histories_of_either_trainer():
    figure = convergence_figure(histories())
    losses, shares = figure.axes
    ours, trainers = losses.lines
    assert (list(trainers.get_xdata()), list(trainers.get_ydata())) == ([100, 200], [0.9, 0.8])
    assert [tuple(line.get_xydata()[0]) for line in shares.lines] == [(200, 0.5), (200, 0.75)]
    assert legend_of(figure) == ["fit", "trainer"]
    assert ours.get_color() == shares.lines[0].get_color()
    looks = {(line.get_color(), line.get_marker()) for line in losses.lines}
    assert len(looks) == 2
    assert "n = 2 students, 2 to 500 logged losses" in losses.get_title("left")


def test_a_student_is_drawn_in_the_look_that_is_given_and_those_of_one_look_are_dashed_apart():
    curves = {name: curves_of(histories()["fit"]) for name in ("remos 0.9", "remos 0.7", "mine")}
    look = looks_of({"remos": "ReMoS"})["remos"]
    figure = pictures._convergence_figure(curves, "accuracy", {"remos 0.9": look, "remos 0.7": look})
    first, second, mine = figure.axes[0].lines
    assert (
        (first.get_color(), first.get_marker())
        == (look.colour, look.marker)
        == (
            second.get_color(),
            second.get_marker(),
        )
    )
    assert first.get_linestyle() != second.get_linestyle()
    assert (mine.get_color(), mine.get_marker()) != (look.colour, look.marker)


def test_long_curves_are_means_of_neighbours():
    figure = convergence_figure({"fit": histories()["fit"]})
    line = figure.axes[0].lines[0]
    assert len(line.get_xdata()) == 200 and "means of neighbouring ones" in figure.axes[0].get_title("left")
    assert line.get_xdata()[0] == 2 and line.get_ydata()[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, rel=5e-3)
    assert line.get_xdata()[-1] == pytest.approx(499.5)


def test_a_curve_that_was_not_measured_has_no_panel():
    only = {"fit": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "eval_accuracy": None}]}
    (axes,) = convergence_figure(only).axes
    assert axes.get_ylabel() == "training loss"
    held_out = {"fit": [{"step": 1, "eval_f1": 0.5}]}
    (axes,) = pictures._convergence_figure({"fit": curves_of(held_out["fit"])}, "f1", {}).axes
    assert axes.get_ylabel() == "held-out f1 (%)"


def test_histories_with_nothing_to_draw_are_refused(tmp_path):
    for wrong in ({}, {"fit": []}, {"a": histories()["fit"], "fit": [{"step": 1, "train_loss": 0.5}]}):
        with pytest.raises(ValueError, match="no history|'fit' holds none"):
            pictures.convergence(wrong, tmp_path / "picture.png")


def test_a_history_that_was_summarised_is_drawn_like_the_one_it_came_from(tmp_path):
    held = {name: curves_of(one) for name, one in histories().items()}
    first = pictures.convergence(histories(), tmp_path / "first.png").read_bytes()
    assert pictures.convergence(held, tmp_path / "second.png").read_bytes() == first


# --- what a summary holds ---


def test_a_summary_is_drawn_as_the_models_and_the_slice_themselves_are(tmp_path):
    teacher, relevant, student = pair()
    drawn = pictures.anatomy_pictures(one_anatomy(), tmp_path / "a student")
    assert {kind: path.name for kind, path in drawn.items()} == {
        kind: f"a student_{kind}.png"
        for kind in ("share_kept", "reset_magnitudes", "weight_changes", "coverage_frequencies")
    }
    path = tmp_path / "other.png"
    assert drawn["share_kept"].read_bytes() == pictures.share_kept(relevant, path).read_bytes()
    magnitudes = pictures.reset_magnitudes(teacher, relevant, path).read_bytes()
    assert drawn["reset_magnitudes"].read_bytes() == magnitudes
    assert drawn["coverage_frequencies"].read_bytes() == pictures.coverage_frequencies(profile(), path).read_bytes()


def test_a_student_without_a_slice_has_no_picture_of_one(tmp_path):
    assert list(pictures.anatomy_pictures(one_anatomy(sliced_=False), tmp_path / "plain")) == ["weight_changes"]


# --- re-activation ---


# --- accuracy against DIR ---
