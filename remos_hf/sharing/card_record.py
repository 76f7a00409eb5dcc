"""What a card says of the record: how the student was started and trained, where it comes from, how it is loaded."""

import json
import re
from collections.abc import Mapping
from typing import Any

from remos_hf.judging.kinds import PLAIN, kind_of
from remos_hf.sharing.card_measured import record_part
from remos_hf.sharing.card_text import as_code, as_text, fenced_block, markdown_table
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.competition import Account
from remos_hf.strategies.base import share_by_group

# By what a model's class ends in: the Hub's pipeline, and the end of transformers' AutoModel.
HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
}
_WHY = {
    "Remos": "ReMoS keeps the weights that the task's own data covers and that the teacher did not make large, and "
    "resets the others before training. The idea: a defect needs weights of the teacher, and the task does not need "
    "all of them. Whether it holds here is what was measured below, or was not.",
    "Finetune": "Every weight that was not reset started as the teacher's.",
    "Retrain": "Every weight was given up. Only the architecture is the teacher's.",
    "TopMagnitude": "The largest weights were reset, whatever the data. It is a comparison: ReMoS without coverage.",
    "MagPrune": "The smallest weights were reset, whatever the data. It is a comparison.",
    "Random": "Random weights were reset, whatever the data. It is the comparison that any rule has to beat.",
    "RelativeUpdate": "A copy was fine-tuned first, and the weights that it moved least for their size were reset.",
    "NNSlicer": "The answers of a head trained on the frozen teacher were traced back through the operations that made "
    "them, and the weights that contributed least to them on the task's own data were reset.",
    "Relevance": "It is ReMoS with another coverage: how strongly the task's own data activates a weight's neurons, or "
    "the gradient of its loss.",
    "SeaM": "Which weights are kept was learned on the task's own data; the others were reset.",
    "OwnBackdoors": "Backdoors of the defender's own were put into copies of the teacher, and the channels that they "
    "changed most were reset.",
    "Subspace": "Every layer was rebuilt before training on the directions of its inputs that the task's own data "
    "shows, fitted to what the teacher's layer makes of that data; what lies along the others was given up (with a "
    "ridge: damped). The idea: a defect lies where the data does not look. Whether it holds here is what was measured "
    "below, or was not.",
    "Guided": "While it trained, part of every batch was moved a step along the teacher's own features, under its true "
    "labels.",
    "Hardened": "While it trained, part of every batch carried perturbations that all inputs share and that grew "
    "against the student, under its true labels.",
    "Distilled": "While it trained, its features were held to the teacher's on the task's clean data.",
    "RepairRows": "When it was trained, the embedding rows that turn it most, of tokens that the task's data never "
    "shows, were overwritten with those of other such tokens.",
    "L2SP": "L2-SP held the weights near the teacher's while they trained: it keeps what the teacher knows, its "
    "defects included.",
    "Delta": "DELTA held its features near the teacher's while it trained, channel by channel: it keeps what the "
    "teacher knows, its defects included.",
    "DeltaR": "It started from fresh weights and learned the teacher's features on the task's own data: no weight is "
    "the teacher's, and what its features show on that data may come along.",
    "Renofeation": "It started from fresh weights and learned the teacher's features on the task's own data, under "
    "dropout and an average of its weights: no weight is the teacher's, and what its features show on that data may "
    "come along.",
    "FeatureLwF": "Its first steps trained the head alone; in those after them all of it trained, its last feature "
    "held near the teacher's: it keeps what the teacher knows, its defects included.",
    "Recipe": "The teacher's pre-training was gone on with on the task's own texts first, at a price on the norms of "
    "the first matrices of its MLPs.",
    "DiSec": "Rows of the last blocks that stand out in the gradient on the task's own data were given the mean of "
    "the others before it trained.",
    "Crow": "While it trained, each block might change what it reads only little, on moved embeddings too.",
    "AdversarialTraining": "While it trained, every input was moved, within a budget, to where the model itself found "
    "it hardest, under its true label.",
    "Neft": "Its last units alone were trained, on the task's inputs as they are (with beta: each of their layers at a "
    "set operator norm), to keep what a robust teacher holds against attacks. The units before them are the teacher's, "
    "its defects included.",
}
_PLAIN = (
    "Nothing was sliced: this is plain fine-tuning, and every weight started as the teacher's. Nothing was done "
    "against inheriting its defects. It is what others are compared with."
)
_ROWS = (
    "The embedding rows of tokens that the task's data never shows were reset: a trigger word that is one of them "
    "loses what the teacher knew of it."
)
# Names of facts are written as they are: a record, which is a stranger's, chooses among ours.
_SEARCHED = {"slice_ratio": "slice ratio", "energy": "energy", "k": "k"}
_TRAINED = {
    "learning_rate": "learning rate",
    "lr_scheduler": "its scheduler",
    "warmup_steps": "warm-up steps",
    "optimizer": "optimizer",
    "weight_decay": "weight decay",
    "max_grad_norm": "largest norm of the gradient",
    "epochs": "epochs",
    "batch_size": "batch size of one process",
    "gradient_accumulation_steps": "batches accumulated for a step",
    "processes": "processes",
    "seed": "seed",
    "precision": "precision",
    "steps": "steps taken",
    "planned_steps": "of steps planned",
    "best_step": "step of the weights, the best evaluated",
}


