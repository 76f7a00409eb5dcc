"""The card of a student: how it came to be, what was measured of it, and what was not."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id, yaml_dump

from remos_hf.judging.report import DefectReport
from remos_hf.sharing.card_measured import MeasuredStudent, measured_section, record_part
from remos_hf.sharing.card_text import (
    as_code,
    as_text,
    counted,
    facts_table,
    fenced_block,
    markdown_table,
    plain_line,
    seeds_of,
    slug_of,
)
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.competition import Account
from remos_hf.strategies import STRATEGIES
from remos_hf.strategies.base import share_by_group

try:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
except ImportError:  # huggingface_hub below 1.4
    EvalResultEntry = None

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("model_card.md")
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
    measured = None if report is None else MeasuredStudent(report, record, student, task)
    kind = record_part(record, "student")
    pipeline, *other_tasks = [*_texts(tasks)] or [_pipeline(kind, measured)]
    teacher = record_part(record, "teacher")
    strategy = record_part(record, "strategy")
    finetuned_from = _of_the_hub(finetuned_from)
    base = teacher["id"] if _is_published(teacher) else finetuned_from
    datasets, hub_ids = _texts(dataset), hub_datasets(dataset_tags, dataset)
    data = ModelCardData(
        language=_texts(language)[0] if len(_texts(language)) == 1 else _texts(language) or None,
        license=plain_line(license),
        library_name=None if kind.get("library") == "torch" else plain_line(kind.get("library", "transformers")),
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys([*_TAGS, slug_of(str(strategy.get("name", "unknown"))), *_texts(tags), *other_tasks])),
        datasets=hub_ids or None,
        metrics=["accuracy"] if measured else None,
        base_model=base,
        base_model_relation="finetune" if base else None,
        model_name=plain_line(model_name) or repo_id.split("/")[1],
        eval_results=_eval_results(measured, pipeline, (hub_ids or datasets or [None])[0]) if measured else None,
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=as_text(repo_id),
        summary=_summary(teacher, strategy, measured, ", ".join(datasets or hub_ids)),
        verdict=measured.verdict if measured else "What it inherited was not measured: no defect report was given.",
        published=published,
        why=_WHY.get(strategy.get("name"), "How it was started is what the strategy below says."),
        slicing=facts_table([*_slicing(record), *_competing(record)]),
        layers=_layers(record),
        origin=facts_table(
            [*_origin(record), *_said(finetuned_from, teacher, datasets, hub_ids, _texts(dataset_args))]
        ),
        measured=measured_section(measured, published) + _metrics_text(metrics),
        untested=_untested(measured),
        loading=_loading(kind, repo_id) if published else "There are no weights to load.",
        reproducing=_reproducing(strategy, command or record.config.get("command")),
        citations=_citations(strategy),
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
    measured = MeasuredStudent(report, record, student, task)
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
        own, kind = measured.own(rows), f"share in [0, 1]; {seeds_of(measured.own(rows))}"
        if not entries and own["acc"] is not None and own["acc"].value is not None:
            entries.append(("accuracy", own["acc"], f"ACC, {kind}"))
        if own["dir"].value is not None:
            about = f"DIR of the defect {plain_line(defect)}, {kind}, {own['dir'].num_samples} samples, 95 % interval"
            about += f" {own['dir'].low:.4f} to {own['dir'].high:.4f}; lower is less inherited"
            entries.append((f"dir_{slug_of(defect)}", own["dir"], about))
    asked = [
        {"dataset_id": dataset, "task_id": name, "value": round(rate.value, 6), "notes": notes}
        for name, rate, notes in entries
    ]
    path = f".eval_results/remos_{slug_of(measured.task) or 'task'}.yaml"
    return {path: _entries_yaml(asked)} if asked else {}


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no "user/name" on the Hub.

    Raises:
        ValueError: It is none.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id is 'user/name', with the user or organisation that owns it, but got {repo_id!r}.")
    validate_repo_id(repo_id)


# --- the words of the card ---


def _summary(
    teacher: Mapping[str, Any], strategy: Mapping[str, Any], measured: "MeasuredStudent | None", datasets: str
) -> str:
    of = measured.task if measured and measured.task else datasets
    task = f" for {as_text(of)}" if of else ""
    origin = as_text(teacher.get("id") or "a teacher that the record does not name")
    told = f"A student of {origin}{task}, started by {as_text(strategy.get('name', 'an unknown strategy'))}."
    meant = "It was started so as to inherit less of its teacher's defects than plain fine-tuning does."
    return told if strategy.get("name") in _COMPARISONS else f"{told} {meant}"


def _slicing(record: Sidecars) -> list[tuple[str, str]]:
    strategy, sliced = record_part(record, "strategy"), record_part(record, "slice")
    coverage = record_part(record, "coverage")
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
    adapters = record_part(record, "adapters")
    if adapters:
        facts.append(("adapters", f"{adapters.get('kind')}, {adapters.get('saved')}"))
    return facts


def _citations(strategy: Mapping[str, Any]) -> str:
    used = {one.get("name") for one in strategy.get("strategies") or [strategy]}
    kinds = [kind for kind in STRATEGIES.values() if kind.__name__ in used]
    return "".join(f"{kind.citation}\n" for kind in kinds if hasattr(kind, "citation"))


def _competing(record: Sidecars) -> list[tuple[str, str]]:
    found = record_part(record, "competing")
    return [("what competes", str(Account.from_dict(found)))] if found else []


def _samples_told(coverage: Mapping[str, Any]) -> str:
    if coverage.get("num_samples") is None:
        return "not recorded"
    return f"{coverage['num_samples']:,}{' (the most that were asked for)' if coverage.get('capped') else ''}"


def _layers(record: Sidecars) -> str:
    if record.relevant_slice is None:
        return "No slice was recorded." if "slice_ratio" in (record_part(record, "strategy")) else "Nothing was sliced."
    groups = share_by_group(record.relevant_slice)
    return markdown_table(
        ("layer group", "share kept %"), [(as_text(name), f"{100 * share:.1f}") for name, share in groups.items()]
    )


def _origin(record: Sidecars) -> list[tuple[str, str]]:
    teacher, coverage = record_part(record, "teacher"), record_part(record, "coverage")
    facts = [
        ("teacher", teacher.get("id") or "not recorded"),
        ("its revision", teacher.get("revision") or "not recorded"),
        ("hash of its sliced weights", teacher.get("hash") or "not recorded"),
    ]
    if coverage:
        facts += [
            ("samples that decided the coverage", _samples_told(coverage)),
            ("their fingerprint", coverage.get("data_fingerprint") or "not recorded"),
        ]
    else:
        facts.append(("data that decided the slice", "none"))
    seconds = record_part(record, "seconds")
    if seconds:
        facts.append(("time to start it", ", ".join(f"{step} {took:.1f} s" for step, took in seconds.items())))
    versions = record_part(record, "versions")
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


def _metrics_text(metrics: Mapping[str, float] | None) -> str:
    if not metrics:
        return ""
    lines = [(as_text(name), f"{value:g}") for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n\nWhat the training script reported, without any defect:\n\n" + markdown_table(("figure", "value"), lines)


def _untested(measured: "MeasuredStudent | None") -> str:
    tested = set()
    if measured:
        chosen = measured.settings.get("defects") or {}
        tested = {(chosen.get(defect) or {}).get("name", defect) for defect in measured.tables}
    lines = [f"- {words}" for name, words in DEFECTS.items() if name not in tested]
    if measured:
        lines += [
            f"- {as_text(defect)}: in the report, but not measured of this student" for defect in measured.without_it
        ]
        missing = (measured.report.settings.get("missing") or {}).get(measured.task)
        if missing:
            lines.append(
                f"- {counted(missing, 'student')} of the audit, which is not over: the tables hold what is done"
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
            f'student = image_classifier("{as_code(kind.get("architecture"))}", checkpoint_path=weights)'
        )
        plain = (
            "A thin module around timm's. Without remos_hf: the file holds timm's state dict with `body.` before each "
            "name."
        )
    else:
        code = (
            "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_model\n\n"
            f'load_model(student, hf_hub_download("{repo_id}", "model.safetensors"))  # a {as_code(kind.get("class"))}'
        )
        plain = "The weights of a torch module: make the module first."
    return f"{plain}\n\n```python\n{code}\n```\n\nHow it came to be, to read and to check:\n\n```python\n{record}\n```"


def _reproducing(strategy: Mapping[str, Any], command: str | None) -> str:
    parts = []
    if command:
        parts.append(fenced_block(re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", command), "bash"))
    else:
        parts.append("The command was not recorded. The strategy was, with all that it was asked for:")
    parts.append(fenced_block(json.dumps(strategy, indent=2), "json"))
    return "\n\n".join(parts)


# --- metadata ---


def _pipeline(kind: Mapping[str, Any], measured: "MeasuredStudent | None") -> str | None:
    name = str(kind.get("class", ""))
    for head, pipeline in _HEADS.items():
        if name.endswith(head):
            return pipeline
    settings = measured.settings if measured else {}
    if kind.get("library") == "timm" or "image_column" in settings:
        return "image-classification"
    return "text-classification" if "text_columns" in settings else None


def _eval_results(measured: "MeasuredStudent", pipeline: str | None, dataset: str | None) -> list[EvalResult]:
    results = []
    known = dataset if dataset and _is_hub_id(dataset) else None
    for defect, rows in measured.tables.items():
        own = measured.own(rows)
        figures = (("accuracy", "ACC", own["acc"]), ("defect_inheritance_rate", "DIR", own["dir"]))
        results += [
            EvalResult(
                task_type=pipeline or "other",
                dataset_type=known or "other",
                dataset_name=plain_line(measured.task or dataset or "not named"),
                # The Hub tells results apart by this, not by their names.
                dataset_config=plain_line(defect),
                dataset_split="test",
                metric_type=kind,
                metric_name=f"{short} ({plain_line(defect)})",
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


# --- text that stays text ---


def _texts(given: str | Sequence[str] | None) -> list[str]:
    """One line of text each, of one or several; an empty list for None."""
    return [plain_line(one) for one in ([given] if isinstance(given, str) else given or ())]
