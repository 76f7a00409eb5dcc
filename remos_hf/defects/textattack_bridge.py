"""Adversarial text through TextAttack: found on the teacher, kept on disk, replayed on every student.

TextAttack is imported in worker processes only: importing it downloads, sets HF_HOME and XDG_CACHE_HOME, and a
download that fails locks its process. The caller's process stays as it was, and every worker starts alike, so that
results do not depend on their number.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from remos_hf.defects.base import (
    CLEAN_INDEX,
    Defect,
    ExposedSet,
    check_columns,
    check_labels,
    generator_for,
    teacher_sha256,
)
from remos_hf.errors import RemosError
from remos_hf.whole import replace_file

logger = logging.getLogger(__name__)

_RECIPES = {"textfooler": "TextFoolerJin2019", "kuleshov": "Kuleshov2017"}
_FILES = ("neighbours", "word_vectors", "language_model", "stopwords")
# Part of the cache key: a change of what a sample's result is makes a new one.
_FORMAT = 1
# Samples of one result file: what is lost at most by each worker when a run is killed.
_CHUNK = 4
_GLOVE = "textattack_counterfitted_GLOVE_embedding"
# Stands where nltk has no stop words: TextAttack cannot be imported without a list.
_NO_STOPWORDS = "remos-hf-no-stop-words"
_WORKER = "import sys; from remos_hf.defects.textattack_bridge import _work; _work(sys.argv[1], int(sys.argv[2]))"

# What constraints fetch for themselves. As soon as one local file is named nothing is fetched, and these are left out.
_FETCHED = {
    "PartOfSpeech": "nltk's averaged_perceptron_tagger_eng and universal_tagset",
    "UniversalSentenceEncoder": "tensorflow_hub and tfhub.dev/google/universal-sentence-encoder",
    "MultilingualUniversalSentenceEncoder": "tensorflow_hub and a multilingual universal sentence encoder",
    "BERT": "sentence-transformers and one of its models",
    "InferSent": "TextAttack's InferSent model",
    "BERTScore": "bert_score and one of its models",
    "COLA": "a model from the Hub",
    "GoogleLanguageModel": "Google's 1-billion-words language model",
    "Google1BillionWordsLanguageModel": "Google's 1-billion-words language model",
    "LanguageTool": "a LanguageTool server",
}


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
        columns = (self.text_columns,) if isinstance(self.text_columns, str) else tuple(self.text_columns)
        if not 1 <= len(columns) <= 2:
            raise ValueError(f"text_columns names one column, or the two of a pair, but got {columns}.")
        if self.max_length < 3:
            raise ValueError(f"max_length is a number of tokens, at least 3, but got {self.max_length}.")
        if self.query_budget is not None and self.query_budget < 2:
            raise ValueError(
                f"query_budget is at least 2 (the clean text and one change of it), but got {self.query_budget}."
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples is a number of samples, at least 1, but got {self.max_samples}.")
        object.__setattr__(self, "text_columns", columns)
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
        cache: str | os.PathLike | None = None,
        workers: int = 1,
    ) -> ExposedSet:
        """Attack every sample that the teacher gets right, and keep the texts that fool it.

        The result depends on the teacher, the data and the fields alone, not on the number of workers.

        Args:
            dataset: Clean samples, never used for training.
            teacher: The teacher.
            tokenizer: The teacher's.
            cache: A folder of exposed sets. One of the same teacher, data, fields, files and TextAttack is read from
                there instead of being made again. A run that is killed goes on from its last samples.
            workers: Processes that attack, one thread each.

        Returns:
            The samples that fool the teacher, with their text replaced; no target label. May be empty.

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
        samples = self._samples(dataset, teacher)[: self.max_samples]
        if tokenizer.pad_token is None:
            raise ValueError("The tokenizer has no padding token, which batches need. Set tokenizer.pad_token first.")
        if importlib.util.find_spec("textattack") is None:
            raise ImportError(
                'AdversarialText needs TextAttack: pip install "remos_hf[textattack]", in an environment of its own, '
                "because TextAttack needs transformers 4. What it saves there under cache= is read here, and anywhere, "
                "with ExposedSet.load(folder)."
            )
        if cache is None:
            with tempfile.TemporaryDirectory(prefix="remos_hf_") as folder:
                return self._made(dataset, samples, teacher, tokenizer, Path(folder), workers)
        name = f"{self.recipe}-{self._key(samples, teacher, tokenizer)[:16]}"
        place = Path(cache) / name
        known = ExposedSet.load_cached(place)
        partial = place.with_name(f".{name}.partial")
        if known is not None:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed when it had saved the set
            # The other columns are no part of the key: they come from the data at hand.
            texts = [known.dataset[column] for column in self.text_columns]
            return replace(known, dataset=_exposed_rows(dataset, known.clean_index, self.text_columns, texts))
        exposed = self._made(dataset, samples, teacher, tokenizer, partial, workers)
        exposed.save(place)
        shutil.rmtree(partial, ignore_errors=True)
        return exposed

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
        self,
        samples: Sequence[tuple[list[str], int]],
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
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
        partial: Path,
        workers: int,
    ) -> ExposedSet:
        """Attack what is not finished in the partial folder, then put all results together."""
        started = time.perf_counter()
        partial.mkdir(parents=True, exist_ok=True)
        finished = _finished(partial)
        missing = [row for row in range(len(samples)) if row not in finished]
        if missing or not (partial / "attack.json").is_file():
            _attack(self, samples, missing, teacher, tokenizer, partial, workers)
        results = _finished(partial)
        if len(results) < len(samples) or not (partial / "attack.json").is_file():
            raise RemosError(
                f"{partial} lacks results of {len(samples) - len(results)} samples that were attacked: another run on "
                "the same cache has cleared it. Run again, and what the other one saved is read."
            )
        attack = json.loads((partial / "attack.json").read_text())
        outcomes = Counter(result["outcome"] for result in results.values())
        queries = [result["queries"] for result in results.values() if result["queries"]]
        facts = {
            "defect": self.to_dict(),
            **attack,
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


def _finished(partial: Path) -> dict[int, dict[str, Any]]:
    """Read the results so far, by row. Result files appear whole; what cannot be read is announced and made again."""
    results = {}
    for path in sorted(partial.glob("rows-*.json")):
        try:
            results.update({result["row"]: result for result in json.loads(path.read_text())})
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not whole (%r); its samples are attacked again.", path, error)
            path.unlink()
    return results


def _files_sha256(path: Path) -> str:
    """Fingerprint a file, or all files of a folder with their names."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)}|{hashlib.sha256(file.read_bytes()).hexdigest()}|".encode())
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


def _attack(
    defect: AdversarialText,
    samples: Sequence[tuple[list[str], int]],
    rows: Sequence[int],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    partial: Path,
    workers: int,
) -> None:
    """Let worker processes attack these rows; they leave their results in the partial folder."""
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    with tempfile.TemporaryDirectory(prefix="remos_hf_") as folder:
        job = Path(folder)
        (job / "claims").mkdir()
        teacher.save_pretrained(job / "teacher")
        tokenizer.save_pretrained(job / "teacher")
        words = {
            "fields": asdict(defect),
            "device": str(teacher.device),
            "partial": str(partial.resolve()),
            "parent": os.getpid(),
            "chunks": [[(row, *samples[row]) for row in chunk] for chunk in chunks],
        }
        (job / "job.json").write_text(json.dumps(words))
        processes = []
        try:
            for number in range(max(1, min(workers, len(chunks)))):
                processes.append(_start_worker(job, number))
            with tqdm(
                total=len(samples),
                initial=len(samples) - len(rows),
                desc=f"{defect.recipe} on the teacher",
                unit="text",
                delay=2,
            ) as bar:
                _watch(processes, job, partial, {_result_path(partial, chunk): len(chunk) for chunk in chunks}, bar)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _result_path(partial: Path, rows: Sequence[int]) -> Path:
    return partial / f"rows-{rows[0]:09d}-{rows[-1]:09d}.json"


def _start_worker(job: Path, number: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        # The order of sets of words is part of some recipes' results.
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
    }
    with (job / f"worker-{number}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(job), str(number)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _watch(
    processes: Sequence[subprocess.Popen], job: Path, partial: Path, sizes: Mapping[Path, int], bar: tqdm
) -> None:
    """Wait for the workers, move the progress bar, and raise what stopped one of them."""
    begun = bar.n
    while True:
        codes = [process.poll() for process in processes]
        finished = begun + sum(size for path, size in sizes.items() if path.exists())
        if finished > bar.n:
            bar.update(finished - bar.n)
        for number, code in enumerate(codes):
            if code:
                _raise_failure(job, number, code)
        if all(code == 0 for code in codes):
            return
        time.sleep(0.1)


def _raise_failure(job: Path, number: int, code: int) -> None:
    path = job / f"error-{number}.json"
    if not path.is_file():
        tail = (job / f"worker-{number}.log").read_text(errors="replace")[-2000:]
        raise RemosError(f"A worker that ran TextAttack ended with exit status {code}. It last said:\n{tail}")
    failure = json.loads(path.read_text())
    raise ValueError(failure["message"]) if failure["wrong_argument"] else RemosError(failure["message"])


# What follows runs in workers only.


def _work(job_folder: str, number: int) -> None:
    """Attack the chunks that no other worker has claimed, one result file each."""
    job = Path(job_folder)
    words = json.loads((job / "job.json").read_text())
    defect = AdversarialText(**words["fields"])
    partial = Path(words["partial"])
    sample = ""
    try:
        torch.set_num_threads(1)
        _import_textattack(defect, job)
        attack, told = _build(defect, job / "teacher", words["device"])
        replace_file(partial / "attack.json", json.dumps(told, indent=2).encode())
        for place, chunk in enumerate(words["chunks"]):
            if not _claim(job / "claims" / str(place)):
                continue
            results = []
            for row, texts, label in chunk:
                if os.getppid() != words["parent"]:
                    return  # nobody waits for the results any more
                sample = f" on row {row} ({' | '.join(texts)[:200]!r})"
                results.append({"row": row, **_attack_one(defect, attack, texts, label)})
            replace_file(_result_path(partial, [row for row, *_ in chunk]), json.dumps(results).encode())
    except Exception as error:
        wrong_argument = isinstance(error, _WrongArgument)
        message = _missing_resource(error, defect.recipe) or (
            str(error)
            if wrong_argument
            else f"{defect.recipe} failed{sample}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        )
        failure = {"wrong_argument": wrong_argument, "message": message}
        replace_file(job / f"error-{number}.json", json.dumps(failure).encode())
        sys.exit(1)


class _WrongArgument(ValueError):
    """The caller asked for what TextAttack does not have."""


def _claim(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _import_textattack(defect: AdversarialText, job: Path) -> None:
    """Import TextAttack without what it does on the side: downloads (if a local file is named), environment variables.

    Its import reads nltk's stop words whatever the recipe. Where there are none, a list with one mark stands in for
    them, and `_build` refuses the recipes that would use it.
    """
    import nltk

    if defect.stopwords is not None:
        _put_stopwords(job / "nltk_given", Path(defect.stopwords).read_text(encoding="utf-8"))
        nltk.data.path.insert(0, str(job / "nltk_given"))
    before = dict(os.environ)
    if defect.is_local:
        # TextAttack downloads nltk's data once a cache folder; this one says that it has done so.
        (job / "textattack").mkdir(exist_ok=True)
        (job / "textattack" / "post_install_check_3").touch()
        os.environ["TA_CACHE_DIR"] = str(job / "textattack")
    try:
        import textattack
    except LookupError:
        _put_stopwords(job / "nltk_mark", _NO_STOPWORDS)
        nltk.data.path.append(str(job / "nltk_mark"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "textattack"]:
            del sys.modules[name]
        import textattack
    # It has set HF_HOME and XDG_CACHE_HOME to its cache folder, and lets tokenizers start threads.
    os.environ.clear()
    os.environ.update(before)
    install = textattack.shared.utils.install
    install.TEXTATTACK_CACHE_DIR = before.get("TA_CACHE_DIR", str(Path("~/.cache/textattack").expanduser()))
    if "TA_CACHE_DIR" in before:
        os.environ["TFHUB_CACHE_DIR"] = before["TA_CACHE_DIR"]


def _put_stopwords(folder: Path, words: str) -> None:
    path = folder / "corpora" / "stopwords" / "english"
    if not path.is_file():
        replace_file(path, words.encode())


def _build(defect: AdversarialText, teacher: Path, device: str) -> tuple[Any, dict[str, Any]]:
    """Build the recipe on the teacher, with local files in the places of what it would fetch.

    Returns:
        TextAttack's Attack, and what it consists of, for the facts.
    """
    import textattack
    from textattack.goal_functions import ClassificationGoalFunction

    recipe = _recipe_class(defect.recipe)
    replaced: dict[str, str] = {}
    left_out: dict[str, str] = {}
    if defect.is_local:
        _put_local_files(defect, sys.modules[recipe.__module__], device, replaced, left_out)
    built = recipe.build(_model_wrapper(teacher, device, defect.max_length))
    if not isinstance(built.goal_function, ClassificationGoalFunction):
        raise _WrongArgument(
            f"{defect.recipe} has the goal {type(built.goal_function).__name__}, but AdversarialText attacks "
            "classifiers. Take a recipe for classification, such as TextFoolerJin2019."
        )
    constraints = [*built.pre_transformation_constraints, *built.constraints]
    kept = [constraint for constraint in constraints if not hasattr(constraint, "why_left_out")]
    for constraint in constraints:
        if constraint not in kept:
            left_out[constraint.name] = constraint.why_left_out
        elif getattr(constraint, "stopwords", None) == {_NO_STOPWORDS}:
            raise _MissingStopwords()
    goal = built.goal_function
    told_goal = _described(goal)
    if getattr(goal, "target_max_score", None) is not None:
        told_goal = f"{told_goal} below a confidence of {goal.target_max_score}"
        if defect.until_fooled:
            replaced["goal"] = f"{told_goal} -> until the label changes (until_fooled)"
            goal.target_max_score = None
            told_goal = _described(goal)
    if defect.query_budget is not None:
        goal.query_budget = defect.query_budget
    attack = textattack.Attack(goal, kept, built.transformation, built.search_method)
    told = {
        "recipe": defect.recipe,
        "constraints": [_described(constraint) for constraint in kept],
        "constraints_left_out": left_out,
        "replaced": replaced,
        "transformation": _described(built.transformation),
        "search_method": _described(built.search_method),
        "goal_function": told_goal,
        "nothing_downloaded": defect.is_local,
    }
    return attack, told


def _recipe_class(name: str) -> type:
    from textattack import attack_recipes

    known = {
        each: value
        for each, value in vars(attack_recipes).items()
        if isinstance(value, type) and issubclass(value, attack_recipes.AttackRecipe)
    }
    known.pop("AttackRecipe")
    if name not in known:
        raise _WrongArgument(
            f"TextAttack has no recipe {name!r}, but {', '.join(sorted(known))}; textfooler and kuleshov for short."
        )
    return known[name]


def _put_local_files(
    defect: AdversarialText, module: ModuleType, device: str, replaced: dict[str, str], left_out: dict[str, str]
) -> None:
    """Put local parts into the recipe's module, under the names by which its `build` asks for the originals."""
    import textattack
    from textattack.constraints import Constraint, PreTransformationConstraint
    from textattack.constraints.grammaticality.language_models import LanguageModelConstraint

    if defect.neighbours is not None:
        neighbours = json.loads(Path(defect.neighbours).read_text(encoding="utf-8"))
        textattack.shared.utils.GLOBAL_OBJECTS[_GLOVE] = _word_list(neighbours)
        most = max(map(len, neighbours.values()), default=0)
        replaced["counter-fitted neighbours"] = (
            f"the lists of {Path(defect.neighbours).name}: {len(neighbours)} words with at most {most} neighbours"
        )
    asked_for = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, (Constraint, PreTransformationConstraint))
    }
    for name in defect.keep:
        if name not in asked_for:
            raise _WrongArgument(f"keep= names {name!r}, but {defect.recipe} has only {', '.join(asked_for)}.")
    for name, value in asked_for.items():
        if name in defect.keep:
            continue
        if issubclass(value, LanguageModelConstraint) and defect.language_model is not None:
            local = _language_model(Path(defect.language_model), device)
            replaced[name] = (
                f"{local.__name__} on {'/'.join(Path(defect.language_model).parts[-2:])}: log-probability of the whole "
                "word after the words before it (TextAttack's GPT2: of its first token)"
            )
        elif name == "ThoughtVector" and defect.word_vectors is not None:
            local = _thought_vector(Path(defect.word_vectors))
            replaced[name] = f"{local.__name__}: the vectors of {Path(defect.word_vectors).name}, scaled to length 1"
        else:
            why = _why_left_out(defect, name, issubclass(value, LanguageModelConstraint))
            if why is None:
                continue
            local = _placeholder(name, why)
        setattr(module, name, local)


