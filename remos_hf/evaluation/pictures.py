"""What was measured, as PNG files: 1280 pixels wide, with letters that still read at 390.

Every picture says on how many samples, weights or steps it stands. Nothing here keeps state between calls: no pyplot.
"""

import io
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from remos_hf.adapters.images import check_pixels
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.coverage.profile import CoverageProfile
from remos_hf.coverage.sidecar_file import replace_file
from remos_hf.errors import LayerMismatchError, NonFiniteError
from remos_hf.evaluation.maps import resized_mass, share_in_trigger
from remos_hf.evaluation.measures import Rate
from remos_hf.evaluation.report import DefectReport
from remos_hf.slicing.relevant_slice import RelevantSlice

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.style import context
    from matplotlib.ticker import FuncFormatter, NullLocator
except ImportError as error:
    raise ImportError("Pictures need matplotlib: pip install 'remos_hf[plots]'.") from error

# Okabe and Ito's colours, which colour-blind readers can tell apart; without yellow, too pale for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#8C8C8C"
_MARKERS = "os^DvPX<>*p"  # as many as a prime, so that colour and marker together repeat late
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)

_WIDTH = 6.4  # inches, which make 1280 pixels
_DPI = 200
_ROW = 0.2  # inches for one layer of a picture with a row a layer
_LETTERS = 26  # of a layer's name
_POINTS = 200  # of a curve; longer ones are averaged
_NONE = 0.5  # where a log axis draws no weight at all
_PART = 1 << 22  # weights looked at together
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "grid.color": "0.9",
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "savefig.bbox": None,
    "savefig.facecolor": "white",
    "text.usetex": False,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
}
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}")
# Whatever style the caller has set: the same numbers make the same file.
_styled = context(_STYLE, after_reset=True)

Weights = nn.Module | Mapping[str, Tensor]


def overlay(
    images: Tensor,
    maps: Tensor,
    path: str | os.PathLike,
    titles: Sequence[str] | None = None,
    *,
    mask: Tensor | None = None,
) -> Path:
    """Draw images with maps over them; with a mask also its outline and, under each, the share of the map inside.

    Args:
        images: Values from 0 to 1 (`ImageInput.denormalised` gives them back), shape (samples, 1 or 3, height, width).
        maps: As `activation_map` or `grad_cam` gives them, shape (samples, rows, columns). Each is coloured relative to
            its own maximum; the numbers are of the map as it is.
        path: The PNG file.
        titles: One for each image.
        mask: The trigger, as `share_in_trigger` takes it.

    Returns:
        The file written.

    Raises:
        TypeError: Images are whole numbers, or the mask is not bool.
        ValueError: There is no image, or shapes do not fit.
        NonFiniteError: A map holds NaN or infinity.
    """
    return _written(path, _overlay_figure(images, maps, titles, mask))


