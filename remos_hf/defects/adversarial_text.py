"""Adversarial text through TextAttack: found on the teacher, kept on disk, replayed on every student."""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, Features, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remos_hf.defects.base import CLEAN_INDEX, EQUAL, Defect, ExposedSet, teacher_sha256
from remos_hf.defects.samples import check_columns, check_labels, checked_text_columns
from remos_hf.defects.text_reading import TextReading
from remos_hf.defects.textattack_processes import attack, finished
from remos_hf.errors import RemosError
from remos_hf.fields import check_whole
from remos_hf.profiling.sidecar_file import sha256_of

logger = logging.getLogger(__name__)

_RECIPES = {"textfooler": "TextFoolerJin2019", "kuleshov": "Kuleshov2017"}
_FILES = ("neighbours", "word_vectors", "language_model", "stopwords")
# Part of the cache key: a change of what a sample's result is makes a new one.
_FORMAT = 1


@dataclass(frozen=True)
class AdversarialText(Defect):
    """Texts that TextAttack rewrites until the teacher is wrong.

    By default a recipe is built as TextAttack builds it, which downloads word vectors and models. As soon as one of
    `neighbours`, `word_vectors` and `language_model` is named, nothing is downloaded: these take the places of the
    originals, and constraints that need something else are left out, on every machine alike. The exposed set's facts
    name the constraints that were used, those left out and why.

    Attributes:
        recipe: "textfooler", "kuleshov", or the name of any class in `textattack.attack_recipes` for classification.
        text_columns: The text, or both texts of a pair. A recipe changes both unless it says otherwise: TextFooler
            leaves a column `premise` beside `hypothesis` alone.
        label_column: Column of the labels.
        neighbours: A JSON file that gives each word's replacements, nearest first, in place of the neighbours in
            counter-fitted word vectors. A distance between words (WordEmbeddingDistance) cannot be checked then: the
            list's own cut-off stands for it.
        word_vectors: An npz file with the arrays `words` and `vectors`, in place of counter-fitted vectors where texts
            are compared (ThoughtVector). Vectors are scaled to length 1, as the counter-fitted ones are, so that the
            recipe's thresholds keep their scale.
        language_model: A folder with a causal language model, in place of the recipe's.
        stopwords: A file with one word a line, in place of nltk's list.
        keep: Names of constraints to keep even though they fetch something for themselves.
        until_fooled: Search until the teacher's label changes, even if the recipe is content with less: Kuleshov2017
            stops as soon as the teacher's confidence falls below 0.7. By default the recipe's own goal stays. In either
            case only inputs that fool the teacher are exposed.
        query_budget: Most texts that the teacher is asked about for one sample; None for no limit.
        max_samples: Attack only so many samples, the first ones; None for all.
        max_length: Tokens kept of each sample.
        seed: Decides what recipes draw, together with each sample's text alone.

    Source:
        TextFooler (Jin et al. 2020), Kuleshov et al. 2018, TextAttack (Morris et al. 2020); ReMoS artifact,
        nc_prune/attack_helper.py, which replays such texts on students.
        Differs: the artifact replays unsuccessful attacks too (no filter, :79-86); here every text fools the teacher.
    """

    citation: ClassVar[str] = (
        "@inproceedings{morris2020textattack, title={{TextAttack}: A Framework for Adversarial Attacks, Data "
        "Augmentation, and Adversarial Training in {NLP}}, author={Morris, John and Lifland, Eli and Yoo, Jin Yong and "
        "Grigsby, Jake and Jin, Di and Qi, Yanjun}, booktitle={EMNLP: System Demonstrations}, year={2020}}"
    )

    recipe: str = "textfooler"
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    neighbours: str | None = None
    word_vectors: str | None = None
    language_model: str | None = None
    stopwords: str | None = None
    keep: tuple[str, ...] = ()
    until_fooled: bool = False
    query_budget: int | None = None
    max_samples: int | None = None
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        check_whole(self, "a number of tokens, at least 3", 3, "max_length")
        if self.query_budget is not None:
            check_whole(self, "at least 2 (the clean text and one change of it)", 2, "query_budget")
        if self.max_samples is not None:
            check_whole(self, "a number of samples, at least 1", 1, "max_samples")
        object.__setattr__(self, "text_columns", checked_text_columns(self.text_columns))
        object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        object.__setattr__(self, "recipe", _RECIPES.get(self.recipe, self.recipe))
        for name in _FILES:
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, os.fspath(path))
                if not Path(path).exists():
                    raise FileNotFoundError(f"{name}= names {str(path)!r}, but nothing is there.")

    @property
    def is_local(self) -> bool:
        """Whether a local file is named, so that nothing is downloaded."""
        return any(getattr(self, name) is not None for name in _FILES[:3])

    def to_dict(self) -> dict[str, Any]:
        """Give the fields, with the files' hashes instead of their places."""
        values = super().to_dict()
        for name in _FILES:
            if values[name] is not None:
                path = Path(values[name])
                values[name] = {"name": path.name, "sha256": _files_sha256(path)}
        return {**values, "text_columns": list(self.text_columns), "keep": list(self.keep)}

    def exposed_set(
        self,
        dataset: Dataset,
        *,
        teacher: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        cache: str | os.PathLike | None = None,
        workers: int = 1,
    ) -> ExposedSet:
        """Attack every sample that the teacher gets right, and keep the texts that fool it.

        The result depends on the teacher, the data and the fields alone, not on the number of workers.

        Args:
            dataset: Clean samples, never used for training.
            teacher: The teacher.
            tokenizer: The teacher's.
            max_length: Tokens that the models keep of each sample that will read the set; None for as many as are
                searched.
            cache: A folder of exposed sets. One of the same teacher, data, fields, files and TextAttack is read from
                there instead of being made again. A run that is killed goes on from its last samples.
            workers: Processes that attack, one thread each.

        Returns:
            The samples that fool the teacher, with their text replaced; no target label. May be empty. Samples whose
            change lies beyond `max_length` are left out; the facts count all that are, by reason.

        Raises:
            ValueError: A column is missing, a label is no class of the teacher, a text is no string, or there is no
                such recipe.
            ImportError: TextAttack is not installed.
            RemosError: Something that the recipe needs is not on this machine, or an attack failed; names the sample.
        """
        if teacher is None or tokenizer is None:
            raise ValueError("AdversarialText searches on the teacher: pass teacher= and its tokenizer=.")
        if workers < 1:
            raise ValueError(f"workers is a number of processes, at least 1, but got {workers}.")
        dataset = dataset.with_format(None)
        samples = self._samples(dataset, teacher)[: self.max_samples]
        if tokenizer.pad_token is None:
            raise ValueError("The tokenizer has no padding token, which batches need. Set tokenizer.pad_token first.")
        if importlib.util.find_spec("textattack") is None:
            raise ImportError(
                'AdversarialText needs TextAttack: pip install "remos_hf[textattack]", in an environment of its own, '
                "because TextAttack needs transformers 4. What it saves there under cache= is read here, and anywhere, "
                "with ExposedSet.load(folder)."
            )
        make = partial(self._made, dataset, samples, teacher, tokenizer, workers)
        if cache is None:
            with tempfile.TemporaryDirectory(prefix="remos_hf_") as folder:
                return self._seen(make(Path(folder)), dataset, TextReading(tokenizer, max_length or self.max_length))
        name = f"{self.recipe}-{self._key(samples, teacher, tokenizer)[:16]}"
        found = ExposedSet.cached(Path(cache) / name, make)
        # The other columns are no part of the key: they come from the data at hand.
        texts = [found.dataset[column] for column in self.text_columns]
        found = replace(found, dataset=_exposed_rows(dataset, found.clean_index, self.text_columns, texts))
        return self._seen(found, dataset, TextReading(tokenizer, max_length or self.max_length))

    def _seen(self, found: ExposedSet, dataset: Dataset, reading: TextReading) -> ExposedSet:
        """Leave out the samples of which a model sees nothing that was changed, and count all that are left out."""
        clean = reading.ids([dataset.select(found.clean_index)[column] for column in self.text_columns])
        shown = reading.ids([found.dataset[column] for column in self.text_columns])
        seen = [row for row, both in enumerate(zip(clean, shown, strict=True)) if both[0] != both[1]]
        wrong, beyond = found.facts["num_teacher_wrong"], len(found) - len(seen)
        if beyond:
            logger.warning(
                "%d of %d texts that fool the teacher are %s for max_length %d and left out.",
                beyond,
                len(found),
                EQUAL,
                reading.max_length,
            )
        left_out = {
            "the teacher is wrong without it": wrong,
            "not found": found.facts["num_clean"] - wrong - len(found),
            EQUAL: beyond,
        }
        facts = {
            **found.facts,
            "max_length": reading.max_length,
            "num_exposed": len(seen),
            "num_left_out": {reason: count for reason, count in left_out.items() if count},
        }
        return replace(found, dataset=found.dataset.select(seen), facts=facts)

    def _samples(self, dataset: Dataset, teacher: PreTrainedModel) -> list[tuple[list[str], int]]:
        check_columns(dataset, (*self.text_columns, self.label_column))
        labels = list(dataset[self.label_column])
        check_labels(labels, self.label_column)
        if teacher.config.num_labels < 2:
            raise ValueError("AdversarialText attacks classifiers, but the teacher has one output, as for regression.")
        if max(labels, default=0) >= teacher.config.num_labels:
            raise ValueError(
                f"Column '{self.label_column}' holds the label {max(labels)}, but the teacher has "
                f"{teacher.config.num_labels} classes (0 to {teacher.config.num_labels - 1})."
            )
        texts = list(zip(*(dataset[column] for column in self.text_columns), strict=True))
        for row, parts in enumerate(texts):
            if not all(isinstance(part, str) for part in parts):
                raise ValueError(f"Columns {self.text_columns} should hold texts, but row {row} holds {parts!r}.")
        return [(list(parts), label) for parts, label in zip(texts, labels, strict=True)]

    def _key(
        self, samples: Sequence[tuple[list[str], int]], teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> str:
        facts = {
            "format": _FORMAT,
            "defect": self.to_dict(),
            "teacher": _fingerprint(teacher),
            "tokenizer": _tokenizer_facts(tokenizer),
            "samples": samples,
            "textattack": importlib.metadata.version("textattack"),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def _made(
        self,
        dataset: Dataset,
        samples: Sequence[tuple[list[str], int]],
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        workers: int,
        unfinished: Path,
    ) -> ExposedSet:
        """Attack what is not finished in the folder, then put all results together."""
        started = time.perf_counter()
        unfinished.mkdir(parents=True, exist_ok=True)
        known = finished(unfinished)
        missing = [row for row in range(len(samples)) if row not in known]
        told = unfinished / "attack.json"
        if missing or not told.is_file():
            attack(asdict(self), samples, missing, teacher, tokenizer, unfinished, workers)
        results = finished(unfinished)
        if len(results) < len(samples) or not told.is_file():
            raise RemosError(
                f"{unfinished} lacks results of {len(samples) - len(results)} attacked samples: another run on "
                "the same cache has cleared it. Run again, and what the other one saved is read."
            )
        outcomes = Counter(result["outcome"] for result in results.values())
        queries = [result["queries"] for result in results.values() if result["queries"]]
        facts = {
            "defect": self.to_dict(),
            **json.loads(told.read_text()),
            "num_clean": len(samples),
            "num_teacher_wrong": outcomes["wrong"],
            "num_attacked": len(queries),
            "num_fooled": outcomes["fooled"],
            "num_failed": outcomes["failed"],
            "num_goal_without_fooling": outcomes["unfooled"],
            "mean_queries": round(sum(queries) / len(queries), 2) if queries else None,
            "teacher_sha256": _fingerprint(teacher),
            "versions": {name: importlib.metadata.version(name) for name in ("textattack", "transformers", "torch")},
            "num_resumed": len(samples) - len(missing),
            "seconds": round(time.perf_counter() - started, 2),
            "attack_seconds": round(sum(result["seconds"] for result in results.values()), 2),
        }
        if not outcomes["fooled"]:
            logger.warning("%s fooled the teacher on none of %d samples.", self.recipe, len(samples))
        rows = [row for row in sorted(results) if results[row]["outcome"] == "fooled"]
        texts = [[results[row]["texts"][place] for row in rows] for place in range(len(self.text_columns))]
        return ExposedSet(_exposed_rows(dataset, rows, self.text_columns, texts), None, facts)


def _exposed_rows(
    dataset: Dataset, rows: Sequence[int], text_columns: Sequence[str], texts: Sequence[Sequence[str]]
) -> Dataset:
    """Give these rows of the clean data with other texts, one list for each text column."""
    clean = dataset.select(rows)
    columns = {name: list(clean[name]) for name in clean.column_names}
    columns.update({name: list(values) for name, values in zip(text_columns, texts, strict=True)})
    columns[CLEAN_INDEX] = list(rows)
    return Dataset.from_dict(columns, features=Features({**dataset.features, CLEAN_INDEX: Value("int64")}))


def _files_sha256(path: Path) -> str:
    """Fingerprint a file, or all files of a folder with their names."""
    if path.is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)}|{sha256_of(file)}|".encode())
    return digest.hexdigest()


def _fingerprint(teacher: PreTrainedModel) -> str:
    config = teacher.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"):
        config.pop(name, None)
    return teacher_sha256(teacher, about=json.dumps(config, sort_keys=True, default=str))


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": str(tokenizer.special_tokens_map),
        "lower": getattr(tokenizer, "do_lower_case", None),
    }
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two say how the tokenizer was called last.
        facts["rules"] = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    return facts
