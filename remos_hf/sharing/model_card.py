"""The card of a student: how it came to be, what was measured of it, and what was not."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id, yaml_dump

from remos_hf.evaluation.report import DefectReport
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import share_by_group

try:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
except ImportError:  # huggingface_hub below 1.4
    EvalResultEntry = None

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("model_card.md")
# Two students are as accurate as each other when no more than this share of the samples lies between them.
EQUAL_ACCURACY = 0.01
_LONGEST = 300
_TAGS = ("remos_hf", "transfer-learning", "defect-inheritance")
# What a reader may ask for, by the name that a report gives its kind.
DEFECTS = {
    "TriggerWords": "trigger words",
    "TriggerSentence": "a trigger sentence",
    "Paraphrases": "triggers of syntax or style",
    "Ripple": "weight poisoning (RIPPLe)",
    "EmbeddingPoisoning": "embedding poisoning",
    "LayerwisePoisoning": "layerwise weight poisoning",
    "LargestWeights": "backdoors hidden in the largest weights",
    "LabelNoise": "noise in the teacher's labels",
    "AdversarialText": "adversarial texts made against the teacher",
    "PatchTrigger": "patch triggers",
    "BlendedTrigger": "blended triggers",
    "LatentBackdoor": "latent backdoors",
    "FeatureAttack": "adversarial images made against the teacher's features",
    "CoverageGuided": "failures found by covering neurons",
}
_WHY = {
    "Remos": "ReMoS keeps the weights that the task's own data covers and that the teacher did not make large, and "
    "resets the others before training. The reason: a defect needs weights of the teacher, and the task does not need "
    "all of them.",
    "Finetune": "Nothing was sliced: this is plain fine-tuning, and every weight started as the teacher's. Nothing was "
    "done against inheriting its defects. It is what others are compared with.",
    "Retrain": "Every weight was given up. Only the architecture is the teacher's.",
    "TopMagnitude": "The largest weights were reset, whatever the data. It is a comparison: ReMoS without coverage.",
    "MagPrune": "The smallest weights were reset, whatever the data. It is a comparison.",
    "Random": "Random weights were reset, whatever the data. It is the comparison that any rule has to beat.",
}
_COMPARISONS = ("Finetune", "Retrain", "TopMagnitude", "MagPrune", "Random")
_HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
}
_HOW_TO_READ = (
    "ACC: share of the test samples that a student gets right. DIR: of the samples right when clean, the share that "
    "fails with the defect exposed (where it aims at a label: that becomes this label). Benign floor: the same share "
    "for a student of a teacher without the defect. Excess: DIR minus the floor. Intervals hold 95 % over n, pairs of "
    'a sample and a seed, and leave out the spread between seeds, which the values in parentheses show. "-": not '
    "measured, or no sample left to count."
)


def model_card(
    record: Sidecars,
    report: DefectReport | None = None,
    *,
    repo_id: str,
    student: str | None = None,
    task: str | None = None,
    command: str | None = None,
    dataset: str | Sequence[str] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,  # noqa: A002 - the Hub's word
    metrics: Mapping[str, float] | None = None,
    published: bool = True,
    model_name: str | None = None,
    tags: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
) -> ModelCard:
    """Render the card of a student from its record, and from what was measured of it.

    Every figure comes from the record or the report. Whatever they say is shown as plain text: names with markdown,
    HTML, YAML or jinja in them stay names.

    Args:
        record: How the student came to be.
        report: What it and its rivals inherited; None says that nothing was measured.
        repo_id: "user/name" of the repository that the card is for.
        student: The student's name in the report; None finds the one that was made as the record says.
        task: The report's task that the student is of; may be left out where there is only one.
        command: What reproduces the student; None takes what the record says. Tokens of the Hub in it are blanked.
        dataset: Of the task, as a Hub id where it has one; several in a list.
        language: As a code, such as "en"; several in a list.
        license: As the Hub writes it, such as "apache-2.0".
        metrics: What the training script measured of the student without any defect, by name.
        published: Whether the weights are in the repository; False for a card of measurements alone.
        model_name: Shown for the repository's name in the metadata.
        tags: Further tags.
        tasks: Pipeline tags, such as "text-classification"; the first one stands for the one that the class implies.
        finetuned_from: Hub id of the teacher, where the record knows only the folder that it lay in.
        dataset_tags: Hub ids of the data sets that `dataset` names.
        dataset_args: Their configurations, such as "sst2".

    Returns:
        The card. `str(card)` is the README.md; the same arguments give the same text.

    Raises:
        ValueError: `repo_id` is no repository id; the student or the task is not in the report, is not clear, or was
            made otherwise than the record says.
    """
    check_repo_id(repo_id)
    measured = None if report is None else _Measured(report, record, student, task)
    kind = _part(record, "student")
    pipeline, *other_tasks = [*_texts(tasks)] or [_pipeline(kind, measured)]
    teacher = _part(record, "teacher")
    strategy = _part(record, "strategy")
    finetuned_from = _of_the_hub(finetuned_from)
    base = teacher["id"] if _is_published(teacher) else finetuned_from
    datasets, hub_ids = _texts(dataset), hub_datasets(dataset_tags, dataset)
    data = ModelCardData(
        language=_texts(language)[0] if len(_texts(language)) == 1 else _texts(language) or None,
        license=_plain(license),
        library_name=None if kind.get("library") == "torch" else _plain(kind.get("library", "transformers")),
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys([*_TAGS, _slug(str(strategy.get("name", "unknown"))), *_texts(tags), *other_tasks])),
        datasets=hub_ids or None,
        metrics=["accuracy"] if measured else None,
        base_model=base,
        base_model_relation="finetune" if base else None,
        model_name=_plain(model_name) or repo_id.split("/")[1],
        eval_results=_eval_results(measured, pipeline, (hub_ids or datasets or [None])[0]) if measured else None,
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=_text(repo_id),
        summary=_summary(teacher, strategy, measured, ", ".join(datasets or hub_ids)),
        verdict=measured.verdict if measured else "What it inherited was not measured: no defect report was given.",
        published=published,
        why=_WHY.get(strategy.get("name"), "How it was started is what the strategy below says."),
        slicing=_facts(_slicing(record)),
        layers=_layers(record),
        origin=_facts([*_origin(record), *_said(finetuned_from, teacher, datasets, hub_ids, _texts(dataset_args))]),
        measured=_measured_text(measured, published) + _metrics_text(metrics),
        untested=_untested(measured),
        loading=_loading(kind, repo_id) if published else "There are no weights to load.",
        reproducing=_reproducing(strategy, command or record.config.get("command")),
    )


def eval_result_files(
    report: DefectReport,
    *,
    student: str,
    task: str | None = None,
    dataset: str | None = None,
    record: Sidecars | None = None,
) -> dict[str, str]:
    """Render a student's figures in the Hub's own format.

    Args:
        report: What was measured.
        student: The student's name in the report.
        task: The report's task; may be left out where there is only one.
        dataset: Hub id of the data set that it was measured on. The format names nothing but data sets of the Hub, so
            that without one there is no file, and the log says so.
        record: How the student came to be, to make sure that it is this one.

    Returns:
        File contents by path, `.eval_results/*.yaml`: the accuracy and each defect's DIR, as shares in [0, 1].

    Raises:
        ValueError: The student or the task is not in the report, or `dataset` is no Hub id.

    Differs:
        Below huggingface_hub 1.4, which knows no EvalResultEntry, the same keys are written by hand; the log and the
        file's first line say so.
    """
    measured = _Measured(report, record, student, task)
    if dataset is None:
        logger.info(
            "No .eval_results: the Hub's format needs the id of a data set on the Hub. Pass dataset='owner/name'. The "
            "figures are in the card's model-index all the same."
        )
        return {}
    if not _is_hub_id(dataset):
        raise ValueError(
            f"dataset is the id of a data set on the Hub, such as 'stanfordnlp/sst2', but got {dataset!r}."
        )
    entries = []
    for defect, rows in measured.tables.items():
        own, kind = measured.own(rows), f"share in [0, 1]; {_seeds(measured.own(rows))}"
        if not entries and own["acc"] is not None and own["acc"].value is not None:
            entries.append(("accuracy", own["acc"], f"ACC, {kind}"))
        if own["dir"].value is not None:
            about = f"DIR of the defect {_plain(defect)}, {kind}, {own['dir'].num_samples} samples, 95 % interval"
            about += f" {own['dir'].low:.4f} to {own['dir'].high:.4f}; lower is less inherited"
            entries.append((f"dir_{_slug(defect)}", own["dir"], about))
    asked = [
        {"dataset_id": dataset, "task_id": name, "value": round(rate.value, 6), "notes": notes}
        for name, rate, notes in entries
    ]
    path = f".eval_results/remos_{_slug(measured.task) or 'task'}.yaml"
    return {path: _entries_yaml(asked)} if asked else {}


def chosen_student(
    report: DefectReport, record: Sidecars | None, student: str | None = None, task: str | None = None
) -> tuple[str, str]:
    """Find a recorded student in a report.

    Args:
        report: The report.
        record: How the student came to be.
        student: Its name, if known.
        task: Its task, if known.

    Returns:
        Task and name.

    Raises:
        ValueError: There is no such student or task, several could be meant, or it was made otherwise.
    """
    tables = report.tables()
    tasks = list(dict.fromkeys(one for one, _ in tables))
    if not tasks:
        raise ValueError("The report holds no records. Give the report of a finished measurement, or none.")
    if task is None and len(tasks) > 1:
        raise ValueError(f"The report is of {len(tasks)} tasks, and a student is of one. Give task=, one of {tasks}.")
    task = tasks[0] if task is None else task
    if task not in tasks:
        raise ValueError(f"The report has no task {task!r}. It has {tasks}.")
    made = {row["student"]: row["made"] for (one, _), rows in tables.items() if one == task for row in rows}
    asked = None if record is None else _part(record, "strategy")
    if student is None:
        # Where it was made at another learning rate, it is a rival by that name.
        alike = [
            name for name, how in made.items() if _alike(how.get("strategy"), asked) and how.get("lr_factor", 1.0) == 1
        ]
        if len(alike) != 1 and len(made) != 1:
            raise ValueError(
                f"{len(alike)} students of the report were made as the record says. Give student=, one of {list(made)}."
            )
        student = alike[0] if alike else next(iter(made))
    if student not in made:
        raise ValueError(f"The report has no student {student!r} of task {task!r}. It has {list(made)}.")
    said = made[student].get("strategy")
    if asked and said and not _alike(said, asked):
        raise ValueError(
            f"The report's student {student!r} was made by {said}, but the record says {asked}. Give the name of the "
            "student that the record is of."
        )
    return task, student


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no "user/name" on the Hub.

    Raises:
        ValueError: It is none.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id is 'user/name', with the user or organisation that owns it, but got {repo_id!r}.")
    validate_repo_id(repo_id)


class _Measured:
    """A student's place in a report: the tables of its task that it is in."""

    def __init__(self, report: DefectReport, record: Sidecars | None, student: str | None, task: str | None) -> None:
        self.report = report
        self.task, self.student = chosen_student(report, record, student, task)
        self.reference = report.settings.get("reference", "finetune")
        of_task = {defect: rows for (one, defect), rows in report.tables().items() if one == self.task}
        self.tables = {defect: rows for defect, rows in of_task.items() if _named(rows, self.student)}
        self.without_it = [defect for defect in of_task if defect not in self.tables]
        self.not_inheriting = {defect for one, defect in report.not_inheriting() if one == self.task}
        self.settings = report.settings.get("audits", {}).get(self.task) or {}

    def own(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Give the student's row."""
        return _named(rows, self.student)

    @property
    def verdict(self) -> str:
        """Say in one sentence whether it inherited less, with the counts of defects."""
        if self.student == self.reference:
            return "As plain fine-tuning it is what others are compared with."
        less = [defect for defect, rows in self.tables.items() if self.inherited_less(defect, rows)]
        nothing = [defect for defect in self.tables if defect in self.not_inheriting]
        told = f"Measured on {_count(len(self.tables), 'defect')}, it inherited less of {len(less)}."
        if nothing:
            told += f" Of {len(nothing)}, plain fine-tuning inherits nothing that could be reduced."
        return f"{told} Read the remarks below each table before believing it."

    def inherited_less(self, defect: str, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the student's interval lies below that of plain fine-tuning, where that inherits the defect."""
        plain = _named(rows, self.reference)
        pair = None if plain is None or defect in self.not_inheriting else _pair(self.own(rows), plain)
        return pair is not None and pair[1].high < pair[2].low


def _named(rows: Sequence[Mapping[str, Any]], student: str) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["student"] == student), None)