def weight_changes(
    teacher: Weights,
    student: Weights,
    path: str | os.PathLike,
    relevant: RelevantSlice | None = None,
    *,
    head: tuple[str, ...] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Draw how far each weight of the body moved from the teacher's value: a histogram of student - teacher.

    Weights are read layer by layer, twice, and not held together.

    Args:
        teacher: Module or state dict.
        student: Module or state dict with the same names.
        path: The PNG file.
        relevant: The student's slice: its weights are drawn, kept and reset ones apart. Without it, all weights outside
            the teacher's head, which then is a module.
        head: Without a slice, the modules that are left out; found if None.

    Returns:
        The file written, and by "kept" and "reset", or "all": "num_weights", "share_unchanged" (of those, the share
        whose difference is exactly 0; None of no weights) and "quantiles" by their level as text. A quantile is the
        exact difference, as float32, of the weight at the place floor(level * (num_weights - 1)) in ascending order.

    Raises:
        LayerMismatchError: A weight is missing or has another shape.
        TeacherMismatchError: The teacher is a module and not the one that the slice was made from.
        NonFiniteError: A difference is NaN or infinite.
        ValueError: The teacher is a state dict and there is no slice.

    Source:
        ReMoS (ICSE 2022), Fig. 9, whose axis says w_S / w_T and which shows the difference.
        Differs: kept and reset weights stand apart.
    """
    figure, numbers = _weight_changes_figure(teacher, student, relevant, head)
    return _written(path, figure), numbers


def reset_magnitudes(teacher: Weights, relevant: RelevantSlice, path: str | os.PathLike) -> Path:
    """Draw the magnitudes of the reset weights beside those of all weights, layer by layer: median and quartiles.

    Args:
        teacher: Module or state dict.
        relevant: Its slice.
        path: The PNG file.

    Returns:
        The file written.

    Raises:
        LayerMismatchError: A weight is missing or has another shape.
        TeacherMismatchError: The teacher is a module and not the one that the slice was made from.
        NonFiniteError: A weight is NaN or infinite.
    """
    return _written(path, _reset_magnitudes_figure(teacher, relevant))


def share_kept(relevant: RelevantSlice, path: str | os.PathLike) -> Path:
    """Draw the share of weights that the slice keeps, layer by layer.

    Args:
        relevant: The slice.
        path: The PNG file.

    Returns:
        The file written.
    """
    return _written(path, _share_kept_figure(relevant))


def coverage_frequencies(profile: CoverageProfile, path: str | os.PathLike) -> Path:
    """Draw how many neurons are covered by which share of the samples, input and output neurons apart.

    Args:
        profile: The profile.
        path: The PNG file.

    Returns:
        The file written.

    Raises:
        ValueError: The profile counted no sample or no layer.
    """
    return _written(path, _coverage_figure(profile))


def convergence(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike, *, metric: str = "accuracy"
) -> Path:
    """Draw the training loss and, where it was measured, a share on held-out data, against steps; one line a student.

    Args:
        histories: By student: `trainer.state.log_history`, or `fit(...).history`. Entries with "step" and "loss" make
            the loss; those with "eval_<metric>", or with "evaluation" that holds the metric, make the other curve.
        path: The PNG file.
        metric: A share in [0, 1].

    Returns:
        The file written. Of curves with more than 200 losses, neighbours are averaged.

    Raises:
        ValueError: A history holds nothing that can be drawn.
    """
    return _written(path, _convergence_figure(histories, metric))


def reactivation_curve(records: Mapping[str, Any] | Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Draw the DIR after re-tuning with so many poisoned samples; one line a student, its benign twin's dashed.

    Args:
        records: Of a `DefectReport`, all of one task and defect. Seeds of a student are pooled; records without
            re-activation are left out.
        path: The PNG file.

    Returns:
        The file written.

    Raises:
        ValueError: No record holds re-activation, or they are of several defects.
    """
    return _written(path, _reactivation_figure([records] if isinstance(records, Mapping) else list(records)))


def accuracy_against_dir(report: DefectReport, path: str | os.PathLike, defect: str | None = None) -> Path:
    """Draw accuracy against DIR: a panel for each task and defect, with 95 % intervals, Pareto front and benign floor.

    Students on the front are those that no other beats in accuracy without a higher DIR. Seeds are pooled. Points of
    one rule are joined in the order of their slice ratio.

    Args:
        report: The report.
        path: The PNG file.
        defect: Draw this one alone, with the slice ratios beside the points.

    Returns:
        The file written. Students without a DIR (none of whose samples could show the defect) are named, not drawn.

    Raises:
        ValueError: The report has no record, or none of this defect.
    """
    return _written(path, _accuracy_figure(report, defect))


# --- figures: tests look at these ---


@_styled
def _overlay_figure(images: Tensor, maps: Tensor, titles: Sequence[str] | None, mask: Tensor | None) -> Figure:
    _check_overlay(images, maps, titles, mask)
    count, height, width = len(images), *images.shape[2:]
    mass = resized_mass(maps.detach().cpu(), height, width)
    shares = None if mask is None else share_in_trigger(maps.detach().cpu(), mask.cpu()).tolist()
    masks = None if mask is None else mask.cpu().expand(count, height, width)
    columns = min(3, count)
    rows = math.ceil(count / columns)
    cell = _WIDTH / columns
    letters = int(62 / columns)
    above = max((len(textwrap.wrap(title, letters)) for title in titles or ()), default=0)
    tall = cell * height / width + 0.2 * above + (0.2 * (1 + (columns > 2)) if shares else 0)
    # A single image would be as wide as the picture, and twice as high if it is upright.
    figure = _figure(
        f"Where the model looks (n = {count} image{'s' * (count > 1)})", rows * min(tall, 1.5 * _WIDTH) + 1.2
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    shown = None
    for number, axes in enumerate(grid):
        axes.set_axis_off()
        if number >= count:
            continue
        picture = images[number].detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
        axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
        largest = float(mass[number].max())
        relative = (mass[number] / (largest or 1.0)).numpy()
        shown = axes.imshow(relative, cmap="inferno", alpha=0.15 + 0.55 * relative, vmin=0, vmax=1)
        if titles is not None:
            axes.set_title(textwrap.fill(titles[number], letters), loc="center")
        if shares is not None:
            _outline(axes, masks[number].numpy())
            told = "no mass" if math.isnan(shares[number]) else f"{100 * shares[number]:.1f} %"
            break_ = "\n" if columns > 2 else " "
            chance = 100 * float(masks[number].double().mean())
            # Text below the axes, which are off and so have no label of their own.
            axes.text(
                0.5,
                -0.03,
                f"in trigger {told}{break_}(area {chance:.1f} %)",
                transform=axes.transAxes,
                ha="center",
                va="top",
            )
    bar = figure.colorbar(shown, ax=grid.tolist(), location="bottom", shrink=0.6, aspect=30, pad=0.02)
    bar.set_label("map, relative to its own maximum")
    return figure


def _check_overlay(images: Tensor, maps: Tensor, titles: Sequence[str] | None, mask: Tensor | None) -> None:
    check_pixels(images)
    if images.dim() != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"images have the shape (samples, 1 or 3, height, width), but got {tuple(images.shape)}.")
    if len(maps) != len(images) or (titles is not None and len(titles) != len(images)):
        told = "" if titles is None else f" and {len(titles)} titles"
        raise ValueError(f"Every image has a map and a title, but got {len(images)} images, {len(maps)} maps{told}.")
    if mask is not None and mask.shape[-2:] != images.shape[2:]:
        raise ValueError(
            f"mask lies on the images, whose shape is {tuple(images.shape)}, but its own is {tuple(mask.shape)}."
        )


@_styled
def _weight_changes_figure(
    teacher: Weights, student: Weights, relevant: RelevantSlice | None, head: tuple[str, ...] | None
) -> tuple[Figure, dict[str, Any]]:
    names = _body_names(teacher, relevant, head)
    # The slice is made of the teacher, so only there can its hash be compared.
    before, after = _weights_of(teacher, names, relevant, is_teacher=True), _weights_of(student, names, relevant)

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            _check_same_shape(name, before[name], after[name])
            kept = None if relevant is None else relevant.kept[name].flatten()
            parts = zip(before[name].flatten().split(_PART), after[name].flatten().split(_PART), strict=True)
            for number, (old, new) in enumerate(parts):
                change = new.float().cpu() - old.float().cpu()
                if not torch.isfinite(change).all():
                    raise NonFiniteError(f"student - teacher is NaN or infinite in '{name}': one of them is broken.")
                if kept is None:
                    yield "all", change
                else:
                    chosen = kept[number * _PART : number * _PART + len(change)]
                    yield "kept", change[chosen]
                    yield "reset", change[~chosen]

    groups = ("all",) if relevant is None else ("kept", "reset")
    found = _Distribution(changes, groups)
    figure = _figure("Change of the body's weights by fine-tuning", 2.9 * len(groups) + 0.8)
    grid = figure.subplots(len(groups), 1, squeeze=False).ravel()
    for axes, group, colour in zip(grid, groups, PALETTE, strict=False):
        heights = np.maximum(found.histogram[group], _NONE)
        axes.stairs(heights, found.edges[group], color=colour, alpha=0.25, fill=True, baseline=_NONE)
        axes.stairs(heights, found.edges[group], color=colour, baseline=_NONE)
        axes.set_yscale("log")
        axes.set_ylim(bottom=_NONE)
        axes.set_ylabel("weights (log scale)")
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(_told_changes(group, found))
    grid[-1].set_xlabel("student − teacher (difference of a weight's values)")
    numbers = {
        group: {
            "num_weights": found.num_weights[group],
            "share_unchanged": found.unchanged[group] / found.num_weights[group] if found.num_weights[group] else None,
            "quantiles": found.quantiles[group],
        }
        for group in groups
    }
    return figure, numbers


@_styled
def _reset_magnitudes_figure(teacher: Weights, relevant: RelevantSlice) -> Figure:
    weights = _weights_of(teacher, _in_order(relevant.kept), relevant, is_teacher=True)
    names = list(weights)
    num_reset = relevant.num_weights - relevant.num_kept
    figure, axes = _layers_figure("Magnitude of the reset weights by layer", names)
    axes.set_title(f"n = {num_reset:,} reset of {relevant.num_weights:,} weights")
    kinds = {"all weights": (_GREY, -0.18, "o"), "reset weights": (PALETTE[1], 0.18, "D")}
    for row, name in enumerate(names):
        magnitudes = weights[name].float().abs().flatten().cpu().numpy()
        if not np.isfinite(magnitudes).all():
            raise NonFiniteError(f"'{name}' holds NaN or infinity: the teacher's checkpoint is broken.")
        parts = (magnitudes, magnitudes[~relevant.kept[name].flatten().numpy()])
        for part, (colour, place, marker) in zip(parts, kinds.values(), strict=True):
            if part.size:
                low, middle, high = np.quantile(part, (0.25, 0.5, 0.75))
                axes.plot([low, high], [row + place] * 2, color=colour, linewidth=2.4, solid_capstyle="butt")
                axes.plot(middle, row + place, color=colour, marker=marker, markersize=4)
    for label, (colour, _, marker) in kinds.items():
        axes.plot([], [], color=colour, marker=marker, label=f"{label}: median, quartiles")
    axes.set_xlim(left=0)
    axes.set_xlabel("magnitude of the teacher's weight, |w|")
    figure.legend(loc="outside lower left")
    return figure


@_styled
def _share_kept_figure(relevant: RelevantSlice) -> Figure:
    by_name = relevant.share_by_parameter()
    shares = {name: by_name[name] for name in _in_order(by_name)}
    figure, axes = _layers_figure("Share of weights kept by layer", list(shares))
    axes.set_title(f"n = {relevant.num_weights:,} weights; rule {relevant.rule}, {relevant.scope} scope")
    axes.barh(range(len(shares)), list(shares.values()), height=0.7, color=PALETTE[0])
    axes.axvline(
        relevant.share_kept, color=PALETTE[1], linestyle="--", label=f"all layers: {100 * relevant.share_kept:.1f} %"
    )
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.set_xlabel("weights kept (%)")
    figure.legend(loc="outside lower left")
    return figure


@_styled
def _coverage_figure(profile: CoverageProfile) -> Figure:
    if not profile.num_samples or not profile.input_counts:
        raise ValueError(
            f"A profile to draw counts samples on layers, but this one has {profile.num_samples} samples on "
            f"{len(profile.input_counts)} layers. Profile some data first."
        )
    figure = _figure("How often neurons are covered", 4.7)
    axes = figure.subplots()
    criterion = " ".join(str(value) for value in profile.criterion.values())
    axes.set_title(textwrap.fill(f"n = {profile.num_samples:,} samples" + (f"; {criterion}" if criterion else ""), 62))
    edges = np.linspace(0, 1, 51)
    kinds = {"input": (profile.input_counts, "-"), "output": (profile.output_counts, "--")}
    for (kind, (by_layer, line)), colour in zip(kinds.items(), PALETTE, strict=False):
        counts = torch.cat([counts.flatten() for counts in by_layer.values()])
        never = float((counts == 0).double().mean())
        heights = np.histogram((counts.double() / profile.num_samples).numpy(), edges)[0]
        label = f"{kind} neurons: n = {len(counts):,}, never covered {100 * never:.1f} %"
        axes.stairs(heights, edges, color=colour, linestyle=line, linewidth=1.8, label=label)
    axes.set_xlim(-0.01, 1.01)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.set_xlabel("coverage frequency (% of samples that cover the neuron)")
    axes.set_ylabel("neurons (log scale)")
    figure.legend(loc="outside lower left")
    return figure


@_styled
def _convergence_figure(histories: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> Figure:
    losses = {name: _curve(history, lambda entry: entry.get("loss")) for name, history in histories.items()}
    shares = {name: _curve(history, lambda entry: _measured(entry, metric)) for name, history in histories.items()}
    empty = [name for name in histories if not losses[name] and not shares[name]]
    if empty or not histories:
        raise ValueError(
            f"A history holds entries with 'step' and 'loss' or 'eval_{metric}', but that of {empty[0]!r} holds none."
            if empty
            else "There is no history to draw."
        )
    panels = [(losses, "training loss")] if any(losses.values()) else []
    panels += [(shares, f"held-out {metric} (%)")] if any(shares.values()) else []
    lengths = sorted(len(curve) for curve in losses.values())
    logged = f"{lengths[0]:,}" if lengths[0] == lengths[-1] else f"{lengths[0]:,} to {lengths[-1]:,}"
    figure = _figure("Convergence", 2.9 * len(panels) + 0.8 + 0.12 * len(histories))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False).ravel()
    for axes, (curves, title) in zip(grid, panels, strict=True):
        for (name, curve), (colour, marker) in zip(curves.items(), _looks(), strict=False):
            steps, values = _thinned(curve)
            some = max(1, len(steps) // 12)
            label = name if axes is grid[0] else None
            axes.plot(steps, values, color=colour, marker=marker, markersize=5, markevery=some, label=label)
        axes.set_ylabel(title)
        if curves is shares:
            axes.yaxis.set_major_formatter(_PERCENT)
    grid[-1].set_xlabel("optimizer steps")
    told = f"n = {len(histories)} students, {logged} logged losses each"
    grid[0].set_title(f"{told}\n(points are means of neighbouring ones)" if lengths[-1] > _POINTS else told)
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@_styled
def _reactivation_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    held = [record for record in records if record.get("reactivation")]
    about = {(record.get("task") or "", record["defect"]) for record in held}
    if len(about) != 1:
        raise ValueError(
            "Re-activation is drawn of one task and defect, but "
            + (f"got {sorted(about)}. Choose the records of one." if about else "no record holds any.")
        )
    students = list(dict.fromkeys(record["student"] for record in held))
    own, twin = (
        {name: _pooled_curve(one.get(key) for one in held if one["student"] == name) for name in students}
        for key in ("reactivation", "floor_reactivation")
    )
    task, defect = about.pop()
    told = f"{task}: {defect}" if task else defect
    sizes = [rate.num_samples for curve in own.values() for rate in curve.values()]
    figure = _figure(f"Re-activation of {told}", 4.3 + 0.12 * len(students))
    axes = figure.subplots()
    axes.set_title(f"n = {_span(sizes)} samples a point")
    places: set[int] = set()
    for name, (colour, marker) in zip(students, _looks(), strict=False):
        for curve, line, label in ((own[name], "-", name), (twin[name], "--", None)):
            drawn = {count: rate for count, rate in curve.items() if rate.value is not None}
            if not drawn:
                continue
            places |= set(drawn)
            rates = list(drawn.values())
            axes.errorbar(
                list(drawn),
                [rate.value for rate in rates],
                yerr=_reach(rates),
                color=colour,
                marker=marker,
                linestyle=line,
                markerfacecolor=colour if line == "-" else "white",
                capsize=3,
                elinewidth=1,
                label=label,
            )
    if any(twin.values()):
        axes.plot([], [], color=_GREY, linestyle="--", label="dashed: benign twin (floor)")
    axes.set_xscale("function", functions=(np.log1p, np.expm1))
    axes.set_xticks(sorted(places), [f"{count:,}" for count in sorted(places)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set_xlabel("poisoned samples in re-tuning (log scale)")
    axes.set_ylabel("DIR (%), 95 % interval")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@_styled
def _accuracy_figure(report: DefectReport, defect: str | None) -> Figure:
    panels = _by_defect(report, defect)
    looks = dict(zip(dict.fromkeys(_kind(record) for record in report.records), _looks(), strict=False))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    kinds = {_kind(record) for students in panels.values() for records in students.values() for record in records}
    height = rows * (4.2 if columns == 1 else 3.2) + 0.6 + 0.22 * math.ceil((len(kinds) + 2) / 2)
    figure = _figure("Accuracy against DIR (upper left is better)", height)
    # The same scales everywhere, so that panels compare.
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    several_tasks = len({task for task, _ in panels}) > 1
    drawn: set[str] = set()
    for number, (axes, ((task, name), students)) in enumerate(zip(grid, panels.items(), strict=False)):
        lines = [f"{task}: {name}" if several_tasks else name]
        points = _points(students)
        drawn |= {_kind(students[student][0]) for student in points}
        _draw_points(axes, points, students, looks, with_ratios=len(panels) == 1)
        floor = _pooled(
            record.get("floor") for record in students.get(report.settings.get("reference", "finetune"), [])
        )
        if floor is not None and floor.value is not None:
            axes.axvline(floor.value, color="black", linestyle=":", linewidth=1.4)
        accs, dirs = ([rates[place].num_samples for rates in points.values()] for place in (0, 1))
        lines.append(f"n: ACC {_span(accs)}, DIR {_span(dirs)}")
        missing = [student for student in students if student not in points]
        if missing:
            width = 60 // columns
            lines.append(textwrap.shorten(f"no DIR: {', '.join(missing)}", width, placeholder=" ..."))
        axes.set_title("\n".join(lines))
        if number % columns == 0:
            axes.set_ylabel("ACC (%)")
        if number + columns >= len(panels):  # nothing below
            axes.set_xlabel("DIR (%)")
            axes.tick_params(labelbottom=True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for kind, (colour, marker) in looks.items():
        if kind in drawn:
            grid[0].plot([], [], color=colour, marker=marker, linestyle="none", label=kind)
    grid[0].plot([], [], color=_GREY, linewidth=5, alpha=0.35, label="Pareto front")
    grid[0].plot([], [], color="black", linestyle=":", label="benign floor")
    figure.legend(loc="outside lower left", ncols=2, columnspacing=1.0, handletextpad=0.5)
    return figure


def _draw_points(
    axes: Axes,
    points: Mapping[str, tuple[Rate, Rate]],
    students: Mapping[str, list[Mapping[str, Any]]],
    looks: Mapping[str, tuple[str, str]],
    *,
    with_ratios: bool,
) -> None:
    front = _front([(dir_.value, acc.value) for acc, dir_ in points.values()])
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=_GREY, linewidth=5, alpha=0.35, zorder=1)
    by_kind: dict[str, list[str]] = {}
    for name in sorted(points, key=lambda name: -_ratio(students[name][0])):
        by_kind.setdefault(_kind(students[name][0]), []).append(name)
    beside = cycle((("left", 4), ("left", -12), ("right", 4), ("right", -12)))
    for kind, names in by_kind.items():
        colour, marker = looks[kind]
        accs, dirs = zip(*(points[name] for name in names), strict=True)
        x, y = [rate.value for rate in dirs], [rate.value for rate in accs]
        reach = {"xerr": _reach(dirs), "yerr": _reach(accs)}
        axes.errorbar(x, y, **reach, color=colour, marker=marker, linewidth=0.8, elinewidth=0.9, markersize=5)
        if with_ratios and "slice_ratio" in (students[names[0]][0].get("made") or {}):
            side, above = next(beside)
            for name, *place in zip(names, x, y, strict=True):
                told = axes.annotate(
                    f"{_ratio(students[name][0]):g}",
                    place,
                    (4 if side == "left" else -4, above),
                    textcoords="offset points",
                    ha=side,
                    color=colour,
                )
                told.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_PERCENT)


def _told_changes(group: str, found: "_Distribution") -> str:
    number, values = found.num_weights[group], found.quantiles[group]
    if not number:
        return f"{group} weights: n = 0"
    beyond = number - int(found.histogram[group].sum())
    furthest = max(values["0"], values["1"], key=abs)
    told = f"{group} weights: n = {number:,}, 98 % in [{_short(values['0.01'])}, {_short(values['0.99'])}]"
    return f"{told}\nnot drawn: {beyond:,} further out, up to {_short(furthest)}" if beyond else told


# --- what figures are made of ---


def _figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, 52), x=0.01, ha="left")
    return figure


def _layers_figure(title: str, names: Sequence[str]) -> tuple[Figure, Axes]:
    figure = _figure(title, max(2.2, _ROW * len(names) + 1.7))
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), _short_names(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    # Rows far from the bottom want an axis near them.
    axes.tick_params(axis="x", top=len(names) > 20, labeltop=len(names) > 20)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


@_styled
def _written(path: str | os.PathLike, figure: Figure) -> Path:
    content = io.BytesIO()
    # Without the version of matplotlib in it, the same picture is the same file.
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    path = Path(path)
    replace_file(path, content.getvalue())
    return path


def _looks() -> Iterator[tuple[str, str]]:
    """Give colours with markers; the pair repeats after 77."""
    for number in range(len(PALETTE) * len(_MARKERS)):
        yield PALETTE[number % len(PALETTE)], _MARKERS[number % len(_MARKERS)]


def _outline(axes: Axes, mask: np.ndarray) -> None:
    padded = np.pad(mask, 1).astype(float)
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    for colour, width in (("white", 3.0), ("black", 1.2)):
        axes.contour(columns, rows, padded, levels=[0.5], colors=colour, linewidths=width)
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)


