"""What an audit's folder was asked for: more of it may be asked for later, but nothing else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remos_hf.auditing.audit import Audit
from remos_hf.errors import RemosError
from remos_hf.whole import replace_file

_SETTINGS_FILE = "settings.json"


def settle_settings(audit: Audit, folder: Path) -> None:
    """Refuse to go on with another audit, and write down what this one asks for.

    Raises:
        RemosError: The folder holds an audit with other settings.
    """
    check_settings(audit, folder)
    replace_file(folder / _SETTINGS_FILE, (json.dumps(audit.to_dict(), indent=1) + "\n").encode())


def check_settings(audit: Audit, folder: Path) -> None:
    """Refuse to go on with another audit.

    Raises:
        RemosError: The folder holds an audit with other settings.
    """
    asked = json.loads(json.dumps(audit.to_dict()))
    path = folder / _SETTINGS_FILE
    held = json.loads(path.read_text()) if path.is_file() else asked
    before, now = _what_cells_hold(held), _what_cells_hold(asked)
    # More students, defects or seeds add cells; everything else would mix numbers that do not compare.
    for key in ("students", "defects"):
        now[key] = {name: one for name, one in now[key].items() if name in before[key]}
    curves, wanted = before.pop("reactivation"), now.pop("reactivation")
    # More counts make every curve anew.
    if curves and wanted and not set(curves["counts"]) < set(wanted["counts"]):
        before["reactivation"], now["reactivation"] = curves, wanted
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differing:
        raise RemosError(
            f"{folder} holds an audit with other settings ({', '.join(differing)} differ). Use another folder, or ask "
            "for the same audit to go on with it; students, defects and seeds may be added, not left out."
        )


def _what_cells_hold(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings that decide what is in the cells; which there are, and which seeds, may grow."""
    plans = settings["students"]
    held = {key: value for key, value in settings.items() if key != "seeds"}
    held["students"] = {
        name: {key: one for key, one in plan.items() if key not in ("reactivate", "defects")}
        for name, plan in plans.items()
    }
    asked = any(plan["reactivate"] for plan in plans.values())
    retuning = {key: value for key, value in settings["reactivation"].items() if key != "seeds"}
    held["reactivation"] = retuning if asked else None
    return held
