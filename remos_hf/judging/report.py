"""What students inherited, as records, as JSON and as tables rendered from it."""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from remos_hf.errors import CorruptFileError, NonFiniteError
from remos_hf.evaluation.anatomy import check_anatomy
from remos_hf.evaluation.measures import rate_of
from remos_hf.evaluation.outcomes import Outcomes
from remos_hf.judging.judgement import BUDGETS, judged
from remos_hf.judging.rows import Row, Section, rows_of, section_of
from remos_hf.judging.tables import markdown_of, sentence_of, tables_of
from remos_hf.judging.verdicts import NOTHING, verdict_of
from remos_hf.slicing.competition import Account
from remos_hf.whole import replace_file

_FORMAT_VERSION = 1
_PACKAGES = ("remos_hf", "torch", "transformers", "datasets", "accelerate")


def installed_versions() -> dict[str, str]:
    """Give the versions that numbers made now are made with."""
    return {"python": platform.python_version(), **{name: _version_of(name) for name in _PACKAGES}}


# A search of all that is installed, done for each student otherwise.
_version_of = cache(version)


def joined_versions(several: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Put versions together: all that were used, where they differ."""
    held: dict[str, set[str]] = {}
    for versions in several:
        for name, one in versions.items():
            held.setdefault(name, set()).update(one.split(", "))
    return {name: ", ".join(sorted(ones)) for name, ones in held.items()}


@dataclass(frozen=True)
class DefectReport:
    """What students inherited.

    Attributes:
        records: One for each task, defect, student and seed: "acc", "dir", "floor" (or None) as rates with counts and
            95 percent intervals, and what is known of how the student was made.
        settings: All that decided the numbers.
        versions: Of the packages that the numbers were made with.
        anatomies: What students are made of, once each: "task", "teacher" (the defect in it, or "clean"), "student",
            "seed", and the "anatomy" (`remos_hf.evaluation.anatomy`). Of several seeds the first; may be empty.
    """

    records: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)
    anatomies: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Keep the settings as JSON gives them back, so that a report read again is the same."""
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))

    def save(self, path: str | os.PathLike) -> Path:
        """Write the report as JSON, beside its place and renamed."""
        path = Path(path)
        content = {
            "format_version": _FORMAT_VERSION,
            "versions": self.versions,
            "settings": self.settings,
            "records": self.records,
        }
        text = json.dumps(content, indent=1)
        if self.anatomies:  # a line each: thousands of numbers, which nobody reads one below the other
            lines = ",\n".join(f"  {json.dumps(one)}" for one in self.anatomies)
            text = f'{text[:-2]},\n "anatomies": [\n{lines}\n ]\n}}'
        replace_file(path, f"{text}\n".encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DefectReport":
        """Read what `save` wrote.

        Raises:
            CorruptFileError: The file is no report, or of a newer version.
        """
        try:
            content = json.loads(Path(path).read_text(), parse_constant=_refuse_constant)
            found = int(content["format_version"])
            if found > _FORMAT_VERSION:
                raise CorruptFileError(
                    f"{path} has format {found}, newer than the {_FORMAT_VERSION} that is read. Update remos_hf."
                )
            records, settings = list(map(dict, content["records"])), dict(content["settings"])
            anatomies = list(map(dict, content.get("anatomies", [])))
            for record in records:
                _check_record(record)
            _check_once(records)
            for one in anatomies:
                _anatomy_place(one)
                check_anatomy(one["anatomy"])
            return cls(records, settings, dict(content["versions"]), anatomies)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorruptFileError(f"{path} is no defect report: it is not JSON, or cut ({error}).") from error
        except KeyError as error:
            raise CorruptFileError(f"{path} is no defect report: it lacks {error}.") from error
        except TypeError as error:
            raise CorruptFileError(f"{path} is no defect report: it holds something else.") from error
        except ValueError as error:
            raise CorruptFileError(f"{path} is no defect report: {error}") from error

    def __add__(self, other: "DefectReport") -> "DefectReport":
        """Put two reports together; what their settings say by task stays apart.

        Raises:
            ValueError: Both hold the same student, which would count twice, or they refer to different students.
        """
        both = {_place(record) for record in self.records} & {_place(record) for record in other.records}
        if both:
            raise ValueError(
                f"Both reports hold {len(both)} of the same records, such as {min(both, key=str)}; added, they would "
                "count twice. Give reports of different tasks a name, and those of different students a seed."
            )
        if self._reference != other._reference:
            raise ValueError(f"The reports refer to {self._reference!r} and {other._reference!r}; use one reference.")
        settings = {**self.settings}
        for key, value in other.settings.items():
            settings[key] = _merged(settings.get(key), value, deep=key == "teachers")
        anatomies = {_anatomy_place(one): one for one in (*other.anatomies, *self.anatomies)}
        inside = [_anatomy_place(one) for one in (*self.anatomies, *other.anatomies)]
        return DefectReport(
            [*self.records, *other.records],
            settings,
            joined_versions([self.versions, other.versions]),
            [anatomies[place] for place in dict.fromkeys(inside)],
        )

    def check_finite(self) -> None:
        """Refuse numbers that nothing can be said of.

        Raises:
            NonFiniteError: A number is NaN or infinite; names the record.
        """
        for number, record in enumerate(self.records):
            if not _is_finite(record):
                raise NonFiniteError(
                    f"Record {number} ({record.get('defect')!r}, student {record.get('student')!r}, seed "
                    f"{record.get('seed')}) holds NaN or infinity: measure that student again."
                )
        if not _is_finite([self.settings, self.anatomies]):
            raise NonFiniteError("The report's settings or anatomies hold NaN or infinity: make the report again.")

    def not_inheriting(self) -> list[tuple[str, str]]:
        """Name the tasks and defects that plain fine-tuning is shown not to inherit: nothing there could be reduced.

        Returns:
            Pairs of task and defect. Where it cannot be said nothing is named.
        """
        told = [verdict_of(section, BUDGETS[0]) for section in self.sections()]
        return [(one.section.task, one.section.defect) for one in told if one.kind == NOTHING]

    @property
    def _reference(self) -> str:
        return self.settings.get("reference", "finetune")

    def tables(self) -> dict[tuple[str, str], list[Row]]:
        """Give the students of each task and defect, their seeds together; what is judged, printed and drawn.

        Returns:
            Rows by task and defect, in the order of the records. A row holds its "kind"; rates over seeds ("acc",
            "dir", "dir_fooled", "floor", "floor_acc": `SeedRate`), differences over seeds ("excess", "against_plain" of
            "dir" and "acc": `SeedDifference`) and ratios ("relative_acc", "relative_dir"), or None where nothing was
            measured; values by seed ("acc_by_seed", "dir_by_seed"); "reactivation" and "floor_reactivation", rates by
            number of poisoned samples; "commonest", the accuracy of always answering the commonest label; "made", how
            the first seed's student was made; "records", what all of this comes from.
        """
        grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in self.records:
            grouped.setdefault((record.get("task") or "", record["defect"]), []).append(record)
        return {key: rows_of(records, self._reference) for key, records in grouped.items()}

    def to_markdown(self, *, budgets: Sequence[float] = BUDGETS) -> str:
        """Render what can be said, and the tables.

        Args:
            budgets: Accuracy that may be lost on the dev split, as shares, for the comparison at equal accuracy.

        Returns:
            Markdown: the answer and the table that holds it; for each task and defect what can be said, the students,
            the rules at equal accuracy, and re-activation.
        """
        told = judged(self, budgets=budgets)
        parts = [f"**{sentence_of(told.answer)}**", ""]
        parts += [line for one in told.advice for line in (sentence_of(one), "")]
        parts += [f"{told.glance.caption}:", "", *markdown_of(told.glance), ""]
        beside = (*told.limits, told.how_to_read, *self.competing())
        parts += [line for one in beside for line in (sentence_of(one), "")]
        for one in told.verdicts:
            title, said = sentence_of(one.section.title), sentence_of(one.verdict)
            parts += [f"## {title}", "", f"**{said}.**", ""]
            parts += [f"- {sentence_of(sentence)}" for sentence in one.sentences]
            for table in tables_of(one.section):
                parts += ["", f"{table.caption}:", "", *markdown_of(table)]
            parts += [""]
        return "\n".join(parts)

    def competing(self) -> list[str]:
        """Say how much of the body competed for the slices, a sentence for each account that students have."""
        accounts: dict[str, list[str]] = {}
        for record in self.records:
            found = (record.get("made") or {}).get("competing")
            if found:
                accounts.setdefault(str(Account.from_dict(found)), []).append(record["student"])
        return [f"{told} ({', '.join(dict.fromkeys(students))})." for told, students in accounts.items()]

    def unfinished(self) -> dict[str, str]:
        """Say, by task, how many students are still to be made or measured; only tasks that lack some."""
        missing = self.settings.get("missing", {})
        told = "{} students are still to be made or measured; the tables hold what is done"
        return {task: told.format(number) for task, number in missing.items() if number}

    def sections(self, *, budgets: Sequence[float] = BUDGETS) -> list[Section]:
        """Give the numbers of each task and defect: what is judged, printed and drawn.

        Args:
            budgets: As for `to_markdown`.
        """
        return [section_of(*key, rows, self.settings, budgets) for key, rows in self.tables().items()]


def _merged(held: Any, value: Any, *, deep: bool) -> Any:  # noqa: ANN401 - JSON values
    """Put settings by task together; teachers of one task are of several seeds."""
    if not isinstance(held, dict) or not isinstance(value, dict):
        return value
    return {**held, **({key: _merged(held.get(key), one, deep=False) for key, one in value.items()} if deep else value)}


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record.get("task") or "", record["defect"], record["student"], record["seed"]


def _anatomy_place(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return one.get("task") or "", one["teacher"], one["student"]


def _is_finite(values: Any) -> bool:  # noqa: ANN401 - JSON values
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        return False
    return True


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _check_record(record: Mapping[str, Any]) -> None:
    missing = {"defect", "student", "seed", "acc", "dir"} - set(record)
    if missing:
        raise ValueError(f"a record lacks {', '.join(sorted(missing))}")
    for key in ("acc", "dir"):
        rate_of(record[key])
    for key in ("outcomes", "floor_outcomes"):
        if record.get(key):
            Outcomes.from_dict(record[key])


def _check_once(records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a record that comes twice: a seed would count as two."""
    place, count = max(Counter(map(_place, records)).items(), key=itemgetter(1), default=(None, 0))
    if count > 1:
        raise ValueError(f"it holds {count} records of {place}, and a student has one a seed")
