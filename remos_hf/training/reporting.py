"""What was done and inherited, through a trainer's own reporters."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from remos_hf.errors import CorruptFileError
from remos_hf.sharing.record import CONFIG_FILE, Sidecars
from remos_hf.strategies.base import share_by_group
from remos_hf.training.effect_search import RECORD_KEY as EFFECT_SEARCH
from remos_hf.training.ratio_search import RECORD_KEY as RATIO_SEARCH

if TYPE_CHECKING:
    from remos_hf.judging.report import DefectReport

logger = logging.getLogger(__name__)


class StartLog(TrainerCallback):
    """Logs what was done to the student through the trainer's reporters, once, at the start of a run.

    The names, each a plain float, also in `trainer_state.json` (TensorBoard, W&B and trackio show them as `train/...`):

    - `remos/share_kept`, `remos/share_kept/<layer group>`, `remos/squares_reset`: the slice; shares of the weights and
      of their squares.
    - `remos/share_never_covered`, `remos/mean_coverage_frequency`, `remos/coverage_samples`: the coverage; shares of
      the neurons at both ends of every layer, and the mean of their coverage frequencies.
    - `remos/embedding_rows_reset`, `remos/seconds/<step>`.
    - `remos/ratio_search/accuracy_budget`, `remos/ratio_search/slice_ratio`: what was asked for, and chosen.
    - `remos/ratio_search/accuracy`, with `.../low`, `.../high` and `.../lost`: the curve of a search. The step of its
      points is the slice ratio in thousandths; 1000 is plain fine-tuning.
    - `remos/effect_search/accuracy_budget`, `.../effect_budget` and `.../setting`; and its curve as above, with
      `.../own` and `.../untaught`, the shares that own triggers turn in the student that they were taught to and in the
      other. The step is the setting in thousandths, 1000 is plain fine-tuning; for `k` the step is k, and 0 is plain.

    A resumed run logs nothing: its history holds it. As with everything that Trainer logs, every process hears of it,
    and reporters write on the first.

    Args:
        trainer: The trainer.
        sidecars: What was done.
    """

    def __init__(self, trainer: Trainer, sidecars: Sidecars) -> None:
        self.trainer, self.sidecars = trainer, sidecars

    # Not on_train_begin: reporters that were added later are set up there, after this one.
    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Log it, before the first step."""
        if state.global_step > 0:
            return
        numbers = _start_numbers(self.sidecars)
        if not numbers:
            return
        for key in (RATIO_SEARCH, EFFECT_SEARCH):
            search = self.sidecars.config.get(key, {})
            for point in search.get("curve", ()):
                self._log_point(state, key, _place_on_curve(search, point), point)
        self.trainer.log(numbers)
        if state.is_world_process_zero and self.sidecars.relevant_slice is not None:
            # The whole paragraph is at INFO, which nobody sees by default; that weights were reset is not for a few.
            logger.warning(_in_one_line(self.sidecars))

    def _log_point(self, state: TrainerState, key: str, place: int, point: dict[str, Any]) -> None:
        names = {"accuracy": "", "low": "/low", "high": "/high", "lost": "/lost"}
        found = {f"remos/{key}/accuracy{end}": point[name] for name, end in names.items()}
        found |= {f"remos/{key}/{name}": point[name]["value"] for name in ("own", "untaught") if name in point}
        step = state.global_step
        state.global_step = place  # a curve needs an axis, and reporters have this one
        try:
            self.trainer.log({name: float(value) for name, value in found.items() if value is not None})
        finally:
            state.global_step = step


def _place_on_curve(search: dict[str, Any], point: dict[str, Any]) -> int:
    """Give the step that a point of a search stands at: its setting, shares in thousandths."""
    whole = search.get("knob") == "k"
    setting = point.get("setting", point.get("slice_ratio"))
    if setting is None:  # plain fine-tuning: everything is kept, or no row is overwritten
        setting = 0 if whole else 1
    return round(setting if whole else 1000 * setting)