def is_untrained(record: Sidecars) -> bool:
    """Whether the weights were sliced on disk and never trained: then no model was there to be described."""
    config = record.config
    return "slice" in config and "student" not in config and not record_part(record, "training").get("steps")


def described(record: Sidecars, task: str, learning_rate_factor: float = 1.0) -> str:
    """Say in one sentence what the model is.

    Args:
        record: How it came to be.
        task: What it was trained for; "" where nobody said.
        learning_rate_factor: Of plain fine-tuning's learning rate, where a report says so.
    """
    teacher = as_text(record_part(record, "teacher").get("id") or "a teacher that the record does not name")
    strategy = record_part(record, "strategy")
    ratio, factor = strategy.get("slice_ratio"), learning_rate_factor
    how = "a strategy that the record does not name"
    if strategy.get("name"):
        how = as_text(kind_of({"strategy": strategy}).name)
    how += f", keeping {100 * ratio:g} % of the weights that compete" if _is_number(ratio) else ""
    how += f", at {factor:g} times the learning rate" if factor != 1 else ""
    if is_untrained(record):
        return f"{teacher}, sliced by {how}, and not trained since: what it was cut to be fine-tuned from, no student."
    training = record_part(record, "training")
    stopped = ""
    if training.get("steps", 0) < training.get("planned_steps", 0):
        stopped = f" Training has taken {training['steps']:,} of {training['planned_steps']:,} steps."
    return f"A student of {teacher}{f' for {as_text(task)}' if task else ''}, made by {how}.{stopped}"


def why(record: Sidecars) -> str:
    """Say what each part of the strategy does."""
    strategy = record_part(record, "strategy")
    if kind_of({"strategy": strategy}) is PLAIN:
        return _PLAIN
    parts = [one for one in strategy.get("strategies") or [strategy] if isinstance(one, Mapping)]
    told = [_WHY[one["name"]] for one in parts if one.get("name") in _WHY]
    told += [_ROWS] if any(one.get("embedding_rows", "keep") != "keep" for one in parts) else []
    return " ".join(told) or "How it was started is what the strategy below says."


def slicing_facts(record: Sidecars) -> list[tuple[str, object]]:
    """Give how the slice was asked for, and what it came to."""
    strategy, sliced = record_part(record, "strategy"), record_part(record, "slice")
    coverage = record_part(record, "coverage")
    facts = [("strategy", strategy.get("name", "not recorded"))]
    if "slice_ratio" in strategy:
        facts.append(("slice ratio (share of the weights to keep)", f"{strategy['slice_ratio']}"))
    facts += _searched(record)
    if "share_kept" in sliced:
        facts.append(("share kept", f"{100 * sliced['share_kept']:.2f} %"))
    if {"num_kept", "num_weights"} <= sliced.keys():
        facts.append(("weights kept", f"{sliced['num_kept']:,} of {sliced['num_weights']:,}"))
    if sliced.get("squares_reset") is not None:
        facts.append(("what was reset held", f"{100 * sliced['squares_reset']:.1f} % of the squared weights"))
    facts += [(key.replace("_", " "), strategy[key]) for key in ("scope", "reset_to") if key in strategy]
    if sliced.get("tie_group", 1) > 1:
        facts.append(("tied at the threshold, cut together", f"{sliced['tie_group']:,} weights"))
    if coverage.get("criterion"):
        facts.append(("coverage criterion", _named(coverage["criterion"])))
    if coverage.get("share_never_covered") is not None:
        facts.append(("neurons that no sample covered", f"{100 * coverage['share_never_covered']:.1f} %"))
    if record.config.get("embedding_rows_reset"):
        facts.append(("embedding rows reset", f"{record.config['embedding_rows_reset']:,}"))
    adapters = record_part(record, "adapters")
    if adapters:
        facts.append(("adapters", f"{adapters.get('kind')}, {adapters.get('saved')}"))
    competing = record_part(record, "competing")
    return [*facts, *([("what competes", str(Account.from_dict(competing)))] if competing else [])]