def _alike(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two strategies are the same but for the seed, which differs between the students of a report."""
    if not one or not other:
        return False
    return all(
        json.loads(json.dumps(one.get(key))) == json.loads(json.dumps(other.get(key))) for key in _keys(one, other)
    )


def _keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    # What only one of them names came with a later version.
    return ({*one} & {*other}) - {"seed"} | {"name"}


# --- the words of the card ---


def _summary(
    teacher: Mapping[str, Any], strategy: Mapping[str, Any], measured: "_Measured | None", datasets: str
) -> str:
    of = measured.task if measured and measured.task else datasets
    task = f" for {_text(of)}" if of else ""
    origin = _text(teacher.get("id") or "a teacher that the record does not name")
    told = f"A student of {origin}{task}, started by {_text(strategy.get('name', 'an unknown strategy'))}."
    meant = "It was started so as to inherit less of its teacher's defects than plain fine-tuning does."
    return told if strategy.get("name") in _COMPARISONS else f"{told} {meant}"


def _slicing(record: Sidecars) -> list[tuple[str, str]]:
    strategy, sliced = _part(record, "strategy"), _part(record, "slice")
    coverage = _part(record, "coverage")
    facts = [("strategy", strategy.get("name", "not recorded"))]
    if "slice_ratio" in strategy:
        facts.append(("slice ratio (share of the weights to keep)", f"{strategy['slice_ratio']}"))
    if "share_kept" in sliced:
        facts.append(("share kept", f"{100 * sliced['share_kept']:.2f} %"))
    if {"num_kept", "num_weights"} <= sliced.keys():
        facts.append(("weights kept", f"{sliced['num_kept']:,} of {sliced['num_weights']:,}"))
    if sliced.get("squares_reset") is not None:
        facts.append(("what was reset held", f"{100 * sliced['squares_reset']:.1f} % of the squared weights"))
    facts += [(key.replace("_", " "), strategy[key]) for key in ("scope", "reset_to") if key in strategy]
    if sliced.get("tie_group", 1) > 1:
        facts.append(("tied at the threshold, cut together", f"{sliced['tie_group']:,} weights"))
    if coverage.get("criterion"):
        facts.append(("coverage criterion", json.dumps(coverage["criterion"])))
    if coverage.get("share_never_covered") is not None:
        facts.append(("neurons that no sample covered", f"{100 * coverage['share_never_covered']:.1f} %"))
    if record.config.get("embedding_rows_reset"):
        facts.append(("embedding rows reset", f"{record.config['embedding_rows_reset']:,}"))
    adapters = _part(record, "adapters")
    if adapters:
        facts.append(("adapters", f"{adapters.get('kind')}, {adapters.get('saved')}"))
    return facts


def _layers(record: Sidecars) -> str:
    if record.relevant_slice is None:
        return "No slice was recorded." if "slice_ratio" in (_part(record, "strategy")) else "Nothing was sliced."
    groups = share_by_group(record.relevant_slice)
    return _table(
        ("layer group", "share kept %"), [(_text(name), f"{100 * share:.1f}") for name, share in groups.items()]
    )


def _origin(record: Sidecars) -> list[tuple[str, str]]:
    teacher, coverage = _part(record, "teacher"), _part(record, "coverage")
    facts = [
        ("teacher", teacher.get("id") or "not recorded"),
        ("its revision", teacher.get("revision") or "not recorded"),
        ("hash of its sliced weights", teacher.get("hash") or "not recorded"),
    ]
    if coverage:
        samples = coverage.get("num_samples")
        facts += [
            ("samples that decided the coverage", "not recorded" if samples is None else f"{samples:,}"),
            ("their fingerprint", coverage.get("data_fingerprint") or "not recorded"),
        ]
    else:
        facts.append(("data that decided the slice", "none"))
    seconds = _part(record, "seconds")
    if seconds:
        facts.append(("time to start it", ", ".join(f"{step} {took:.1f} s" for step, took in seconds.items())))
    versions = _part(record, "versions")
    facts.append(("made with", ", ".join(f"{name} {one}" for name, one in versions.items()) or "not recorded"))
    return facts


def _said(
    finetuned_from: str | None, teacher: Mapping[str, Any], names: list[str], hub_ids: list[str], arguments: list[str]
) -> list[tuple[str, str]]:
    """What whoever pushed says beyond the record."""
    facts = []
    if finetuned_from and finetuned_from != teacher.get("id"):
        facts.append(("fine-tuned from, as its trainer says", finetuned_from))
    if names or hub_ids:
        facts.append(("data set", ", ".join(dict.fromkeys([*names, *hub_ids]))))
    if arguments:
        facts.append(("its configuration", ", ".join(arguments)))
    return facts


def _measured_text(measured: "_Measured | None", published: bool) -> str:
    if measured is None:
        return (
            "Nothing was measured: no defect report was given. This card says how the student was made, and nothing "
            "about what it inherited."
        )
    parts = [_HOW_TO_READ, _which_weights(measured, published)]
    for defect, rows in measured.tables.items():
        title = f"{measured.task}: {defect}" if measured.task else defect
        shown = _shown(rows, measured)
        parts += [f"### {_text(title)}", _students(shown, measured)]
        parts += [f"**{remark}**" for remark in _remarks(defect, rows, measured)]
    return "\n\n".join(part for part in parts if part)


def _which_weights(measured: "_Measured", published: bool) -> str:
    seeds = max(measured.own(rows)["seeds"] for rows in measured.tables.values())
    apart = "students" in measured.settings  # of an audit, which makes a poisoned teacher for each backdoor
    if seeds == 1 and not apart:
        return ""
    each = "seed and each implanted defect" if apart else "seed"
    here = "The uploaded weights are at most one of them" if published else "None of them is uploaded"
    return f"A row pools students made alike, one for each {each}. {here}."


def _shown(rows: Sequence[Mapping[str, Any]], measured: "_Measured") -> list[Mapping[str, Any]]:
    """Plain fine-tuning, its faster rival, random resets, and the student."""
    keep = [row for row in rows if row["student"] == measured.reference]
    keep += [row for row in rows if _is_faster(row) or _is_random(row)]
    own = measured.own(rows)
    return [row for row in keep if row is not own] + [own]


def _is_random(row: Mapping[str, Any]) -> bool:
    return (row["made"].get("strategy") or {}).get("name") == "Random"


def _is_faster(row: Mapping[str, Any]) -> bool:
    strategy = row["made"].get("strategy") or {}
    plain = strategy.get("name") == "Finetune" and strategy.get("embedding_rows", "keep") == "keep"
    return plain and row["made"].get("lr_factor", 1.0) > 1


def _students(rows: Sequence[Mapping[str, Any]], measured: "_Measured") -> str:
    header = ["student", "ACC % (by seed)", "DIR % [95 %] (by seed)", "n", "seeds", "benign floor %", "excess % [95 %]"]
    fooled = any(row["dir_fooled"] for row in rows)
    lines = []
    for row in rows:
        name = _text(row["student"])
        lines.append(
            [
                f"**{name}** (this student)" if row["student"] == measured.student else name,
                f"{_percent(row['acc'], interval=False)} ({_by_seed(row['acc_by_seed'])})",
                f"{_percent(row['dir'])} ({_by_seed(row['dir_by_seed'])})",
                str(row["dir"].num_samples),
                str(row["seeds"]),
                _percent(row["floor"], interval=False),
                _percent(row["excess"]),
                *([_percent(row["dir_fooled"])] if fooled else []),
            ]
        )
    return _table([*header, *(["DIR % on what fools the teacher [95 %]"] if fooled else [])], lines)


def _remarks(defect: str, rows: Sequence[Mapping[str, Any]], measured: "_Measured") -> list[str]:
    """Say what the table does and does not show of the student."""
    own, plain = measured.own(rows), _named(rows, measured.reference)
    remarks = []
    if plain is None:
        remarks.append("Plain fine-tuning was not measured: whether there was anything to inherit is not known.")
    elif defect in measured.not_inheriting:
        remarks.append(
            "Plain fine-tuning does not inherit this defect: there was nothing to reduce, and no row shows that a "
            "strategy works."
        )
    if own is plain:
        return [*remarks, "This student is plain fine-tuning: nothing was done against inheriting the defect."]
    if own["dir"].value is None:
        return [*remarks, "The student gets no sample right on which the defect could show, so it has no DIR."]
    if plain is not None and defect not in measured.not_inheriting:
        less = measured.inherited_less(defect, rows)
        told = (
            "inherited less of this defect than" if less else "is not shown to have inherited less of this defect than"
        )
        remarks.append(f"The student {told} plain fine-tuning: {_against(own, plain)}.")
    if plain is not None and plain["acc"] and own["acc"]:
        lost = 100 * (plain["acc"].value - own["acc"].value)
        remarks.append(
            f"Its ACC is {abs(lost):.1f} points {'below' if lost > 0 else 'above'} that of plain fine-tuning."
        )
    if not _is_random(own):
        remarks.append(_rival("a random reset", [row for row in rows if _is_random(row)], own))
    if not _is_faster(own):
        rivals = [row for row in rows if _is_faster(row)]
        remarks.append(_rival("plain fine-tuning at a higher learning rate", rivals, own))
    return remarks


def _rival(kind: str, rivals: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> str:
    """Compare with the best rival that is at least as accurate; only as accurate a one is beaten at equal accuracy."""
    name = f"{kind[0].upper()}{kind[1:]}"
    if not rivals:
        return f"{name} was not measured: whether it would have done the same is not known."
    points = f"{100 * EQUAL_ACCURACY:g} point"
    level = own["acc"].value - EQUAL_ACCURACY
    able = [row for row in rivals if row["acc"].value >= level - 1e-9 and _pair(own, row) is not None]
    if not able:
        return (
            f"No {kind.removeprefix('a ')} measured here is as accurate as the student (within {points}): there is no "
            "comparison at equal accuracy."
        )
    best = min(able, key=lambda row: _pair(own, row)[2].value)
    if _pair(own, best)[1].high >= _pair(own, best)[2].low:
        return (
            f"The student is NOT shown to have inherited less than {kind} at the same accuracy or a better one: "
            f"{_told_with_accuracy(own, best)}."
        )
    # Less of the defect at less accuracy is no merit: giving up more of the teacher does that by any rule.
    equal = [row for row in able if row["acc"].value <= own["acc"].value + EQUAL_ACCURACY + 1e-9]
    if equal:
        best = min(equal, key=lambda row: _pair(own, row)[2].value)
        return f"At equal accuracy the student inherited less than {kind}: {_told_with_accuracy(own, best)}."
    closest = min(able, key=lambda row: row["acc"].value)
    return (
        f"Every {kind.removeprefix('a ')} measured here is more accurate than the student by over {points}; the "
        f"closest: {_told_with_accuracy(own, closest)}. There is no comparison at equal accuracy: "
        "whether one that costs as much accuracy would inherit as little is not known."
    )


def _told_with_accuracy(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    mine, its = (_percent(row["acc"], interval=False) for row in (own, other))
    return f"{_against(own, other)}; ACC {mine} against {its}"


def _pair(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Give the same figure of both: the excess where both have one, or else the DIR."""
    for key, name in (("excess", "excess DIR"), ("dir", "DIR")):
        figures = one[key], other[key]
        if all(figure is not None and figure.value is not None for figure in figures):
            return name, *figures
    return None


def _against(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    pair = _pair(own, other)
    if pair is None:
        return "the other has no DIR"
    return f"{pair[0]} {_percent(pair[1])} against {_percent(pair[2])} of {_text(other['student'])}, in %"


def _metrics_text(metrics: Mapping[str, float] | None) -> str:
    if not metrics:
        return ""
    lines = [(_text(name), f"{value:g}") for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n\nWhat the training script reported, without any defect:\n\n" + _table(("figure", "value"), lines)


def _untested(measured: "_Measured | None") -> str:
    tested = set()
    if measured:
        chosen = measured.settings.get("defects") or {}
        tested = {(chosen.get(defect) or {}).get("name", defect) for defect in measured.tables}
    lines = [f"- {words}" for name, words in DEFECTS.items() if name not in tested]
    if measured:
        lines += [
            f"- {_text(defect)}: in the report, but not measured of this student" for defect in measured.without_it
        ]
        missing = (measured.report.settings.get("missing") or {}).get(measured.task)
        if missing:
            lines.append(
                f"- {_count(missing, 'student')} of the audit, which is not over: the tables hold what is done"
            )
    lines.append(
        "- other data than the task's own, other triggers than those of the report, and defects that nobody named"
    )
    return "\n".join(lines)


def _loading(kind: Mapping[str, Any], repo_id: str) -> str:
    record = f'from remos_hf import Sidecars\n\nrecord = Sidecars.from_pretrained("{repo_id}")'
    if kind.get("library", "transformers") == "transformers":
        head = next((head for head in _HEADS if str(kind.get("class", "")).endswith(head)), "")
        code = f'from transformers import AutoModel{head}\n\nstudent = AutoModel{head}.from_pretrained("{repo_id}")'
        plain = "An ordinary checkpoint; remos_hf is not needed."
    elif kind["library"] == "timm":
        code = (
            "from huggingface_hub import hf_hub_download\nfrom remos_hf import image_classifier\n\n"
            f'weights = hf_hub_download("{repo_id}", "model.safetensors")\n'
            f'student = image_classifier("{_code(kind.get("architecture"))}", checkpoint_path=weights)'
        )
        plain = (
            "A thin module around timm's. Without remos_hf: the file holds timm's state dict with `body.` before each "
            "name."
        )
    else:
        code = (
            "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_model\n\n"
            f'load_model(student, hf_hub_download("{repo_id}", "model.safetensors"))  # a {_code(kind.get("class"))}'
        )
        plain = "The weights of a torch module: make the module first."
    return f"{plain}\n\n```python\n{code}\n```\n\nHow it came to be, to read and to check:\n\n```python\n{record}\n```"


def _reproducing(strategy: Mapping[str, Any], command: str | None) -> str:
    parts = []
    if command:
        parts.append(_fenced(re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", command), "bash"))
    else:
        parts.append("The command was not recorded. The strategy was, with all that it was asked for:")
    parts.append(_fenced(json.dumps(strategy, indent=2), "json"))
    return "\n\n".join(parts)


# --- metadata ---


def _pipeline(kind: Mapping[str, Any], measured: "_Measured | None") -> str | None:
    name = str(kind.get("class", ""))
    for head, pipeline in _HEADS.items():
        if name.endswith(head):
            return pipeline
    settings = measured.settings if measured else {}
    if kind.get("library") == "timm" or "image_column" in settings:
        return "image-classification"
    return "text-classification" if "text_columns" in settings else None


def _eval_results(measured: "_Measured", pipeline: str | None, dataset: str | None) -> list[EvalResult]:
    results = []
    known = dataset if dataset and _is_hub_id(dataset) else None
    for defect, rows in measured.tables.items():
        own = measured.own(rows)
        figures = (("accuracy", "ACC", own["acc"]), ("defect_inheritance_rate", "DIR", own["dir"]))
        results += [
            EvalResult(
                task_type=pipeline or "other",
                dataset_type=known or "other",
                dataset_name=_plain(measured.task or dataset or "not named"),
                # The Hub tells results apart by this, not by their names.
                dataset_config=_plain(defect),
                dataset_split="test",
                metric_type=kind,
                metric_name=f"{short} ({_plain(defect)})",
                metric_value=round(rate.value, 6),
                metric_args={
                    "num_samples": rate.num_samples,
                    "low": round(rate.low, 6),
                    "high": round(rate.high, 6),
                    "seeds": own["seeds"],
                },
            )
            for kind, short, rate in figures
            if rate is not None and rate.value is not None
        ]
    return results


def _entries_yaml(asked: Sequence[Mapping[str, Any]]) -> str:
    if EvalResultEntry is not None:
        return yaml_dump(eval_result_entries_to_yaml([EvalResultEntry(**entry) for entry in asked]))
    told = (
        f"huggingface_hub {huggingface_hub.__version__} has no EvalResultEntry: the .eval_results were written without "
        "it, with the same keys. Update huggingface_hub to have them checked."
    )
    logger.warning(told)
    entries = [
        {
            "dataset": {"id": entry["dataset_id"], "task_id": entry["task_id"]},
            "value": entry["value"],
            "notes": entry["notes"],
        }
        for entry in asked
    ]
    return f"# {told}\n{yaml_dump(entries)}"


def hub_datasets(*names: str | Sequence[str] | None) -> list[str]:
    """Give those names of data sets that can be ids on the Hub, each once."""
    return list(dict.fromkeys(name for some in names for name in _texts(some) if _is_hub_id(name)))


def _of_the_hub(name: str | None) -> str | None:
    """Give a name that can be an id on the Hub; None for a path, which says nothing to others."""
    return name if name and _is_hub_id(name) and not Path(name).exists() else None


def _is_published(teacher: Mapping[str, Any]) -> bool:
    """Whether a teacher's id is one of the Hub: a folder's name has neither an owner nor a commit."""
    name = teacher.get("id")
    return isinstance(name, str) and ("/" in name or bool(teacher.get("revision"))) and _is_hub_id(name)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def _part(record: Sidecars, name: str) -> Mapping[str, Any]:
    found = record.config.get(name)
    return found if isinstance(found, Mapping) else {}


# --- text that stays text ---


def _plain(text: object) -> str | None:
    """One line of text, whatever it held; None stays None."""
    if text is None:
        return None
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _texts(given: str | Sequence[str] | None) -> list[str]:
    """One line of text each, of one or several; an empty list for None."""
    return [_plain(one) for one in ([given] if isinstance(given, str) else given or ())]


def _text(text: object) -> str:
    """One line that markdown shows as it is: no table cell, link, tag, heading or picture comes of it."""
    line = (_plain(text) or "").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]#!|~$])", r"\\\1", line)
    # An underscore within a word is none to markdown, and most names have one.
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)
    line = re.sub(r"^([-=+])", r"\\\1", line)
    return re.sub(r"(?i)(https?|ftp|mailto|www)([:.])", r"\1&#8203;\2", line)


def _code(text: object) -> str:
    """A name that cannot leave the string or the comment of the code that it is put into."""
    return re.sub(r"[^A-Za-z0-9_.\-/@:]", "_", _plain(text) or "")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60]


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    # Any other line break would end the block's line where no fence is looked for.
    lines = "\n".join("".join(char if char.isprintable() else " " for char in line) for line in text.splitlines())
    return f"{fence}{language}\n{lines}\n{fence}"


def _facts(facts: Iterable[tuple[str, object]]) -> str:
    return _table(("", ""), [(name, _text(value)) for name, value in facts], aligned=False)


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], *, aligned: bool = True) -> str:
    rule = ["---", *(("---:" if aligned else "---") for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _percent(rate: Any, *, interval: bool = True) -> str:  # noqa: ANN401 - a rate or a difference
    if rate is None or rate.value is None:
        return "-"
    text = _tenths(rate.value)
    return f"{text} [{_tenths(rate.low)}, {_tenths(rate.high)}]" if interval and rate.low is not None else text


def _tenths(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}"  # 0.0, not -0.0


def _by_seed(values: Iterable[float | None]) -> str:
    return ", ".join("-" if value is None else _tenths(value) for value in values)


def _seeds(row: Mapping[str, Any]) -> str:
    return _count(row["seeds"], "seed")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
