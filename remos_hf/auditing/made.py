"""How a student was made, as the records of a report tell it: what decides its kind, and what its table shows."""

from collections.abc import Mapping
from typing import Any

from remos_hf.errors import CorruptFileError
from remos_hf.sharing.record import CONFIG_FILE
from remos_hf.strategies import STRATEGIES

_RULES = {kind.__name__: kind.rule for kind in STRATEGIES.values() if isinstance(getattr(kind, "rule", None), str)}


def made_by(strategy: Mapping[str, Any], lr_factor: float, seed: int | None) -> dict[str, Any]:
    """Describe how a student was made.

    Args:
        strategy: As `Strategy.to_dict` gives it.
        lr_factor: Its learning rate over plain fine-tuning's.
        seed: Of the run; what the strategy drew has another one if it names its own.

    Returns:
        JSON values: "strategy", "lr_factor", "seed"; and where weights were chosen "rule", in words, and "slice_ratio".
    """
    parts = strategy.get("strategies") or [strategy]
    slicing = next((one for one in parts if one.get("slice_ratio") is not None), None)
    named = (slicing or strategy).get("seed")
    facts: dict[str, Any] = {
        "strategy": dict(strategy),
        "lr_factor": lr_factor,
        "seed": seed if named is None else named,
    }
    if slicing is not None:
        rule, scope = _RULES.get(slicing["name"], slicing["name"].lower()), slicing.get("scope", "model")
        told = f"{rule}, {scope} scope" if rule == "remos" or scope != "model" else rule
        told += ", rows mean" if slicing.get("embedding_rows", "keep") != "keep" else ""
        told += f", lr x{lr_factor:g}" if lr_factor != 1 else ""
        held = "".join(f" + {one['name']}" for one in parts if one is not slicing)
        facts |= {"rule": told + held, "slice_ratio": slicing["slice_ratio"]}
    return facts


def made_by_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe how a student was made by the record that lies beside it.

    Args:
        config: Contents of `remos_config.json`, as `Sidecars.load` gives it.

    Returns:
        As `made_by`, "learning_rate" if it was recorded, and what the strategy did.

    Raises:
        CorruptFileError: The record describes no strategy.
    """
    strategy, training, held = config["strategy"], config.get("training") or {}, config.get("slice") or {}
    parts = strategy.get("strategies") or [strategy]
    if not isinstance(parts, list) or not all(map(_is_described, parts)):
        raise CorruptFileError(f"The strategy in {CONFIG_FILE} is none that was written here: {str(strategy)[:200]}.")
    seed = training.get("seed")
    facts = made_by(strategy, 1.0, seed if isinstance(seed, int) else None)
    facts["share_kept"], facts["squares_reset"] = held.get("share_kept"), held.get("squares_reset")
    facts["rows_reset"] = config.get("embedding_rows_reset", 0)
    facts["share_never_covered"] = (config.get("coverage") or {}).get("share_never_covered")
    facts["competing"] = config.get("competing")
    facts["start"], facts["finish"] = config.get("start", {}), config.get("finish", {})
    rate = training.get("learning_rate")
    return {**facts, "learning_rate": rate} if _is_number(rate) else facts


def _is_described(part: Any) -> bool:  # noqa: ANN401 - from a file
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
        return False
    return part.get("slice_ratio") is None or _is_number(part["slice_ratio"])


def _is_number(value: Any) -> bool:  # noqa: ANN401 - from a file
    return isinstance(value, (int, float)) and not isinstance(value, bool)
