"""The card of a student: how it came to be, what was measured of it, and what was not."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from remos_hf.judging.report import DefectReport
from remos_hf.sharing.card_measured import MeasuredStudent, Tie, head_of, measured_section, record_part, untested_of
from remos_hf.sharing.card_record import (
    HEADS,
    described,
    layers_table,
    loading,
    origin_facts,
    reproducing,
    slicing_facts,
    training_facts,
    why,
)
from remos_hf.sharing.card_text import as_text, facts_table, markdown_table, plain_line, slug_of
from remos_hf.sharing.defect_kinds import DEFECTS, defect_citations, defect_kind
from remos_hf.sharing.hub_results import is_hub_id, model_index
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies import STRATEGIES
from remos_hf.strategies.slice_and_reset import SliceAndReset

_TEMPLATE = Path(__file__).with_name("model_card.md")
_TAGS = ("remos_hf", "transfer-learning", "defect-inheritance")


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
    weights: str | None = None,
) -> ModelCard:
    """Render the card of a student from its record, and from what was measured of it.

    Every figure comes from the record or the report. Whatever they say is shown as plain text: names with markdown,
    HTML, YAML or jinja in them stay names.

    Args:
        record: How the student came to be.
        report: What it, or students made alike, inherited; None says that nothing was measured.
        repo_id: "user/name" of the repository that the card is for.
        student: The student's name in the report; None finds its weights, or the one made as the record says.
        task: The report's task that the student is of; may be left out where there is only one.
        command: What reproduces the student; None takes what the record says. Tokens of the Hub in it are blanked.
        dataset: Of the task, as a Hub id where it has one; several in a list.
        language: As a code, such as "en"; several in a list.
        license: As the Hub writes it, such as "apache-2.0"; None takes what the record knows of the teacher's.
        metrics: What the training script measured of the student without any defect, by name; None takes what the
            record says.
        published: Whether the weights are in the repository; False for a card of measurements alone.
        model_name: Shown for the repository's name in the metadata.
        tags: Further tags.
        tasks: Pipeline tags, such as "text-classification"; the first one stands for the one that the class implies.
        finetuned_from: Hub id of the teacher, where the record knows only the folder that it lay in.
        dataset_tags: Hub ids of the data sets that `dataset` names.
        dataset_args: Their configurations, such as "sst2".
        weights: The hash of the weights that the card is for (`hash_of_folder`, `hash_of_model`). Only rows of the
            report that name it are of this student; without one the card says that these weights were not measured.

    Returns:
        The card. `str(card)` is the README.md; the same arguments give the same text.

    Raises:
        ValueError: `repo_id` is no repository id; the student or the task is not in the report, is not clear, or was
            made otherwise than the record says.
    """
    check_repo_id(repo_id)
    measured = None if report is None else MeasuredStudent(report, record, student, task, weights)
    kind, teacher, strategy = (record_part(record, name) for name in ("student", "teacher", "strategy"))
    pipeline, *other_tasks = [*_texts(tasks)] or [_pipeline(kind, measured)]
    finetuned_from = _of_the_hub(finetuned_from)
    base = teacher["id"] if _is_published(teacher) else finetuned_from
    datasets, hub_ids = _texts(dataset), hub_datasets(dataset_tags, dataset)
    results = measured and model_index(measured, pipeline, (hub_ids or datasets or [None])[0])
    data = ModelCardData(
        language=_texts(language)[0] if len(_texts(language)) == 1 else _texts(language) or None,
        license=plain_line(license or teacher.get("license")),
        library_name=None if kind.get("library") == "torch" else plain_line(kind.get("library", "transformers")),
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys([*_TAGS, slug_of(str(strategy.get("name", "unknown"))), *_texts(tags), *other_tasks])),
        datasets=hub_ids or None,
        metrics=["accuracy"] if results else None,
        base_model=base,
        base_model_relation="finetune" if base else None,
        model_name=plain_line(model_name) or (repo_id.split("/")[1] if results else None),
        eval_results=results or None,
    )
    first, follows = head_of(measured, weights, published=published)
    # What the weights were measured on says nothing of what they were trained for.
    about = ", ".join(datasets or hub_ids) or (measured.task if measured and measured.tie is not Tie.THESE else "")
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=as_text(repo_id),
        what=described(record, about, measured.learning_rate_factor if measured else 1.0),
        measured_first=first,
        follows=follows,
        published=published,
        why=why(record),
        slicing=facts_table(slicing_facts(record)),
        layers=layers_table(record),
        training=_table_or(training_facts(record), "How it was trained was not recorded."),
        evaluation=_evaluation(record_part(record, "evaluation") if metrics is None else metrics),
        origin=facts_table(
            [*origin_facts(record, weights), *_said(finetuned_from, teacher, datasets, hub_ids, _texts(dataset_args))]
        ),
        measured=measured_section(measured),
        untested="\n".join(f"- {line}" for line in _untested(measured, pipeline)),
        loading=loading(kind, repo_id) if published else "There are no weights to load.",
        reproducing=reproducing(strategy, command or record.config.get("command")),
        citations="\n".join(dict.fromkeys(_citations(strategy, measured))),
    )


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no "user/name" on the Hub.

    Raises:
        ValueError: It is none.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id is 'user/name', with the user or organisation that owns it, but got {repo_id!r}.")
    validate_repo_id(repo_id)


def _table_or(facts: Sequence[tuple[str, object]], otherwise: str) -> str:
    return facts_table(facts) if facts else otherwise


def _evaluation(metrics: Mapping[str, Any]) -> str:
    lines = [(as_text(name), f"{value:g}") for name, value in metrics.items() if isinstance(value, int | float)]
    if not lines:
        return "What it reaches without any defect was not recorded."
    return "What training reported, without any defect:\n\n" + markdown_table(("figure", "value"), lines)


def _citations(strategy: Mapping[str, Any], measured: MeasuredStudent | None) -> Iterator[str]:
    """Give the papers of the measure, of the strategies, and of the defects measured, entry by entry."""
    yield SliceAndReset.citation
    used = {one.get("name") for one in strategy.get("strategies") or [strategy]}
    yield from (kind.citation for kind in STRATEGIES.values() if kind.__name__ in used and hasattr(kind, "citation"))
    for verdict in measured.verdicts.values() if measured else ():
        for given in defect_citations(verdict.section.described):
            yield from given.splitlines()


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


def _untested(measured: MeasuredStudent | None, pipeline: str | None) -> Iterator[str]:
    """Name what was not tested of these weights: only what could be shown in the inputs that the student takes."""
    tested = set()
    if measured:
        yield from untested_of(measured)
        if measured.tie is Tie.THESE:
            tested = {defect_kind(one.section.described) for one in measured.verdicts.values()}
    inputs = "image" if (pipeline or "").startswith("image") else "text" if (pipeline or "").startswith("t") else None
    inputs = "text" if pipeline in ("question-answering", "fill-mask") else inputs
    for kind in DEFECTS.values():
        if kind not in tested and (inputs is None or inputs in kind.inputs):
            yield kind.name
    yield "other data than the task's own, other triggers than those of the report, and defects that nobody named"


# --- metadata ---


def _pipeline(kind: Mapping[str, Any], measured: MeasuredStudent | None) -> str | None:
    name = str(kind.get("class", ""))
    for head, pipeline in HEADS.items():
        if name.endswith(head):
            return pipeline
    settings = measured.settings if measured else {}
    if kind.get("library") == "timm" or "image_column" in settings:
        return "image-classification"
    return "text-classification" if "text_columns" in settings else None


def hub_datasets(*names: str | Sequence[str] | None) -> list[str]:
    """Give those names of data sets that can be ids on the Hub, each once."""
    return list(dict.fromkeys(name for some in names for name in _texts(some) if is_hub_id(name)))


def _of_the_hub(name: str | None) -> str | None:
    """Give a name that can be an id on the Hub; None for a path, which says nothing to others."""
    return name if name and is_hub_id(name) and not Path(name).exists() else None


def _is_published(teacher: Mapping[str, Any]) -> bool:
    """Whether a teacher's id is one of the Hub: a folder's name has neither an owner nor a commit."""
    name = teacher.get("id")
    return isinstance(name, str) and ("/" in name or bool(teacher.get("revision"))) and is_hub_id(name)


# --- text that stays text ---


def _texts(given: str | Sequence[str] | None) -> list[str]:
    """One line of text each, of one or several; an empty list for None."""
    return [plain_line(one) for one in ([given] if isinstance(given, str) else given or ())]
