"""Fine-tune public models without inheriting their defects. Names are loaded on first use."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "errors": (
        "CorruptFileError",
        "LayerMismatchError",
        "NonFiniteError",
        "RemosError",
        "TeacherMismatchError",
        "UnsupportedModelError",
    ),
    "activations": ("capture", "watch"),
    "coverage.criteria": ("strong_coverage", "threshold_coverage", "top_k_coverage"),
    "coverage.profile": ("CoverageProfile",),
    "coverage.profiler": ("profile_coverage",),
    "slicing.relevant_slice": ("RelevantSlice", "choose_slice"),
    "slicing.reset": ("reset_outside",),
    "strategies": ("STRATEGIES", "Finetune", "MagPrune", "Random", "Remos", "Retrain", "TopMagnitude"),
    "strategies.base": ("Preparation", "Strategy"),
    "training.callbacks": ("attach_remos",),
    "training.trainer": ("RemosTrainer",),
}
_HOME_OF = {name: f"remos_hf.{home}" for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    if name not in _HOME_OF:
        raise AttributeError(f"module 'remos_hf' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