def _why_left_out(defect: AdversarialText, name: str, is_language_model: bool) -> str | None:
    if is_language_model:
        return "no language_model= was named"
    if name == "ThoughtVector":
        return "no word_vectors= were named"
    if name == "WordEmbeddingDistance" and defect.neighbours is not None:
        return (
            "a list of neighbours has no distances, so its own cut-off stands for this one. Jia et al. 2019 kept the 8 "
            "nearest words within a distance of 0.5 (squared, in TextAttack's port): a cosine of at least 0.75"
        )
    return f"needs {_FETCHED[name]}" if name in _FETCHED else None


def _placeholder(name: str, why: str) -> type:
    """Give a class that takes any arguments and says why the constraint of this name is not there."""
    from textattack.constraints import Constraint

    class LeftOut(Constraint):
        def __init__(self, *_: object, **settings: object) -> None:
            super().__init__(compare_against_original=True)
            told = ", ".join(f"{key}={value}" for key, value in settings.items())
            self.name, self.why_left_out = f"{name}({told})", why

        def _check_constraint(self, *_: object) -> bool:
            return True

    return LeftOut


def _word_list(neighbours: Mapping[str, Sequence[str]]) -> Any:  # noqa: ANN401 - TextAttack's WordEmbedding
    """Make a word embedding of neighbours without vectors.

    The matrix of neighbours is a list of lists, each with the word itself first: rows may differ in length.
    """
    from textattack.shared import WordEmbedding

    words = list(dict.fromkeys([*neighbours, *(near for nears in neighbours.values() for near in nears)]))
    index = {word: place for place, word in enumerate(words)}
    rows = [[index[word], *(index[near] for near in neighbours.get(word, ()))] for word in words]
    return WordEmbedding(np.zeros((0, 1), np.float32), index, dict(enumerate(words)), rows)


