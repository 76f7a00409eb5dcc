"""Reset the channels that backdoors of the defender's own change most (after BD-VAX)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.fields import check_number
from remos_hf.layers import Layer
from remos_hf.profiling.batches import count_samples
from remos_hf.profiling.processes import in_processes, told_by_all
from remos_hf.scanning.own_triggers import OwnTrigger, count_flips, draw_triggers
from remos_hf.slicing.ordinal import Selection
from remos_hf.slicing.rules import Rule, num_to_reset
from remos_hf.strategies.short_runs import Samples, check_counts, free_copy, labelled_loss, short_run
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData

_PROBED = 8  # batches on which it is counted whether a trigger was learned


@dataclass(frozen=True)
class OwnBackdoors(SliceAndReset):
    """Implant backdoors of your own into copies of the teacher, and reset the channels that they change most.

    For each own trigger (random tokens that the data never shows, or a patch of random pixels; a random label), the
    teacher under the student's head is fine-tuned shortly on the student's clean data with the trigger, and without it.
    The difference D_i of the two is what a backdoor is made of here. A channel j (an output row of a weight) scores by
    the mean size of its differences D_i,j, plus how far they agree, the mean over pairs of max(0, cos(D_i,j, D_k,j)).
    The rows of the highest score are given up, the last of them in part, so that just as much is kept as by other
    rules. Nothing can be given that shows an attack.

    It costs num + 2 short runs, told in `seconds`, and holds num + 3 copies of the body's weights in memory.

    Attributes:
        num: Own triggers, at least 2.
        steps: Steps of a short run; fewer where the samples, `max_samples` of the run, would be shown more than twice.
        batch_size: Samples in a step.
        learning_rate: AdamW's in the short runs.
        agreement: Weight of the agreement, where sizes are in units of their mean over all channels.
        attention: Whether the rows of attention's weights compete with the others. If not, they are given up last.

    Source:
        BD-VAX, ICLR 2026: fresh values for the gate and up projections of the channels above a threshold.
        Differs: the weight of the agreement is not known to us, nor the unit of sizes; a size here is over the root of
        the row's length, and every row outside attention competes. Classifiers only. The head is new, so a run on
        clean data comes first; the run without a trigger is one for all, of the same samples as those with one. Input
        embeddings do not train in these runs: a row that no data shows could hold the whole backdoor. Biases stay.
    """

    citation: ClassVar[str] = (
        "@inproceedings{li2026purifying, title={Purifying Generative {LLMs} from Backdoors without Prior Knowledge or "
        "Clean Reference}, author={Li, Jianwei and Kim, Jung-Eun}, booktitle={ICLR}, year={2026}}"
    )

    rule: ClassVar[str] = "own_backdoors"

    num: int = 5
    steps: int = 40
    batch_size: int = 16
    learning_rate: float = 3e-4
    agreement: float = 1.0
    attention: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        super().__post_init__()
        check_counts(self, num=2, steps=1, batch_size=1)
        check_number(self, "above 0", lambda one: one > 0, "learning_rate")
        check_number(self, "at least 0", lambda one: one >= 0, "agreement")

    def _decided_by(self, student: nn.Module, data: StudentData) -> tuple[Rule, Mapping[str, Any]]:
        seed = data.seed if self.seed is None else self.seed
        samples = Samples(data, next(student.parameters()).device, seed)
        triggers = draw_triggers(student, samples.batches, self.num, seed)
        count = _over_all(sum(map(count_samples, samples.batches)))[0]
        run = {
            "steps": min(self.steps, max(1, math.ceil(2 * count / self.batch_size))),
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
        }
        start = teach(free_copy(student), samples, **run, seed=seed, embeddings=False)
        clean = teach(copy.deepcopy(start), samples, **run, seed=seed + 1, embeddings=False)
        differences, learned = [], []
        for trigger in triggers:
            model = teach(copy.deepcopy(start), samples, (trigger,), **run, seed=seed + 1, embeddings=False)
            differences.append(_differences(model, clean, self.head))
            learned.append(_learned(model, clean, samples.batches[:_PROBED], trigger))
        scores = scores_of(differences, self.agreement)
        if in_processes():  # their devices may round otherwise
            scores = told_by_all(scores)[0]
        told = {**run, "samples": count, "triggers": learned}
        return rule_of_scores(scores, attention=self.attention), {"own_backdoors": told}


def teach(
    model: nn.Module,
    samples: Samples,
    triggers: Sequence[OwnTrigger] = (),
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    embeddings: bool = True,
) -> nn.Module:
    """Fine-tune a model, in place, on clean samples, and on copies of them with a trigger and its label.

    Two runs of one seed see the same clean samples in the same order, without dropout and moving norm statistics, so
    their difference is what the triggers taught.

    Args:
        model: In float32. Nothing in it trains afterwards.
        samples: Clean, labelled.
        triggers: Taught in turn, each to some of a step's samples; () for clean samples alone.
        steps: Steps of AdamW, at one rate, without weight decay.
        batch_size: Clean samples in a step.
        learning_rate: The rate.
        seed: Seed of the samples' order.
        embeddings: Whether embeddings train too.

    Returns:
        The model.

    Raises:
        NonFiniteError: A loss or its gradient became NaN or infinite.
    """
    spared = (
        set()
        if embeddings
        else {id(one) for module in model.modules() if isinstance(module, nn.Embedding) for one in module.parameters()}
    )
    turns = cycle(triggers)

    def loss(batch: Any) -> Tensor:  # noqa: ANN401 - any batch
        trigger = next(turns, None)
        taught = None if trigger is None else trigger.taught(batch)
        found = labelled_loss(model, batch)
        return found if taught is None else found + labelled_loss(model, taught)

    trained = [one for one in model.parameters() if one.is_floating_point() and id(one) not in spared]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0.0)
    samples.generator.manual_seed(seed)
    short_run(model, samples, loss, optimizer, steps=steps, batch_size=batch_size)
    return model


def _over_all(*counts: int) -> list[int]:
    """Add counts up over all processes."""
    return [sum(column) for column in zip(*(told_by_all(counts) if in_processes() else [counts]), strict=True)]


def _differences(model: nn.Module, clean: nn.Module, head: tuple[str, ...] | None) -> dict[str, Tensor]:
    """Give what every layer's channels differ by. Float32, shape (out, columns), on the CPU."""
    without = adapter_for(clean, head).layers()
    return {
        name: layer.by_output(layer.weight - without[name].weight).flatten(0, 1).cpu()
        for name, layer in adapter_for(model, head).layers().items()
    }


