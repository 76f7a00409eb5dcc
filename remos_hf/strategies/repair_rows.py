"""Repair after training: the unseen tokens that turn the student most get the row of another unseen token."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from remos_hf.activations import evaluating
from remos_hf.adapters.classified import labels_in, logits_in
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import RemosError
from remos_hf.fields import check_number, check_whole
from remos_hf.profiling.processes import in_processes, told_by_all
from remos_hf.profiling.tokens import seen_tokens
from remos_hf.scanning.hosts import read_texts, reading
from remos_hf.scanning.tokens import hosts_to_search, one_by_one, rows_to_scan, strongest
from remos_hf.slicing.refill import check_rows_are_free
from remos_hf.strategies.base import Hold, Preparation, Strategy
from remos_hf.strategies.student_data import StudentData

logger = logging.getLogger(__name__)

LADDER = (256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class RepairRows(Strategy):
    """Overwrite the rows that turn the trained student most, among the tokens that its data never shows.

    Every such row is shown beside real texts, as `scan_tokens` does. The `k` strongest of each label get the row of a
    random other unseen token of middling effect: not the mean row, which RIPPLES' encoder reads as a trigger, and not
    that of [UNK], which LWP's does. It removes the key and not the lock: tokens near to a trigger may still act, and
    what stands in the student's data is left alone.

    Attributes:
        k: Rows of each label, or "auto": the most of 256, 128, ... 8 with which the accuracy on held-out data stays
            within the budget; none if no number does.
        accuracy_budget: For "auto": how much accuracy may be lost, a share.
        seed: Decides which texts the rows are shown beside, and which rows stand in; the run's seed if None.
        bf16: Show the rows in bfloat16 autocast: less time on processors that know it.

    Source:
        Ours. In benchmarks/README.md 64 rows of each label leave 2 % of trigger words (plain fine-tuning 94 %) and 11 %
        of a trigger sentence (99 %), at equal accuracy; with five poisoned samples 83 % of the sentence are back. A
        trigger of tokens that the data shows is not touched.
    """

    refuses_adapters: ClassVar[str] = "it overwrites rows of the embeddings, which adapters leave to the base model."

    k: int | Literal["auto"] = 64
    accuracy_budget: float = 0.01
    seed: int | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        if self.k != "auto":
            check_whole(self, "the number of rows of each label, at least 1, or 'auto'", 1, "k")
        check_number(self, "a share, in [0, 1)", lambda one: 0 <= one < 1, "accuracy_budget")

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Refuse what could not be repaired, before the student trains.

        Raises:
            TypeError: The student has no input embeddings.
            UnsupportedModelError: Its head is tied to them.
            ValueError: k is "auto" and there is no held-out data.
        """
        check_rows_are_free(student)
        if self.k == "auto" and data.held_out is None:
            raise ValueError(
                "RepairRows(k='auto') measures accuracy on held-out clean data. Give the trainer an eval_dataset, or "
                "name a number of rows."
            )
        return Preparation()

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Give what repairs the student when it is trained."""
        return _Repair(self)


@dataclass(frozen=True)
class _Choice:
    """The strongest rows of each label, a row to stand in for each, or why there are none."""

    rows: dict[int, list[int]] = field(default_factory=dict)
    stand_ins: dict[int, int] = field(default_factory=dict)
    why: str = ""

    def overwrite(self, weight: Tensor, k: int) -> dict[str, list[int]]:
        """Overwrite the k strongest rows of each label; say which, by label."""
        chosen = {str(label): some[:k] for label, some in self.rows.items()}
        for row in {row for some in chosen.values() for row in some}:
            weight[row] = weight[self.stand_ins[row]]  # which is never overwritten itself
        return chosen


class _Repair(Hold):
    def __init__(self, recipe: RepairRows) -> None:
        self.recipe = recipe
        self.told: dict[str, Any] = {}

    @torch.no_grad()
    def finish(self, model: nn.Module, data: StudentData) -> None:
        recipe, weight = self.recipe, check_rows_are_free(model).weight
        ladder = LADDER if recipe.k == "auto" else (recipe.k,)
        seed = data.seed if recipe.seed is None else recipe.seed
        choice = _chosen(model, data, ladder[0], seed, bf16=recipe.bf16)
        if in_processes():  # each has read texts of its own
            choice = told_by_all(choice)[0]
        if choice.why:
            logger.warning("RepairRows overwrote nothing: %s", choice.why)
            self.told = {"k": 0, "rows": {}, "why": choice.why}
        elif recipe.k == "auto":
            self.told = self._within_budget(model, data, choice, weight)
        else:
            rows = choice.overwrite(weight, recipe.k)
            self.told = {"k": max(map(len, rows.values())), "rows": rows}

    def _within_budget(self, model: nn.Module, data: StudentData, choice: _Choice, weight: Tensor) -> dict[str, Any]:
        before, accuracy = weight.clone(), _accuracy(model, data.held_out())
        tried: dict[str, float] = {}
        for k in LADDER:
            rows = choice.overwrite(weight, k)
            tried[str(k)] = _accuracy(model, data.held_out())
            if tried[str(k)] >= accuracy - self.recipe.accuracy_budget:
                return {"k": max(map(len, rows.values())), "rows": rows, "accuracy_before": accuracy, "accuracy": tried}
            weight.copy_(before)
        return {
            "k": 0,
            "rows": {},
            "accuracy_before": accuracy,
            "accuracy": tried,
            "why": "no number within the budget",
        }

    def details(self) -> dict[str, Any]:
        return {"repaired_rows": self.told}


def _chosen(model: nn.Module, data: StudentData, most: int, seed: int, *, bf16: bool) -> _Choice:
    samples = data.max_samples if data.is_stream else None
    seen = seen_tokens(model, data.batches(samples), across_processes=True)
    try:
        texts = read_texts(model, data.batches(samples), seed=seed, room=1)
        rows, _ = rows_to_scan(model, texts)
        rows = rows[~seen[rows]]
        if not len(rows):
            return _Choice(why="the data shows every token.")
        with reading(model, bf16) as reader:
            hosts = hosts_to_search(texts, reader)
            first = one_by_one(reader, hosts, rows)
            most = min(most, len(rows) // (2 * len(first)))  # as many as there are others to stand in
            found = {label: strongest(reader, hosts, label, rows, one)[:most] for label, one in enumerate(first)}
    except (RemosError, TypeError, ValueError) as error:  # the student is trained: it is not lost for that
        return _Choice(why=str(error))
    taken = dict.fromkeys(row for some in found.values() for row in some)
    free = torch.tensor([row not in taken for row in rows.tolist()], dtype=torch.bool)
    if not taken:
        return _Choice(why=f"{len(rows)} tokens are unseen, too few to overwrite some and to have others stand in.")
    stand_ins = _middling(rows[free], first[:, free], len(taken), seed)
    return _Choice(found, dict(zip(taken, stand_ins, strict=True)))


def _middling(rows: Tensor, first: Tensor, number: int, seed: int) -> list[int]:
    """Draw rows among the half that turns texts least into any label."""
    far = (first - first.median(1, keepdim=True).values).abs()
    far = (far / far.median(1, keepdim=True).values.clamp(min=1e-6)).nan_to_num(0).amax(0)
    middle = rows[far.argsort(stable=True)[: max(number, len(rows) // 2)]]
    drawn = torch.randperm(len(middle), generator=torch.Generator().manual_seed(seed))[:number]
    return middle[drawn].tolist()


def _accuracy(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    right = total = 0
    adapter, device = adapter_for(model), next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            given = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            labels = labels_in(batch)
            if labels is None:
                raise ValueError("RepairRows(k='auto') measures accuracy on held-out data, but a batch has no labels.")
            right += int((logits_in(adapter.forward(given), model).argmax(-1).cpu() == labels).sum())
            total += len(labels)
    counts = told_by_all((right, total)) if in_processes() else [(right, total)]
    right, total = (sum(one) for one in zip(*counts, strict=True))
    if not total:
        raise ValueError("RepairRows(k='auto') measures accuracy on held-out data, but it holds no sample.")
    return right / total
