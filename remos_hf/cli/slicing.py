"""`remos slice`: a teacher with its irrelevant weights forgotten, as an ordinary checkpoint."""

import logging
from typing import Any

from remos_hf.adapters.guarded_loading import TIMM, teacher_folder
from remos_hf.cli.options import SliceOptions
from remos_hf.cli.output import STUDENT, check_output, written
from remos_hf.cli.profile import profiled
from remos_hf.cli.teacher import check_revision, identity
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.on_disk.streaming import slice_checkpoint
from remos_hf.strategies import STRATEGIES
from remos_hf.strategies.base import Preparation
from remos_hf.training.reporting import earlier_slice

logger = logging.getLogger(__name__)

# A profile's criterion as the strategy in the record names it, with the parameter it had.
_CRITERIA = {
    "MedianCoverage": ("median", ""),
    "ThresholdCoverage": ("nc", "threshold"),
    "TopKCoverage": ("tknc", "k"),
    "StrongCoverage": ("snac", "k"),
}


def run(asked: SliceOptions, progress: bool) -> tuple[dict[str, Any], str]:
    """Slice a teacher; give what is told, as JSON values and as text."""
    teacher, output = asked.teacher, asked.output
    check_output(output, STUDENT, asked.overwrite)
    if teacher.startswith(TIMM):
        raise UnsupportedModelError(f"{teacher}: checkpoints of transformers are sliced on disk; of timm, none is.")
    check_revision(teacher, asked.revision)
    source = teacher_folder(teacher, revision=asked.revision)
    if before := earlier_slice(source.path):
        logger.warning(before)
    profile = None
    if asked.coverage is not None:
        profile = CoverageProfile.load(asked.coverage)
    elif asked.data is not None:
        profile = profiled(asked, asked.data)
    chosen = {name: getattr(asked, name) for name in ("slice_ratio", "scope", "seed", "reset_to")}
    strategy = STRATEGIES[asked.rule](**chosen, **_criterion(asked.rule, profile))
    with written(output, STUDENT) as folder:
        # `written` lets the folder appear, with the record in it.
        made = slice_checkpoint(
            source.path, folder, profile=profile, rule=asked.rule, progress=True, whole=False, **chosen
        )
        relevant = made.relevant_slice
        preparation = Preparation(profile, relevant, dict(made.seconds), made.squares_reset)
        Sidecars.of(strategy, preparation, None, teacher=identity(teacher, asked.revision)).save(folder)
    told = {
        "student": str(output),
        "slice_ratio": asked.slice_ratio,
        "rule": asked.rule,
        "scope": asked.scope,
        "num_kept": relevant.num_kept,
        "num_weights": relevant.num_weights,
        "share_kept": relevant.share_kept,
        "squares_reset": made.squares_reset,
        "seconds": dict(made.seconds),
        "files": sorted(path.name for path in output.iterdir()),
    }
    return told, f"{preparation.summary()}\nSaved {output}: an ordinary checkpoint, to be fine-tuned by any trainer."


def _criterion(rule: str, profile: CoverageProfile | None) -> dict[str, Any]:
    if rule != "remos" or profile is None or profile.criterion.get("name") not in _CRITERIA:
        return {}
    name, parameter = _CRITERIA[profile.criterion["name"]]
    return {"criterion": name, "criterion_value": profile.criterion.get(parameter)}