def _learned(model: nn.Module, clean: nn.Module, batches: Sequence, trigger: OwnTrigger) -> dict[str, Any]:
    counts = _over_all(*count_flips(model, batches, trigger), *count_flips(clean, batches, trigger))
    names = ("flipped", "hosts", "flipped_without", "hosts_without")
    return {**trigger.to_dict(), **dict(zip(names, counts, strict=True))}


def scores_of(differences: Sequence[Mapping[str, Tensor]], agreement: float) -> dict[str, Tensor]:
    """Score the channels of layers by what own backdoors change of them.

    Args:
        differences: By layer, one of each own backdoor, at least two. Shape (out, columns).
        agreement: Weight of the agreement.

    Returns:
        By layer: mean size of the differences, over the root of the columns, in units of its mean over all channels,
        plus `agreement` times the mean over pairs of max(0, cos). Shape (out,).
    """
    sizes, agreed = {}, {}
    for name in differences[0]:
        several = [one[name] for one in differences]
        sizes[name] = torch.stack([one.norm(dim=1) for one in several]).mean(0) / several[0].shape[1] ** 0.5
        cosines = [nn.functional.cosine_similarity(*pair, dim=1) for pair in combinations(several, 2)]
        agreed[name] = torch.stack(cosines).clamp(min=0).mean(0)
    unit = float(torch.cat(list(sizes.values())).mean()) or 1.0
    return {name: size / unit + agreement * agreed[name] for name, size in sizes.items()}


def rule_of_scores(scores: Mapping[str, Tensor], *, attention: bool = False) -> Callable[..., Selection]:
    """Give the rule that gives up the rows of the highest score.

    Args:
        scores: Score of each output neuron, by layer name; rows of a layer without scores are given up last.
        attention: Whether the rows of attention's weights, known by their names, compete with the others. If not, they
            are given up after them.
    """

    def own_backdoors(layers: Sequence[Layer], profile: object, share: float, seed: int) -> Selection:
        found = [scores.get(layer.name, torch.zeros(layer.out_neurons)) for layer in layers]
        columns = [layer.numel // layer.out_neurons for layer in layers]
        last = [layer.name not in scores or (not attention and _is_attention(layer.name)) for layer in layers]
        order = sorted(
            ((late, -score, at, row) for at, (late, of) in enumerate(zip(last, found, strict=True))
             for row, score in enumerate(of.tolist())),
        )  # fmt: skip
        kept = [
            torch.ones(layer.out_neurons, size, dtype=torch.bool) for layer, size in zip(layers, columns, strict=True)
        ]
        left = num_to_reset(layers, share)
        for _, _, at, row in order:
            kept[at][row, :left] = False
            left -= min(left, columns[at])
            if not left:
                break
        return Selection.of(
            [
                layer.from_output(one.view(layer.groups, -1, one.shape[1]))
                for layer, one in zip(layers, kept, strict=True)
            ]
        )

    return own_backdoors


def _is_attention(name: str) -> bool:
    return any(word in name.lower() for word in ("attention", "attn"))
