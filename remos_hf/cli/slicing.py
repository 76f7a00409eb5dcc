"""`remos slice`: a teacher with its irrelevant weights forgotten, as an ordinary checkpoint."""

from pathlib import Path
from typing import Any

from remos_hf.adapters.guarded_loading import TIMM, teacher_folder
from remos_hf.cli.output import STUDENT, check_output, written
from remos_hf.cli.profile import profiled
from remos_hf.cli.teacher import identity
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.on_disk.streaming import slice_checkpoint
from remos_hf.strategies import STRATEGIES
from remos_hf.strategies.base import Preparation

# A profile's criterion as the strategy in the record names it, with the parameter it had.
_CRITERIA = {"ThresholdCoverage": ("nc", "threshold"), "TopKCoverage": ("tknc", "k"), "StrongCoverage": ("snac", "k")}


def run(
    *,
    teacher: str,
    output: Path,
    slice_ratio: float,
    coverage: Path | None,
    data: str | None,
    rule: str,
    reset_to: str,
    scope: str,
    revision: str | None,
    seed: int,
    overwrite: bool,
    progress: bool,
    **profiling: Any,  # noqa: ANN401 - of `profiled`
) -> tuple[dict[str, Any], str]:
    """Slice a teacher; give what is told, as JSON values and as text."""
    check_output(output, STUDENT, overwrite)
    if teacher.startswith(TIMM):
        raise UnsupportedModelError(f"{teacher}: checkpoints of transformers are sliced on disk; of timm, none is.")
    source = teacher_folder(teacher, revision=revision)
    profile = None
    if coverage is not None:
        profile = CoverageProfile.load(coverage)
    elif data is not None:
        columns = profiling.pop("text_columns")
        profile = profiled(teacher, data, columns, revision=revision, seed=seed, progress=progress, **profiling)
    strategy = STRATEGIES[rule](
        slice_ratio=slice_ratio, scope=scope, reset_to=reset_to, seed=seed, **_criterion(rule, profile)
    )
    with written(output, STUDENT) as folder:
        made = slice_checkpoint(
            source.path,
            folder,
            slice_ratio=slice_ratio,
            profile=profile,
            rule=rule,
            scope=scope,
            seed=seed,
            reset_to=reset_to,
            progress=progress,
            whole=False,  # `written` lets the folder appear, with the record in it
        )
        relevant = made.relevant_slice
        preparation = Preparation(profile, relevant, dict(made.seconds), made.squares_reset)
        Sidecars.of(strategy, preparation, None, teacher=identity(teacher, revision)).save(folder)
    told = {
        "student": str(output),
        "slice_ratio": slice_ratio,
        "rule": rule,
        "scope": scope,
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
    return {"criterion": name, "criterion_value": profile.criterion[parameter]}
