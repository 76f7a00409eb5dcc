"""Repair after training: the unseen tokens that turn the student most get the row of another unseen token."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from remos_hf.activations import evaluating
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import RemosError
from remos_hf.profiling.processes import in_processes, told_by_all
from remos_hf.profiling.tokens import seen_tokens
from remos_hf.scanning.hosts import read_texts, reading
from remos_hf.scanning.tokens import hosts_to_search, one_by_one, rows_to_scan, strongest
from remos_hf.slicing.refill import check_rows_are_free
from remos_hf.strategies.base import Hold, Preparation, Strategy
from remos_hf.strategies.student_data import StudentData

logger = logging.getLogger(__name__)

LADDER = (64, 32, 16, 8, 4)


@dataclass(frozen=True)
class RepairRows(Strategy):
    """Overwrite the rows that turn the trained student most, among the tokens that its data never shows.

    Every such row is shown beside real texts, as `scan_tokens` does. The `k` strongest of each label get the row of a
    random other unseen token of middling effect: not the mean row, which RIPPLES' encoder reads as a trigger, and not
    that of [UNK], which LWP's does. It removes the key and not the lock: tokens near to a trigger may still act, and
    what stands in the student's data is left alone.

    Attributes:
        k: Rows of each label, or "auto": the most of 64, 32, 16, 8 and 4 with which the accuracy on held-out data stays
            within the budget; none if no number does.
        accuracy_budget: For "auto": how much accuracy may be lost, a share.
        seed: Decides which texts the rows are shown beside, and which rows stand in; the run's seed if None.

    Source:
        Ours. Measured with the word, RIPPLES, EP and LWP backdoors.
    """

    refuses_adapters: ClassVar[str] = "it overwrites rows of the embeddings, which adapters leave to the base model."

    k: int | Literal["auto"] = 8
    accuracy_budget: float = 0.01
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        if self.k != "auto" and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"k is the number of rows of each label, at least 1, or 'auto', but got {self.k!r}.")
        if not 0 <= self.accuracy_budget < 1:
            raise ValueError(f"accuracy_budget is a share, in [0, 1), but got {self.accuracy_budget}.")

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


class _Repair(Hold):
    def __init__(self, recipe: RepairRows) -> None:
        self.recipe, self.told = recipe, {}

    @torch.no_grad()
    def finish(self, model: nn.Module, data: StudentData) -> None:
        seed = data.seed if self.recipe.seed is None else self.recipe.seed
        weight = check_rows_are_free(model).weight
        found, stand_ins = _of_first_process(lambda: _found(model, data, self._most, seed))
        if not found:
            logger.warning("RepairRows overwrote nothing: %s", stand_ins)
            self.told = {"k": 0, "rows": {}, "why": stand_ins}
            return
        before, own = weight.clone(), _overwriter(weight, found, stand_ins)
        if self.recipe.k != "auto":
            self.told = {"k": self.recipe.k, **own(self.recipe.k)}
            return
        accuracy = _accuracy(model, data.held_out())
        tried = {}
        for k in LADDER:
            told = own(k)
            tried[k] = _accuracy(model, data.held_out())
            if tried[k] >= accuracy - self.recipe.accuracy_budget:
                break
            weight.copy_(before)
        else:
            k, told = 0, {"rows": {}}
        self.told = {"k": k, **told, "accuracy_before": accuracy, "accuracy": {str(one): tried[one] for one in tried}}

    @property
    def _most(self) -> int:
        return LADDER[0] if self.recipe.k == "auto" else self.recipe.k

    def details(self) -> dict[str, Any]:
        return {"repaired_rows": self.told}


def _of_first_process(find: Any) -> Any:  # noqa: ANN401 - a function, and what it gives
    """Let every process find, and take what the first one found: each reads texts of its own."""
    return told_by_all(find())[0] if in_processes() else find()


def _found(model: nn.Module, data: StudentData, most: int, seed: int) -> tuple[dict[int, list[int]], Any]:
    """Find the strongest rows of each label, and rows to write there; nothing, and why, where nothing can be said."""
    samples = data.max_samples if data.is_stream else None
    seen = seen_tokens(model, data.batches(samples), across_processes=True)
    try:
        texts = read_texts(model, data.batches(samples), seed=seed, room=1)
        rows, _ = rows_to_scan(model, texts)
        rows = rows[~seen[rows]]
        with reading(model) as reader:
            hosts = hosts_to_search(texts, reader)
            first = one_by_one(reader, hosts, rows)
            found = {label: strongest(reader, hosts, label, rows, one)[:most] for label, one in enumerate(first)}
    except (RemosError, TypeError, ValueError) as error:  # the student is trained: it is not lost for that
        return {}, str(error)
    taken = {row for some in found.values() for row in some}
    free = torch.tensor([row not in taken for row in rows.tolist()], dtype=torch.bool)
    if int(free.sum()) < len(taken):
        return {}, f"only {len(rows)} tokens are unseen, too few for {most} rows of each label and others to stand in."
    return found, _middling(rows[free], first[:, free], len(taken), seed)


def _middling(rows: Tensor, first: Tensor, number: int, seed: int) -> list[int]:
    """Draw rows among the half that turns texts least into any label."""
    far = (first - first.median(1, keepdim=True).values).abs()
    far = (far / far.median(1, keepdim=True).values.clamp(min=1e-6)).nan_to_num(0).amax(0)
    middle = rows[far.argsort(stable=True)[: max(number, len(rows) // 2)]]
    drawn = torch.randperm(len(middle), generator=torch.Generator().manual_seed(seed))[:number]
    return middle[drawn].tolist()


def _overwriter(weight: Tensor, found: Mapping[int, Sequence[int]], stand_ins: Sequence[int]) -> Any:  # noqa: ANN401
    """Give the function that overwrites the k strongest rows of each label, and says which; as JSON values."""
    values = weight[torch.tensor(stand_ins, device=weight.device)].clone()
    place = {row: number for number, row in enumerate(dict.fromkeys(row for some in found.values() for row in some))}

    def overwrite(k: int) -> dict[str, Any]:
        told = {str(label): list(some[:k]) for label, some in found.items()}
        for row in {row for some in told.values() for row in some}:
            weight[row] = values[place[row]]
        return {"rows": told}

    return overwrite


def _accuracy(model: nn.Module, batches: Any) -> float:  # noqa: ANN401 - an iterable of batches
    right = total = 0
    adapter, device = adapter_for(model), next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            given = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            right += int((adapter.forward(given).logits.argmax(-1) == given["labels"]).sum())
            total += len(given["labels"])
    counts = told_by_all((right, total)) if in_processes() else [(right, total)]
    right, total = (sum(one) for one in zip(*counts, strict=True))
    if not total:
        raise ValueError("RepairRows(k='auto') measures accuracy on held-out data, but it holds no sample.")
    return right / total
