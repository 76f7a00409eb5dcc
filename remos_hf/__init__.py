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
    "adapters.guarded_loading": ("load_teacher", "load_tokenizer", "teacher_config"),
    "adapters.images": ("ImageInput", "image_input_of"),
    "adapters.timm_loading": ("image_classifier",),
    "adapters.timm_models": ("ImageClassifier",),
    "adapters.transformers_models": ("with_new_head",),
    "profiling.criteria": ("median_coverage", "strong_coverage", "threshold_coverage", "top_k_coverage"),
    "profiling.coverage": ("CoverageProfile",),
    "profiling.data_pass": ("profile_coverage",),
    "evaluation.anatomy": ("anatomy",),
    "auditing.audit": ("Audit",),
    "auditing.collected": ("report_of",),
    "auditing.run": ("run_audit",),
    "showing.page": ("write_html",),
    "auditing.students": ("StudentPlan", "standard_students"),
    "evaluation.image_task": ("ImageTask",),
    "evaluation.predictions": ("predict_labels",),
    "evaluation.tasks": ("TextTask",),
    "evaluation.reactivation": ("Reactivation", "reactivate"),
    "judging.report": ("DefectReport",),
    "auditing.given": ("evaluate_transfer",),
    "evaluation.measures": (
        "Difference",
        "Rate",
        "Ratio",
        "accuracy",
        "artifact_nlp_dir",
        "artifact_nlp_dir_from_rate",
        "bootstrap_interval",
        "defect_inheritance_rate",
        "excess_dir",
        "label_flip_rate",
        "rate_from_artifact_nlp_dir",
        "relative_accuracy",
        "relative_dir",
        "wilson_interval",
    ),
    "evaluation.metrics": ("metric_path",),
    "defects.adversarial_text": ("AdversarialText",),
    "defects.base": ("Defect", "ExposedSet"),
    "defects.coverage_guided": ("CoverageGuided",),
    "defects.embedding_poisoning": ("EmbeddingPoisoning",),
    "defects.feature_attack": ("FeatureAttack",),
    "defects.feature_away": ("FeatureAway",),
    "defects.label_noise": ("LabelNoise",),
    "defects.largest_weights": ("LargestWeights",),
    "defects.latent_backdoor": ("LatentBackdoor",),
    "defects.layerwise_poisoning": ("LayerwisePoisoning",),
    "defects.paraphrases": ("Paraphrases",),
    "defects.picture_triggers": ("BlendedTrigger", "PatchTrigger"),
    "defects.ripple": ("Ripple",),
    "defects.text_triggers": ("TriggerSentence", "TriggerWords"),
    "slicing.on_disk.streaming": ("Sliced", "slice_checkpoint"),
    "slicing.relevant_slice": ("RelevantSlice", "choose_slice"),
    "slicing.refill": ("reset_outside",),
    "scanning.patches": ("scan_patches",),
    "scanning.suspects": ("Scan",),
    "scanning.tokens": ("scan_tokens",),
    "judging.scan_judgement": ("judged_scan",),
    "strategies": (
        "L2SP",
        "STRATEGIES",
        "Crow",
        "DiSec",
        "Distilled",
        "Finetune",
        "Guided",
        "Hardened",
        "MagPrune",
        "OwnBackdoors",
        "Random",
        "Relevance",
        "Remos",
        "Renofeation",
        "RepairRows",
        "Retrain",
        "SeaM",
        "Subspace",
        "TopMagnitude",
    ),
    "strategies.base": ("Hold", "Preparation", "Strategy"),
    "sharing.hub": ("Pushed", "push_to_hub"),
    "sharing.hub_results": ("eval_result_files",),
    "sharing.model_card": ("model_card",),
    "sharing.record": ("Sidecars",),
    "training.accelerate_loop": ("Fitted", "fit"),
    "auditing.recipes": ("Recipe", "StudentTuner"),
    "training.attach": ("attach_remos",),
    "training.reporting": ("log_defects",),
    "auditing.data_files": ("read_data",),
    "training.effect_search": ("EffectSearch",),
    "training.ratio_search": ("RatioSearch",),
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