def _short_names(names: Sequence[str]) -> list[str]:
    """Leave out what all names have in common, and what comes first in long ones, as long as names stay apart."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    common = len(os.path.commonprefix([one[:-1] for one in parts]))
    whole = [".".join(one[common:]) for one in parts]
    short = []
    for name in whole:
        held = name.split(".")
        while len(held) > 1 and len(".".join(held)) > _LETTERS:
            held = held[1:]
        short.append(".".join(held)[-_LETTERS:])
    return short if len(set(short)) == len(set(whole)) else whole


def _in_order(names: Iterable[str]) -> list[str]:
    """Give names in the order of the layers: a slice that was saved has them sorted as text, 10 before 2."""
    given = list(names)
    if given != sorted(given):
        return given
    return sorted(
        given, key=lambda name: [(not one.isdigit(), int(one) if one.isdigit() else one) for one in name.split(".")]
    )


def _short(value: float) -> str:
    return f"{value:.2g}".replace("-", "\N{MINUS SIGN}")


def _span(sizes: Sequence[int]) -> str:
    low, high = min(sizes, default=0), max(sizes, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _reach(rates: Sequence[Rate]) -> list[list[float]]:
    """Give how far intervals reach below and above their values."""
    below, above = ([rate.value - rate.low for rate in rates], [rate.high - rate.value for rate in rates])
    return [[max(0.0, one) for one in side] for side in (below, above)]  # rounding may leave -1e-17


# --- what reports hold ---


def _pooled(rates: Iterable[Mapping[str, Any] | None]) -> Rate | None:
    held = [rate for rate in rates if rate]
    if not held:
        return None
    return Rate.of(sum(rate["count"] for rate in held), sum(rate["num_samples"] for rate in held))


def _pooled_curve(curves: Iterable[Mapping[str, Any] | None]) -> dict[int, Rate]:
    held = [curve for curve in curves if curve]
    counts = sorted({int(count) for curve in held for count in curve})
    return {count: _pooled(curve.get(str(count)) for curve in held) for count in counts}


def _by_defect(report: DefectReport, defect: str | None) -> dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]]:
    """Give the records of each student by task and defect."""
    panels: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for record in report.records:
        if defect in (None, record["defect"]):
            panel = panels.setdefault((record.get("task") or "", record["defect"]), {})
            panel.setdefault(record["student"], []).append(record)
    if not panels:
        known = sorted({record["defect"] for record in report.records})
        raise ValueError(f"defect is one that the report measured, {known}, but got {defect!r}.")
    return panels


def _points(students: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, tuple[Rate, Rate]]:
    """Give accuracy and DIR of the students that have both, seeds pooled."""
    pooled = {
        name: tuple(_pooled(record[key] for record in records) for key in ("acc", "dir"))
        for name, records in students.items()
    }
    return {name: (acc, dir_) for name, (acc, dir_) in pooled.items() if acc and dir_ and dir_.value is not None}


def _kind(record: Mapping[str, Any]) -> str:
    """Name what students of different slice ratios have in common."""
    return (record.get("made") or {}).get("rule") or record["student"]


def _ratio(record: Mapping[str, Any]) -> float:
    return (record.get("made") or {}).get("slice_ratio", 1.0)


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give the points, by ascending DIR, that have more accuracy than all of a lower or equal DIR."""
    front: list[tuple[float, float]] = []
    for dir_, acc in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or acc > front[-1][1]:
            front.append((dir_, acc))
    return front