def _searched(record: Sidecars) -> list[tuple[str, object]]:
    """Give how a setting was chosen, where nobody named it."""
    facts: list[tuple[str, object]] = []
    for key, named in (("ratio_search", "slice_ratio"), ("effect_search", "setting")):
        search = record_part(record, key)
        chosen, lost, kept = (search.get(name) for name in (named, "effect_budget", "accuracy_budget"))
        knob = str(search.get("knob", named))
        if not (_is_number(chosen) and _is_number(kept)) or knob not in _SEARCHED:
            continue
        triggers = f"own triggers within {100 * lost:g} points of untaught ones, " if _is_number(lost) else ""
        told = f"{chosen:g}: {triggers}accuracy within {100 * kept:g} points of plain fine-tuning's"
        facts.append((f"{_SEARCHED[knob]} chosen by trials", told))
    return facts


def _named(criterion: Mapping[str, Any]) -> str:
    """Write a criterion by its name, with its settings where it has some."""
    settings = [f"{key} {value}" for key, value in criterion.items() if key != "name"]
    return f"{criterion.get('name')} ({', '.join(settings)})" if settings else str(criterion.get("name"))


def training_facts(record: Sidecars) -> list[tuple[str, object]]:
    """Give the hyper-parameters of training; none where they were not recorded."""
    training = record_part(record, "training")
    return [(words, training[key]) for key, words in _TRAINED.items() if key in training]


def layers_table(record: Sidecars) -> str:
    """Render the share kept of each group of layers."""
    if record.relevant_slice is None:
        return "No slice was recorded." if "slice_ratio" in (record_part(record, "strategy")) else "Nothing was sliced."
    groups = share_by_group(record.relevant_slice)
    return markdown_table(
        ("layer group", "share kept %"), [(as_text(name), f"{100 * share:.1f}") for name, share in groups.items()]
    )


def origin_facts(record: Sidecars, weights: str | None) -> list[tuple[str, object]]:
    """Give the teacher, the data that decided the slice, and what identifies the weights."""
    teacher, coverage = record_part(record, "teacher"), record_part(record, "coverage")
    facts = [
        ("teacher", teacher.get("id") or "not recorded"),
        ("its revision", teacher.get("revision") or "not recorded"),
        ("its licence, as its card says", teacher.get("license") or "not recorded"),
        ("hash of its sliced weights", teacher.get("hash") or "not recorded"),
    ]
    if weights is not None:
        facts.append(("hash of these weights, without their names", weights))
    if coverage:
        facts += [
            ("samples that decided the coverage", _samples_told(coverage)),
            ("their fingerprint", coverage.get("data_fingerprint") or "not recorded"),
        ]
    else:
        facts.append(("data that decided the slice", "none"))
    seconds = record_part(record, "seconds")
    if seconds:
        facts.append(("time to start it", ", ".join(f"{step} {took:.1f} s" for step, took in seconds.items())))
    versions = record_part(record, "versions")
    facts.append(("made with", ", ".join(f"{name} {one}" for name, one in versions.items()) or "not recorded"))
    return facts


def _samples_told(coverage: Mapping[str, Any]) -> str:
    if coverage.get("num_samples") is None:
        return "not recorded"
    return f"{coverage['num_samples']:,}{' (the most that were asked for)' if coverage.get('capped') else ''}"


def loading(kind: Mapping[str, Any], repo_id: str) -> str:
    """Say how a model of a recorded class is loaded, and its record."""
    record = f'from remos_hf import Sidecars\n\nrecord = Sidecars.from_pretrained("{repo_id}")'
    if kind.get("library", "transformers") == "transformers":
        head = next((head for head in HEADS if str(kind.get("class", "")).endswith(head)), "")
        code = f'from transformers import AutoModel{head}\n\nstudent = AutoModel{head}.from_pretrained("{repo_id}")'
        plain = "An ordinary checkpoint; remos_hf is not needed."
    elif kind["library"] == "timm":
        code = (
            "from huggingface_hub import hf_hub_download\nfrom remos_hf import image_classifier\n\n"
            f'weights = hf_hub_download("{repo_id}", "model.safetensors")\n'
            f'student = image_classifier("{as_code(kind.get("architecture"))}", checkpoint_path=weights)'
        )
        plain = (
            "A thin module around timm's. Without remos_hf: the file holds timm's state dict, with `body.` before each "
            "name where a Trainer wrote it."
        )
    else:
        code = (
            "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_model\n\n"
            f'load_model(student, hf_hub_download("{repo_id}", "model.safetensors"))  # a {as_code(kind.get("class"))}'
        )
        plain = "The weights of a torch module: make the module first."
    return f"{plain}\n\n```python\n{code}\n```\n\nHow it came to be, to read and to check:\n\n```python\n{record}\n```"


def reproducing(strategy: Mapping[str, Any], command: str | None) -> str:
    """Render the command that made the student, and its strategy."""
    parts = []
    if command:
        parts.append(fenced_block(re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", command), "bash"))
    else:
        parts.append("The command was not recorded. The strategy was, with all that it was asked for:")
    parts.append(fenced_block(json.dumps(strategy, indent=2), "json"))
    return "\n\n".join(parts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