def earlier_slice(folder: str | Path) -> str:
    """Say of a folder that holds a sliced model that another slice of it is no share of the teacher.

    Args:
        folder: Where a model was loaded from; need not be a folder at all.

    Returns:
        A sentence; empty if no slice is recorded there.
    """
    if not folder or not (Path(folder) / CONFIG_FILE).is_file():
        return ""
    try:
        made = Sidecars.load(folder).config
    except (CorruptFileError, OSError) as error:
        return f"{folder} holds a record that cannot be read, so whether it was sliced before is not known: {error}"
    if "slice" not in made:
        return ""
    return (
        f"{Path(folder).name} was sliced before: {made['strategy']['name']} kept {made['slice']['share_kept']:.1%} of "
        f"{made['teacher'].get('id') or 'its teacher'}. What it gave up competes again, as zeros or fresh values, so "
        "the share that is kept now is no share of the teacher. For that, slice the teacher itself."
    )


def _in_one_line(sidecars: Sidecars) -> str:
    relevant, profile = sidecars.relevant_slice, sidecars.profile
    by = "" if profile is None else f" by the coverage of {profile.num_samples:,} samples"
    return (
        f"{sidecars.config['strategy']['name']}: the student keeps {relevant.num_kept:,} of the "
        f"{relevant.num_weights:,} weights that compete ({relevant.share_kept:.1%}){by}; the others were reset before "
        "the first step."
    )


def _start_numbers(sidecars: Sidecars) -> dict[str, float]:
    relevant, profile, config = sidecars.relevant_slice, sidecars.profile, sidecars.config
    numbers: dict[str, float] = {}
    if relevant is not None:
        numbers["remos/share_kept"] = relevant.share_kept
        numbers |= {f"remos/share_kept/{group}": share for group, share in share_by_group(relevant).items()}
        numbers["remos/squares_reset"] = config["slice"]["squares_reset"]
    if profile is not None:
        counts = torch.cat([*profile.input_counts.values(), *profile.output_counts.values()])
        numbers["remos/share_never_covered"] = profile.share_never_covered
        numbers["remos/mean_coverage_frequency"] = counts.double().mean().item() / profile.num_samples
        numbers["remos/coverage_samples"] = profile.num_samples
    if "embedding_rows_reset" in config:
        numbers["remos/embedding_rows_reset"] = config["embedding_rows_reset"]
    for key, chosen in ((RATIO_SEARCH, "slice_ratio"), (EFFECT_SEARCH, "setting")):
        search = config.get(key, {})
        told = [name for name in ("accuracy_budget", "effect_budget", chosen) if name in search]
        numbers |= {f"remos/{key}/{name}": search[name] for name in told}
    numbers |= {f"remos/seconds/{step}": seconds for step, seconds in config["seconds"].items()}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def log_defects(trainer: Trainer, report: "DefectReport") -> None:
    """Log what students inherited through a trainer's reporters, and into its history.

    The names are `remos/<measure>/<task>/<defect>/<student>`, seeds pooled, without the task where it has no name; a
    slash within a name becomes an underscore. The measures are shares: `acc`; `dir`; `floor`, the benign twin's DIR;
    `excess`, DIR minus floor; and the count `dir_num_samples`. What was not measured is left out.

    Args:
        trainer: Any Trainer: a RemosTrainer, or one with `attach_remos`. The step is the one it has come to.
        report: The report; students of other trainers may be in it.
    """
    numbers: dict[str, float] = {}
    for (task, defect), rows in report.tables().items():
        for row in rows:
            place = "/".join(part.replace("/", "_") for part in (task, defect, row["student"]) if part)
            measured = {measure: row[measure] and row[measure].value for measure in ("acc", "dir", "floor", "excess")}
            measured["dir_num_samples"] = row["dir"] and row["dir"].num_samples
            for measure, value in measured.items():
                if value is not None:
                    numbers[f"remos/{measure}/{place}"] = float(value)
    trainer.log(numbers)