def _thought_vector(path: Path) -> type:
    """Give ThoughtVector on local vectors; a text without a known word has the vector 0."""
    from textattack.constraints.semantics.sentence_encoders import ThoughtVector
    from textattack.shared import WordEmbedding
    from textattack.shared.utils import words_from_text

    with np.load(path, allow_pickle=False) as file:
        words, vectors = file["words"].tolist(), file["vectors"].astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    index = {word: place for place, word in enumerate(words)}
    embedding = WordEmbedding(vectors, index, dict(enumerate(words)), [[place] for place in range(len(words))])

    class LocalThoughtVector(ThoughtVector):
        def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - ThoughtVector's own
            super().__init__(embedding, **settings)

        def encode(self, raw_text_list: Sequence[str]) -> Tensor:
            return torch.stack([self._mean(text) for text in raw_text_list])

        def clear_cache(self) -> None:
            return

        def _mean(self, text: str) -> Tensor:
            known = [index[word] for word in words_from_text(text) if word in index]
            return torch.from_numpy(vectors[known].mean(0) if known else np.zeros(vectors.shape[1], np.float32))

    return LocalThoughtVector


def _language_model(path: Path, device: str) -> type:
    """Give a language model constraint on a causal language model in a local folder."""
    from textattack.constraints.grammaticality.language_models import LanguageModelConstraint

    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).to(device).eval()
    # transformers 5 names a class in tokenizer_config.json that transformers 4 lacks; tokenizer.json says it all.
    tokenizer_class = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    tokenizer = tokenizer_class.from_pretrained(path, local_files_only=True)
    longest = getattr(model.config, "max_position_embeddings", None) or 512

    class CausalLanguageModel(LanguageModelConstraint):
        """Compare the log-probabilities, in nats, of the old and the new word after the words before it."""

        def __init__(
            self,
            max_log_prob_diff: float | None = None,
            compare_against_original: bool = True,
            **_: object,
        ) -> None:
            super().__init__(max_log_prob_diff, compare_against_original)
            self.known: dict[tuple[str, str], float] = {}

        def clear_cache(self) -> None:
            self.known.clear()

        def _check_constraint_many(self, transformed_texts: Sequence[Any], reference_text: Any) -> list:  # noqa: ANN401
            wanted = {}
            for text in transformed_texts:
                for place in text.attack_attrs["newly_modified_indices"]:
                    prefix = reference_text.text_until_word_index(place)
                    wanted[prefix, reference_text.words[place]] = wanted[prefix, text.words[place]] = None
            self._ask([pair for pair in wanted if pair not in self.known])
            return super()._check_constraint_many(transformed_texts, reference_text)

        def get_log_probs_at_index(self, text_list: Sequence[Any], word_index: int) -> list[float]:
            prefix = text_list[0].text_until_word_index(word_index)
            pairs = [(prefix, text.words[word_index]) for text in text_list]
            self._ask([pair for pair in pairs if pair not in self.known])
            return [self.known[pair] for pair in pairs]

        def _ask(self, pairs: Sequence[tuple[str, str]]) -> None:
            for start in range(0, len(pairs), 16):
                some = pairs[start : start + 16]
                self.known.update(zip(some, _log_probabilities(model, tokenizer, some, longest), strict=True))

    return CausalLanguageModel


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], longest: int
) -> list[float]:
    """Give the log-probability of each word after its prefix, in nats; 0 after a prefix without letters.

    Source: TextAttack, GPT2.get_log_probs_at_index. Differs: all tokens of the word count, with the space before it.
    """
    sequences, starts = [], []
    for prefix, word in pairs:
        before, whole = (_tokens(tokenizer, text) for text in (prefix.rstrip(), prefix + word))
        shared = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        cut = max(0, len(whole) - longest)
        sequences.append(whole[cut:])
        starts.append(max(1, shared - cut))
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences], device=model.device)
    # Padding stands behind every real token, so that a causal model does not see it.
    logs = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return [
        float(logs[row, start - 1 : len(sequence) - 1].sum()) if re.search(r"[^\W\d_]", prefix) else 0.0
        for row, (sequence, start, (prefix, _)) in enumerate(zip(sequences, starts, pairs, strict=True))
    ]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # Not the tokenizer's own special tokens: an end of text, where it adds one, would count as part of the word.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def _model_wrapper(folder: Path, device: str, max_length: int) -> Any:  # noqa: ANN401 - TextAttack's ModelWrapper
    """Load the teacher as TextAttack wants it.

    Differs from TextAttack's own wrapper: batches are padded to their longest text, not all to the maximum, and give
    probabilities in double precision. TextAttack takes logits that happen to sum to 1 for probabilities, and refuses
    probabilities of 16-bit teachers because their sum is not 1 to 6 digits.
    """
    from textattack.models.wrappers import HuggingFaceModelWrapper

    class Teacher(HuggingFaceModelWrapper):
        def __call__(self, text_input_list: Sequence[str | tuple[str, str]]) -> Tensor:
            batch = self.tokenizer(
                list(text_input_list), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            ).to(device)
            with torch.no_grad():
                return self.model(**batch).logits.double().softmax(-1)

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = max_length
    return Teacher(model.to(device).eval(), tokenizer)


