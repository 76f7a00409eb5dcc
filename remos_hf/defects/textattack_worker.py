"""What a worker process does: import TextAttack, and attack the samples that no other worker has claimed."""

import json
import os
import random
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remos_hf.defects.adversarial_text import AdversarialText
from remos_hf.defects.samples import generator_for
from remos_hf.defects.textattack_errors import WrongArgument, missing_resource
from remos_hf.defects.textattack_processes import result_path
from remos_hf.defects.textattack_recipe import NO_STOPWORDS, build
from remos_hf.whole import replace_file


def _import_textattack(defect: AdversarialText, job: Path) -> None:
    """Import TextAttack without what it does on the side: downloads (if a local file is named), environment variables.

    Its import reads nltk's stop words whatever the recipe. Where there are none, a list with one mark stands in for
    them, and `build` refuses the recipes that would use it.
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
        _put_stopwords(job / "nltk_mark", NO_STOPWORDS)
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
        attack, told = build(defect, job / "teacher", words["device"])
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
            replace_file(result_path(partial, [row for row, *_ in chunk]), json.dumps(results).encode())
    except Exception as error:
        wrong_argument = isinstance(error, WrongArgument)
        message = missing_resource(error, defect.recipe) or (
            str(error)
            if wrong_argument
            else f"{defect.recipe} failed{sample}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        )
        failure = {"wrong_argument": wrong_argument, "message": message}
        replace_file(job / f"error-{number}.json", json.dumps(failure).encode())
        sys.exit(1)


def _claim(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]))
