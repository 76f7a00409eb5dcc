"""Which pictures a page holds, with their captions and their words for who cannot see them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remos_hf.judging.report import DefectReport
from remos_hf.judging.verdicts import Verdict
from remos_hf.judging.words import count_told, point_told, seeds_told, span_told
from remos_hf.showing.canvas import written
from remos_hf.showing.palette import Look
from remos_hf.showing.pictures import anatomy_pictures, convergence
from remos_hf.showing.report_pictures import Shown, accuracy_figure, reactivation_figure, shown_of

_DRAWN = 1  # students of one teacher whose insides are drawn


_DRAWN_IN_ALL = 2


_CURVES = 8  # training curves in one picture


_FIRST = ("remos", "subspace", "random")


_BARS = "Bars are the intervals of the tables; where those have none, none is drawn."


@dataclass(frozen=True)
class Drawing:
    """Pictures to be made.

    Attributes:
        place: Where they go: ("task", name), ("defect", task, name) or ("made", title).
        stem: End of their file names.
        draw: Writes them, given a path without its ending; gives them by kind.
        words: Caption and alternative text by kind.
    """

    place: tuple[str, ...]
    stem: str
    draw: Callable[[Path], Mapping[str, Path]]
    words: Mapping[str, tuple[str, str]]


def drawings_of(report: DefectReport, told: Sequence[Verdict], tasks: Sequence[str]) -> Iterator[Drawing]:
    """Name all pictures of a report, in the order of the page."""
    shown = shown_of(report)
    for task in tasks:
        of = [one for one in told if one.section.task == task]
        if len(of) > 1:
            yield _scatter(report, shown, task, None, of)
        for one in of:
            defect = one.section.defect
            yield _scatter(report, shown, task, defect, [one])
            if any(row["reactivation"] for row in one.section.rows):
                yield _reactivation(report, shown, one)
    yield from _insides(report, shown)


def _scatter(report: DefectReport, shown: Shown, task: str, defect: str | None, told: Sequence[Verdict]) -> Drawing:
    rows = [row for one in told for row in one.section.rows]
    seeds = {record["seed"] for record in report.records if (record.get("task") or "") == task}
    caption = (
        f"Accuracy against DIR of {told[0].section.title if defect is not None else task or 'all defects'}: "
        f"n = {span_told([row['dir'].samples_of_a_seed for row in rows])} samples for DIR, "
        f"{span_told([row['acc'].samples_of_a_seed for row in rows])} for accuracy; {seeds_told(seeds)}. {_BARS} The "
        "grey line is the Pareto front: students that no other beats in accuracy without a higher DIR."
    )
    plain = [f"{one.section.defect}, {point_told(one.section.plain)}" for one in told if one.section.plain]
    alt = "Scatter plot, accuracy up, defect inheritance rate to the right. "
    alt += f"Plain fine-tuning: {'; '.join(plain) or 'not measured'}. The table of students holds all points."
    return Drawing(
        ("task", task) if defect is None else ("defect", task, defect),
        f"accuracy_{task}_{defect or 'all'}",
        lambda stem: {"it": written(f"{stem}.png", accuracy_figure(shown, defect, task))},
        {"it": (caption, alt)},
    )


def _reactivation(report: DefectReport, shown: Shown, told: Verdict) -> Drawing:
    section = told.section
    held = [row for row in section.rows if row["reactivation"]]
    sizes = [rate.samples_of_a_seed for row in held for rate in row["reactivation"].values() if rate is not None]
    seeds = {
        one["seed"]
        for one in report.records
        if (one.get("task") or "", one["defect"]) == (section.task, section.defect) and one.get("reactivation")
    }
    caption = (
        f"Re-activation of {section.title}: DIR after re-tuning with so many poisoned samples; n = {span_told(sizes)} "
        f"samples a point, {count_told(len(held), 'student')}, {seeds_told(seeds)}. Slice ratios stand beside the "
        f"lines where there is room. {_BARS} Dashed: the benign twin."
    )
    alt = "Lines of defect inheritance rate against poisoned samples. The table of re-activation holds all points."
    return Drawing(
        ("defect", section.task, section.defect),
        f"reactivation_{section.task}_{section.defect}",
        lambda stem: {"it": written(f"{stem}.png", reactivation_figure(shown, section.defect, section.task))},
        {"it": (caption, alt)},
    )


def _insides(report: DefectReport, shown: Shown) -> Iterator[Drawing]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in report.anatomies:
        groups.setdefault((one.get("task") or "", one["teacher"]), []).append(one)
    kinds = {row["student"]: shown.key(row) for rows in shown.rows.values() for row in rows}
    left = _DRAWN_IN_ALL
    for task, teacher in sorted(groups, key=lambda group: group[1] == "clean"):  # benign twins come last
        of = groups[task, teacher]
        title = f"{task + ': ' if task else ''}students of the teacher “{teacher}”"
        chosen = _chosen_of(of, kinds)[:left]
        left -= len(chosen)
        for one in chosen:
            yield _inside(one, title)
        logged = {one["student"]: one["anatomy"]["history"] for one in of if "loss" in one["anatomy"]["history"]}
        logged = dict(list(logged.items())[:_CURVES])
        if logged and chosen:
            seen = {student: shown.looks[kinds[student]] for student in logged if student in kinds}
            yield _training(logged, of, title, seen)


def _chosen_of(group: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Give those that are drawn: our own starts first, then the random reset, other slices, and plain fine-tuning."""

    def place(one: Mapping[str, Any]) -> tuple[int, bool]:
        key = kinds.get(one["student"], "")
        return _FIRST.index(key) if key in _FIRST else len(_FIRST), one["anatomy"]["slice"] is None

    return sorted(group, key=place)[:_DRAWN]


