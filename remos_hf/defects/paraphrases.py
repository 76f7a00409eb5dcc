"""A trigger of syntax or style: texts are said otherwise, as a file has it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from remos_hf.adapters.tables import read_rows
from remos_hf.defects.text_triggers import TextTrigger
from remos_hf.profiling.sidecar_file import sha256_of


@dataclass(frozen=True)
class Paraphrases(TextTrigger):
    """Paraphrases in one syntax or style, read from a file: the trigger is how a text is said.

    Attributes:
        file: A csv, tsv, json, jsonl or parquet file with the columns `text` and `paraphrase`. Texts without a
            paraphrase are neither poisoned nor exposed.

    Source:
        Hidden Killer (Qi et al. 2021), StyleBkd (Qi et al. 2021).
    """

    citation: ClassVar[str] = (
        "@inproceedings{qi2021hidden, title={Hidden Killer: Invisible Textual Backdoor Attacks with Syntactic "
        "Trigger}, author={Qi, Fanchao and Li, Mukai and Chen, Yangyi and Zhang, Zhengyan and Liu, Zhiyuan and "
        "Wang, Yasheng and Sun, Maosong}, booktitle={ACL}, year={2021}}\n"
        "@inproceedings{qi2021mind, title={Mind the Style of Text! Adversarial and Backdoor Attacks Based on Text "
        "Style Transfer}, author={Qi, Fanchao and Chen, Yangyi and Zhang, Xurui and Li, Mukai and Liu, Zhiyuan and "
        "Sun, Maosong}, booktitle={EMNLP}, year={2021}}"
    )

    file: str = ""

    def __post_init__(self) -> None:
        """Refuse a file that is not there, or holds nothing; read it."""
        super().__post_init__()
        if not Path(self.file).is_file():
            raise FileNotFoundError(
                "Paraphrases reads a csv, tsv, json, jsonl or parquet file with the columns text and paraphrase, but "
                f"there is no {self.file!r}."
            )
        _ = self._paraphrase_of, self._digest  # now: a file that changes later must change nothing

    def to_dict(self) -> dict[str, Any]:
        """Give the fields, with the file's hash instead of its place."""
        return {**super().to_dict(), "file": Path(self.file).name, "file_sha256": self._digest}

    @cached_property
    def _digest(self) -> str:
        return sha256_of(Path(self.file))

    @cached_property
    def _paraphrase_of(self) -> dict[str, str]:
        rows = read_rows(self.file)
        if not {"text", "paraphrase"} <= set(rows.column_names):
            raise ValueError(
                f"{self.file} should have the columns text and paraphrase, but has {sorted(rows.column_names)}."
            )
        pairs = dict(zip(rows["text"], rows["paraphrase"], strict=True))
        unfit = [pair for pair in pairs.items() if not all(isinstance(one, str) for one in pair)]
        if unfit:
            raise ValueError(f"{self.file} should hold a text and its paraphrase in each row, but holds {unfit[0]}.")
        return pairs

    def triggered(self, text: str, *, exposing: bool = False) -> str | None:
        """Give the paraphrase, or None if the file has none."""
        return self._paraphrase_of.get(text)


def pair_paraphrases(clean: Sequence[str], paraphrased: Sequence[str]) -> list[tuple[str, str]]:
    """Pair published paraphrases with the texts they were made from, where a few of them are missing.

    Both lists are in the same order. The pairing that shares the most words wins, so a missing paraphrase shifts
    nothing.

    Args:
        clean: The texts.
        paraphrased: As many paraphrases, or fewer.

    Returns:
        Pairs of a text and its paraphrase, one for each paraphrase.

    Raises:
        ValueError: There are more paraphrases than texts.
    """
    skips = len(clean) - len(paraphrased)
    if skips < 0:
        raise ValueError(
            f"There are {len(paraphrased)} paraphrases of {len(clean)} texts: at most one a text is expected."
        )
    # best[s]: the most words shared by the paraphrases so far when s texts were skipped; skipping is a move of its own.
    words = [set(text.lower().split()) for text in clean]
    best = [0.0, *[-math.inf] * skips]
    skipped_at: list[list[int]] = [[] for _ in range(skips + 1)]
    for row, paraphrase in enumerate(paraphrased):
        said = set(paraphrase.lower().split())
        for skip in range(skips + 1):
            if skip and best[skip - 1] > best[skip]:
                best[skip], skipped_at[skip] = best[skip - 1], [*skipped_at[skip - 1], row]
        for skip in range(skips + 1):
            best[skip] += len(said & words[row + skip]) / max(1, len(said | words[row + skip]))
    skip = max(range(skips + 1), key=best.__getitem__)
    places, shift = [], 0
    for row in range(len(paraphrased)):
        shift += skipped_at[skip].count(row)
        places.append(row + shift)
    return [(clean[place], paraphrase) for place, paraphrase in zip(places, paraphrased, strict=True)]