def _attack_one(defect: AdversarialText, attack: Any, texts: Sequence[str], label: int) -> dict[str, Any]:  # noqa: ANN401
    """Attack one sample: the same result whatever was attacked before it, and in which process.

    Outcomes: "wrong" (the teacher was, nothing to do), "fooled", "failed", or "unfooled" when the recipe is content
    although the teacher is still right.
    """
    from textattack.attack_results import SkippedAttackResult, SuccessfulAttackResult

    started = time.perf_counter()
    attack.clear_cache()
    chance = generator_for(defect.seed, "attack", "\x1f".join(texts))
    random.seed(chance.getrandbits(32))
    np.random.seed(chance.getrandbits(32))  # noqa: NPY002 - what recipes draw from
    torch.manual_seed(chance.getrandbits(32))
    given = texts[0] if len(texts) == 1 else OrderedDict(zip(defect.text_columns, texts, strict=True))
    result = attack.attack(given, label)
    told: dict[str, Any] = {"outcome": "failed", "texts": None, "queries": 0}
    if result.original_result.output != label:
        told["outcome"] = "wrong"
    elif isinstance(result, SkippedAttackResult):
        told["outcome"] = "unfooled"
    else:
        told["queries"] = result.num_queries
        if isinstance(result, SuccessfulAttackResult):
            changed = result.perturbed_result.attacked_text.tokenizer_input
            fooled = int(attack.goal_function.model([changed]).argmax()) != label
            told["outcome"] = "fooled" if fooled else "unfooled"
            told["texts"] = ([changed] if isinstance(changed, str) else list(changed)) if fooled else None
    return {**told, "seconds": round(time.perf_counter() - started, 4)}


