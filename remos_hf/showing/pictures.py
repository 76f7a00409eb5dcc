"""What was measured, as PNG files: 1280 pixels wide, with letters that still read at 390.

Every picture says on how many samples, weights or steps it stands. Nothing here keeps state between calls: no pyplot.
"""

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from remos_hf.adapters.images import check_pixels
from remos_hf.evaluation.anatomy import (
    FREQUENCY_BINS,
    POINTS,
    Weights,
    body_names,
    change_of_weights,
    coverage_of,
    curves_of,
    in_order,
    layers_of,
    slice_facts,
    weights_of,
)
from remos_hf.judging.words import span_told
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.showing.canvas import (
    GREY,
    PERCENT,
    WIDTH,
    layers_figure,
    new_figure,
    short_number,
    styled,
    written,
)
from remos_hf.showing.maps import resized_mass, share_in_trigger
from remos_hf.showing.palette import PALETTE, Look, looks_of
from remos_hf.slicing.relevant_slice import RelevantSlice

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator
except ImportError as error:
    raise ImportError("Pictures need matplotlib: pip install 'remos_hf[plots]'.") from error


_DASHES = ("-", "--", ":", "-.")


_NONE = 0.5  # where a log axis draws no weight at all


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
    return written(path, _overlay_figure(images, maps, titles, mask), photographs=True)


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
    names = body_names(teacher, relevant, head)
    # The slice is made of the teacher, so only there can its hash be compared.
    before = weights_of(teacher, names, relevant, is_teacher=True)
    change = change_of_weights(before, weights_of(student, list(before), relevant), relevant)
    told = ("num_weights", "share_unchanged", "quantiles")
    numbers = {group: {key: found[key] for key in told} for group, found in change.items()}
    return written(path, _changes_figure(change)), numbers