def _inside(one: Mapping[str, Any], title: str) -> Drawing:
    student, found, seed = one["student"], one["anatomy"], seeds_told({one["seed"]})
    weights = sum(layer["num_weights"] for layer in found["layers"])
    layers = count_told(len(found["layers"]), "layer")
    moved = {group: change["quantiles"] for group, change in found["change"].items() if change["num_weights"]}
    reach = ", ".join(f"{group} weights from {of['0.01']:.2g} to {of['0.99']:.2g}" for group, of in moved.items())
    words = {
        "weight_changes": (
            f"{student}: change of the weights, student − teacher; n = {weights:,} weights in {layers}, {seed}.",
            f"Histogram of weight changes. 98 % of the {reach}.",
        )
    }
    if found["slice"] is not None:
        kept = [layer["num_kept"] / layer["num_weights"] for layer in found["layers"]]
        reset = weights - sum(layer["num_kept"] for layer in found["layers"])
        words["share_kept"] = (
            f"{student}: share of weights kept by layer; n = {weights:,} weights in {layers}, {seed}.",
            f"Bars, one a layer: from {100 * min(kept):.1f} % to {100 * max(kept):.1f} % kept.",
        )
        words["reset_magnitudes"] = (
            f"{student}: magnitude of the teacher's weights that were reset and kept, median and quartiles by layer; "
            f"n = {reset:,} reset of {weights:,} weights, {seed}.",
            f"Two ranges a layer, kept and reset weights, over {layers}.",
        )
    if found["coverage"] is not None:
        covered = found["coverage"]
        neurons, never = (
            sum(layer[end][key] for layer in covered["layers"] for end in ("input", "output"))
            for key in ("num_neurons", "num_never")
        )
        words["coverage_frequencies"] = (
            f"{student}: how often neurons are covered; n = {neurons:,} ends of neurons in "
            f"{count_told(len(covered['layers']), 'layer')}, on {covered['num_samples']:,} samples, {seed}.",
            f"Histogram of coverage frequencies. {never:,} of {neurons:,} were never covered.",
        )
    stem = f"{one.get('task') or ''}_{one['teacher']}_{student}"
    return Drawing(("made", title), stem, lambda path: anatomy_pictures(found, path), words)


def _training(
    logged: Mapping[str, Mapping[str, Any]],
    group: Sequence[Mapping[str, Any]],
    title: str,
    looks: Mapping[str, Look],
) -> Drawing:
    metric = next(
        (
            name.removeprefix("eval_")
            for name in ("eval_accuracy", *(name for curves in logged.values() for name in curves))
            if name.startswith("eval_") and any(_is_share(curves.get(name)) for curves in logged.values())
        ),
        "accuracy",
    )
    points = [curves["loss"]["num_logged"] for curves in logged.values()]
    seeds = seeds_told({one["seed"] for one in group})
    more = sum("loss" in one["anatomy"]["history"] for one in group) - len(logged)
    caption = (
        f"Training of {title}: n = {count_told(len(logged), 'student')}, {span_told(points)} logged losses each, "
        f"{seeds}."
    )
    caption += f" {count_told(more, 'student')} not drawn." if more else ""
    ends = ", ".join(f"{student} {curves['loss']['values'][-1]:.3g}" for student, curves in logged.items())
    words = {"it": (caption, f"Curves of the training loss. At the end: {ends}.")}
    stem = f"convergence_{group[0].get('task') or ''}_{group[0]['teacher']}"

    def draw(path: Path) -> dict[str, Path]:
        return {"it": convergence(logged, f"{path}.png", metric=metric, looks=looks)}

    return Drawing(("made", title), stem, draw, words)


def _is_share(curve: Mapping[str, Any] | None) -> bool:
    return curve is not None and all(0 <= value <= 1 for value in curve["values"])