def _curve(
    history: Sequence[Mapping[str, Any]], value_of: Callable[[Mapping[str, Any]], float | None]
) -> list[tuple[int, float]]:
    found = [(entry["step"], value_of(entry)) for entry in history if "step" in entry]
    return [(step, float(value)) for step, value in found if value is not None]


def _measured(entry: Mapping[str, Any], metric: str) -> float | None:
    evaluation = entry.get("evaluation") or {}
    return evaluation.get(metric, evaluation.get(f"eval_{metric}", entry.get(f"eval_{metric}")))


def _thinned(curve: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    if not curve:
        return np.empty(0), np.empty(0)
    parts = np.array_split(np.array(curve, dtype=np.float64), min(_POINTS, len(curve)))
    steps, values = np.array([part.mean(0) for part in parts]).T
    return steps, values


# --- weights ---


def _body_names(teacher: Weights, relevant: RelevantSlice | None, head: tuple[str, ...] | None) -> list[str]:
    if relevant is not None:
        return list(relevant.kept)
    if not isinstance(teacher, nn.Module):
        raise ValueError(
            "Which weights of a state dict are the body's is said by a slice: pass relevant=, or the teacher as a "
            "module."
        )
    return [layer.parameter_name for layer in adapter_for(teacher, head).layers().values()]


def _weights_of(
    model: Weights, names: Sequence[str], relevant: RelevantSlice | None, *, is_teacher: bool = False
) -> dict[str, Tensor]:
    """Give weights by name, detached, of a module or a state dict."""
    is_module = isinstance(model, nn.Module)
    if is_module:
        if relevant is not None and is_teacher:
            relevant.check_matches(adapter_for(model, ()).layers(embeddings=True))
        model = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in model:
            raise LayerMismatchError(f"'{name}' is wanted, but the model has no such weight. Is it of another kind?")
        if relevant is not None and model[name].shape != relevant.kept.shapes[name]:
            raise LayerMismatchError(
                f"The slice holds '{name}' of shape {tuple(relevant.kept.shapes[name])}, but the model's has "
                f"{tuple(model[name].shape)}."
            )
    # A module knows in which order its layers were made.
    wanted = set(names)
    ordered = [name for name in model if name in wanted] if is_module else names
    return {name: model[name].detach() for name in ordered}


def _check_same_shape(name: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise LayerMismatchError(
            f"'{name}' has shape {tuple(one.shape)} in the teacher and {tuple(other.shape)} in the student."
        )


class _Distribution:
    """Histogram and exact quantiles of float32 values that are read twice, part by part, and never held together.

    The bits of a float32, read as a whole number, order as the values do. The first pass counts by their upper half,
    which tells the upper half of each quantile; the second counts the lower half of those, and the bars.
    """

    def __init__(
        self, parts: Callable[[], Iterable[tuple[str, Tensor]]], groups: Sequence[str], num_bars: int = 101
    ) -> None:
        upper = {group: torch.zeros(1 << 16, dtype=torch.int64) for group in groups}
        self.unchanged = dict.fromkeys(groups, 0)
        for group, values in parts():
            upper[group] += torch.bincount(_ordered_bits(values) >> 16, minlength=1 << 16)
            self.unchanged[group] += int((values == 0).sum())
        self.num_weights = {group: int(counts.sum()) for group, counts in upper.items()}
        places = {
            group: {level: _place_in(upper[group], int(level * (number - 1))) for level in QUANTILES if number}
            for group, number in self.num_weights.items()
        }
        lower = {
            group: {half: torch.zeros(1 << 16, dtype=torch.int64) for half, _ in of.values()}
            for group, of in places.items()
        }
        reach = {group: _reach_of_bars(of) for group, of in places.items()}
        # An odd number of bars has one for what did not move.
        self.edges = {group: np.linspace(-far, far, num_bars + 1) for group, far in reach.items()}
        self.histogram = {group: np.zeros(num_bars, dtype=np.int64) for group in groups}
        for group, values in parts():
            self.histogram[group] += np.histogram(values.double().numpy(), num_bars, (-reach[group], reach[group]))[0]
            bits = _ordered_bits(values)
            for half, counts in lower[group].items():
                counts += torch.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=1 << 16)
        self.quantiles = {
            group: {
                f"{level:g}": _value_of((half << 16) + _place_in(lower[group][half], rest)[0])
                for level, (half, rest) in of.items()
            }
            for group, of in places.items()
        }


def _reach_of_bars(places: Mapping[float, tuple[int, int]]) -> float:
    """Give twice what holds 98 % of the values: a few far ones would leave the others in one bar."""

    def furthest(*levels: float) -> float:
        found = max(abs(_value_of((places[level][0] << 16) + 0x8000)) for level in levels) if places else 0.0
        return found if found > 1e-30 else 0.0  # 0 has more neighbours than its upper half tells

    return 2 * furthest(0.01, 0.99) or furthest(0.0, 1.0) or 1.0


def _ordered_bits(values: Tensor) -> Tensor:
    """Give whole numbers from 0 to 2^32 - 1 in the order of float32 values. Shape as given."""
    bits = (values + 0.0).contiguous().view(torch.int32)  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) + (1 << 31)


def _value_of(bits: int) -> float:
    signed = torch.tensor(bits - (1 << 31), dtype=torch.int32)
    return float((signed ^ 0x7FFFFFFF if signed < 0 else signed).view(torch.float32))


def _place_in(counts: Tensor, place: int) -> tuple[int, int]:
    """Give the bin that holds the place-th value, counted from 0, and its place among those of the bin."""
    summed = counts.cumsum(0)
    found = int(torch.searchsorted(summed, place, right=True))
    return found, place - int(summed[found - 1] if found else 0)