def reset_magnitudes(teacher: Weights, relevant: RelevantSlice, path: str | os.PathLike) -> Path:
    """Draw the magnitudes of the reset weights beside those of the kept ones, layer by layer: median and quartiles.

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
    before = weights_of(teacher, in_order(relevant.kept), relevant, is_teacher=True)
    return written(path, _magnitudes_figure(layers_of(before, relevant)))


def share_kept(relevant: RelevantSlice, path: str | os.PathLike) -> Path:
    """Draw the share of weights that the slice keeps, layer by layer.

    Args:
        relevant: The slice.
        path: The PNG file.

    Returns:
        The file written.
    """
    return written(path, _share_kept_figure(layers_of(None, relevant), slice_facts(relevant)))


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
    return written(path, _coverage_figure(coverage_of(profile)))


def convergence(
    histories: Mapping[str, Sequence[Mapping[str, Any]] | Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    metric: str = "accuracy",
    looks: Mapping[str, Look] | None = None,
) -> Path:
    """Draw the training loss and, where it was measured, a share on held-out data, against steps; one line a student.

    Args:
        histories: By student: `trainer.state.log_history`, or `fit(...).history`. Entries with "step" and "loss" make
            the loss; those with "eval_<metric>", or with "evaluation" that holds the metric, make the other curve. Or
            the "history" of an `anatomy`.
        path: The PNG file.
        metric: A share in [0, 1].
        looks: Colour and marker by student (`remos_hf.showing.palette`); those of its name where there is none. Of
            students that look the same, the lines are dashed in different ways.

    Returns:
        The file written. Of curves with more than 200 losses, neighbours are averaged.

    Raises:
        NonFiniteError: A value is NaN or infinite.
        ValueError: A history holds nothing that can be drawn.
    """
    curves = {name: one if isinstance(one, Mapping) else curves_of(one) for name, one in histories.items()}
    return written(path, _convergence_figure(curves, metric, looks or {}))


def anatomy_pictures(anatomy: Mapping[str, Any], stem: str | os.PathLike) -> dict[str, Path]:
    """Draw what an `anatomy` summarises of one student, from its numbers alone.

    Args:
        anatomy: The summary.
        stem: Path and beginning of the file names, to which "_share_kept.png" and the like is added.

    Returns:
        The files written, by "share_kept", "reset_magnitudes", "weight_changes" and "coverage_frequencies"; without
        those that the summary does not hold: a student without a slice has no share kept.
    """
    figures = {"weight_changes": lambda: _changes_figure(anatomy["change"])}
    if anatomy["slice"] is not None:
        figures["share_kept"] = lambda: _share_kept_figure(anatomy["layers"], anatomy["slice"])
        figures["reset_magnitudes"] = lambda: _magnitudes_figure(anatomy["layers"])
    if anatomy["coverage"] is not None:
        figures["coverage_frequencies"] = lambda: _coverage_figure(anatomy["coverage"])
    order = ("share_kept", "reset_magnitudes", "weight_changes", "coverage_frequencies")
    return {kind: written(f"{os.fspath(stem)}_{kind}.png", figures[kind]()) for kind in order if kind in figures}


# --- figures: tests look at these ---


@styled
def _overlay_figure(images: Tensor, maps: Tensor, titles: Sequence[str] | None, mask: Tensor | None) -> Figure:
    _check_overlay(images, maps, titles, mask)
    count, height, width = len(images), *images.shape[2:]
    mass = resized_mass(maps.detach().cpu(), height, width)
    shares = None if mask is None else share_in_trigger(maps.detach().cpu(), mask.cpu()).tolist()
    masks = None if mask is None else mask.cpu().expand(count, height, width)
    columns = min(3, count)
    rows = math.ceil(count / columns)
    cell = WIDTH / columns
    letters = int(62 / columns)
    above = max((len(textwrap.wrap(title, letters)) for title in titles or ()), default=0)
    tall = cell * height / width + 0.2 * above + (0.2 * (1 + (columns > 2)) if shares else 0)
    # A single image would be as wide as the picture, and twice as high if it is upright.
    figure = new_figure(
        f"Where the model looks (n = {count} image{'s' * (count > 1)})", rows * min(tall, 1.5 * WIDTH) + 1.2
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


@styled
def _changes_figure(change: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = new_figure("Change of the body's weights by fine-tuning", 2.9 * len(change) + 0.8)
    grid = figure.subplots(len(change), 1, squeeze=False).ravel()
    for axes, (group, found), colour in zip(grid, change.items(), PALETTE, strict=False):
        heights = np.maximum(found["histogram"], _NONE)
        edges = np.linspace(-found["reach"], found["reach"], len(heights) + 1)
        axes.stairs(heights, edges, color=colour, alpha=0.25, fill=True, baseline=_NONE)
        axes.stairs(heights, edges, color=colour, baseline=_NONE)
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=_NONE)
        axes.set_ylabel("weights (log scale)")
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(_told_changes(group, found))
    grid[-1].set_xlabel("student − teacher (difference of a weight's values)")
    return figure


@styled
def _magnitudes_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    num_weights = sum(layer["num_weights"] for layer in layers)
    num_reset = num_weights - sum(layer["num_kept"] for layer in layers)
    figure, axes = layers_figure("Magnitude of the reset weights by layer", [layer["name"] for layer in layers])
    axes.set_title(f"n = {num_reset:,} reset of {num_weights:,} weights")
    kinds = {"kept": (GREY, -0.18, "o"), "reset": (PALETTE[1], 0.18, "D")}
    for row, layer in enumerate(layers):
        for group, (colour, place, marker) in kinds.items():
            if layer["magnitude"][group]["num_weights"]:
                low, middle, high = layer["magnitude"][group]["quantiles"]
                axes.plot([low, high], [row + place] * 2, color=colour, linewidth=2.4, solid_capstyle="butt")
                axes.plot(middle, row + place, color=colour, marker=marker, markersize=4)
    for group, (colour, _, marker) in kinds.items():
        axes.plot([], [], color=colour, marker=marker, label=f"{group} weights: median, quartiles")
    axes.set_xlim(left=0)
    axes.set_xlabel("magnitude of the teacher's weight, |w|")
    figure.legend(loc="outside lower left")
    return figure


@styled
def _share_kept_figure(layers: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Figure:
    figure, axes = layers_figure("Share of weights kept by layer", [layer["name"] for layer in layers])
    axes.set_title(f"n = {facts['num_weights']:,} weights\nrule {facts['rule']}, {facts['scope']} scope")
    shares = [layer["num_kept"] / layer["num_weights"] for layer in layers]
    axes.barh(range(len(shares)), shares, height=0.7, color=PALETTE[0])
    overall = facts["num_kept"] / facts["num_weights"]
    axes.axvline(overall, color=PALETTE[1], linestyle="--", label=f"all layers: {100 * overall:.1f} %")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("weights kept (%)")
    figure.legend(loc="outside lower left")
    return figure


@styled
def _coverage_figure(coverage: Mapping[str, Any]) -> Figure:
    figure = new_figure("How often neurons are covered", 4.7)
    axes = figure.subplots()
    criterion = " ".join(str(value) for value in coverage["criterion"].values())
    told = f"n = {coverage['num_samples']:,} samples, {len(coverage['layers'])} layers"
    axes.set_title(textwrap.fill(told + (f"; {criterion}" if criterion else ""), 62))
    edges = np.linspace(0, 1, FREQUENCY_BINS + 1)
    for (kind, line), colour in zip({"input": "-", "output": "--"}.items(), PALETTE, strict=False):
        counted = [layer[kind] for layer in coverage["layers"]]
        neurons, never = (sum(one[key] for one in counted) for key in ("num_neurons", "num_never"))
        heights = np.sum([one["histogram"] for one in counted], axis=0)
        share = f", never covered {100 * never / neurons:.1f} %" if neurons else ""
        label = f"{kind} neurons: n = {neurons:,}{share}"
        axes.stairs(heights, edges, color=colour, linestyle=line, linewidth=1.8, label=label)
    axes.set_xlim(-0.01, 1.01)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("coverage frequency (% of samples that cover the neuron)")
    axes.set_ylabel("neurons (log scale)")
    figure.legend(loc="outside lower left")
    return figure


@styled
def _convergence_figure(
    students: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str, looks: Mapping[str, Look]
) -> Figure:
    empty = [name for name, curves in students.items() if not {"loss", f"eval_{metric}"} & set(curves)]
    if empty or not students:
        raise ValueError(
            f"A history holds entries with 'step' and 'loss' or 'eval_{metric}', but that of {empty[0]!r} holds none."
            if empty
            else "There is no history to draw."
        )
    losses, shares = (
        {name: curves[key] for name, curves in students.items() if key in curves} for key in ("loss", f"eval_{metric}")
    )
    panels = [(losses, "training loss")] if losses else []
    panels += [(shares, f"held-out {metric} (%)")] if shares else []
    lengths = sorted(curves.get("loss", {"num_logged": 0})["num_logged"] for curves in students.values())
    figure = new_figure("Convergence", 2.9 * len(panels) + 0.8 + 0.12 * len(students))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False).ravel()
    drawn_as = _lines_of(students, looks)
    for axes, (curves, title) in zip(grid, panels, strict=True):
        for name, options in drawn_as.items():
            curve = curves.get(name, {"steps": [], "values": []})
            some = max(1, len(curve["steps"]) // 12)
            label = name if axes is grid[0] else None
            axes.plot(curve["steps"], curve["values"], markersize=5, markevery=some, label=label, **options)
        axes.set_ylabel(title)
        if curves is shares:
            axes.yaxis.set_major_formatter(PERCENT)
    grid[-1].set_xlabel("optimizer steps")
    told = f"n = {len(students)} student{'s' * (len(students) > 1)}, {span_told(lengths)} logged losses each"
    grid[0].set_title(f"{told}\n(points are means of neighbouring ones)" if lengths[-1] > POINTS else told)
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _lines_of(students: Iterable[str], looks: Mapping[str, Look]) -> dict[str, dict[str, str]]:
    """Give the options of each student's line."""
    looks = {**looks_of({name: name for name in students if name not in looks}), **looks}
    told: dict[tuple[str, str], int] = {}
    lines = {}
    for name in students:
        pair = looks[name].colour, looks[name].marker
        alike = told[pair] = told.get(pair, -1) + 1
        lines[name] = {"color": pair[0], "marker": pair[1], "linestyle": _DASHES[alike % len(_DASHES)]}
    return lines


def _told_changes(group: str, found: Mapping[str, Any]) -> str:
    number, values = found["num_weights"], found["quantiles"]
    if not number:
        return f"{group} weights: n = 0"
    beyond = number - sum(found["histogram"])
    furthest = max(values["0"], values["1"], key=abs)
    told = f"{group} weights: n = {number:,}, 98 % in [{short_number(values['0.01'])}, {short_number(values['0.99'])}]"
    return f"{told}\nnot drawn: {beyond:,} further out, up to {short_number(furthest)}" if beyond else told


# --- what figures are made of ---


def _outline(axes: Axes, mask: np.ndarray) -> None:
    padded = np.pad(mask, 1).astype(float)
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    for colour, width in (("white", 3.0), ("black", 1.2)):
        axes.contour(columns, rows, padded, levels=[0.5], colors=colour, linewidths=width)
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)


# --- what reports hold ---