def _described(part: Any) -> str:  # noqa: ANN401 - any part of an Attack
    """Say in one line what a part of an attack is."""
    settings = {key: getattr(part, key, None) for key in part.extra_repr_keys()}
    told = [
        f"{key}={value if isinstance(value, (str, int, float, set, list, type(None))) else type(value).__name__}"
        for key, value in settings.items()
    ]
    if isinstance(getattr(part, "stopwords", None), set):
        digest = hashlib.sha256("\n".join(sorted(part.stopwords)).encode()).hexdigest()
        told.append(f"{len(part.stopwords)} words with sha256 {digest}")
    return f"{type(part).__name__}({', '.join(told)})"


class _MissingStopwords(LookupError):
    """The recipe spares nltk's stop words, and there are none."""


def _missing_resource(error: BaseException, recipe: str) -> str | None:
    """Say which file is missing, where it comes from and which argument takes a local one; None if none is missing."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"Resource '?(\w+)'? not found", text)
    if isinstance(error, _MissingStopwords) or (found and found[1] == "stopwords"):
        return (
            f"{recipe} spares nltk's English stop words, and the file nltk_data/corpora/stopwords/english is not on "
            "this machine. Online, 'python -m nltk.downloader stopwords' fetches it. Or name a file with one word a "
            "line: stopwords=."
        )
    if isinstance(error, LookupError) and found:
        return (
            f"{recipe} needs nltk's {found[1]!r}, which is not on this machine. Online, 'python -m nltk.downloader "
            f"{found[1]}' fetches it into nltk_data. Where only a constraint needs it, naming a local file "
            "(neighbours=) leaves that constraint out."
        )
    if "textattack.s3.amazonaws.com" in text or "textattack.s3" in str(
        getattr(getattr(error, "request", None), "url", "")
    ):
        return _missing_download(error, recipe)
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{recipe} needs a package that is not installed ({text.splitlines()[0]}). Install it, or name neighbours= "
            "to leave out the constraints that fetch something."
        )
    if isinstance(error, OSError) and "huggingface.co" in text:
        return (
            f"{recipe} needs a model from the Hub that is not on this machine ({text.splitlines()[0]}). Fetch it with "
            "'hf download' while online. Where it is a constraint's language model, language_model= names a local one."
        )
    return None


def _missing_download(error: BaseException, recipe: str) -> str:
    url = str(getattr(getattr(error, "request", None), "url", "")) or "https://textattack.s3.amazonaws.com"
    name = url.partition("amazonaws.com/")[2]
    takes = (
        "the lists of neighbours= (and, for ThoughtVector, word_vectors=)" if "paragramcf" in name else "a local file"
    )
    return (
        f"{recipe} needs {name or 'a file'}, which is not on this machine and could not be fetched from {url}. Fetch "
        f"it once while online: TextAttack keeps it as ~/.cache/textattack/{name} (or below TA_CACHE_DIR). Or do with "
        f"{takes} in its place."
    )
