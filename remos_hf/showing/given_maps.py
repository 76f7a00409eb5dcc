"""Maps that a page is given: read beside their file, checked, with their share in the trigger."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remos_hf.errors import CorruptFileError
from remos_hf.judging.tables import Table

PNG = b"\x89PNG\r\n\x1a\n"


def read_maps(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read what `write_html` takes as `maps` from a JSON file.

    Args:
        path: A file with the key "maps", entries as `write_html` takes them. Each "png" is the name of a picture that
            lies beside the file.

    Returns:
        The entries, with the pictures' paths.

    Raises:
        CorruptFileError: The file holds no such entries, or names a picture elsewhere.
    """
    path = Path(path)
    try:
        entries = [dict(one) for one in json.loads(path.read_text())["maps"]]
        for one in entries:
            if Path(one["png"]).name != one["png"]:
                raise ValueError(f"{one['png']!r} is not the name of a picture beside it")
            one["png"] = path.with_name(one["png"])
            if not isinstance(one["title"], str) or not isinstance(one.get("share", {}), dict):
                raise ValueError(f"a map's title or share is of another type, with {one['png'].name}")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path} holds no maps for a report ({error!r}). A list 'maps' of entries with 'title' and 'png' is wanted."
        ) from error
    return entries


def map_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check a map and give what the page shows of it.

    Raises:
        ValueError: It lacks its title or its picture, or the picture is no PNG file.
    """
    if not isinstance(given.get("title"), str) or "png" not in given:
        raise ValueError(f"A map has a 'title' and a 'png', bytes or a path, but got the keys {sorted(given)}.")
    png = given["png"]
    content = bytes(png) if isinstance(png, bytes | bytearray) else Path(png).read_bytes()
    if content[:8] != PNG:
        raise ValueError(f"The picture of map {given['title']!r} is no PNG file. pictures.overlay() writes one.")
    share = given.get("share") or {}
    counted = share.get("num_samples", share.get("n"))
    caption = " ".join(str(given.get("caption") or "").split())
    if "n = " not in caption:
        told = "not given" if counted is None else f"{counted} samples"
        caption = f"{caption}{' ' if caption else ''}(n = {told})"
    return {
        "title": given["title"],
        "png": content,
        "caption": caption,
        "alt": f"Images with maps over them: {given['title']}",
        "table": _share_table(share),
    }


def _share_table(share: Mapping[str, Any]) -> Table | None:
    """Give the share of the maps' mass inside the trigger, beside the trigger's share of the area."""
    if not share:
        return None
    lines = []
    # One share, or several by name: of the teacher, of each student.
    named = share if all(isinstance(one, Mapping) for one in share.values()) else {"all": share}
    for name, one in named.items():
        cells = ["-" if one.get(key) is None else f"{100 * one[key]:.1f}" for key in ("value", "low", "high", "chance")]
        interval = f"{cells[0]} [{cells[1]}, {cells[2]}]" if one.get("low") is not None else cells[0]
        counts = [str(one.get(key, "-")) for key in ("num_samples", "num_without_mass")]
        lines.append([name, interval, cells[3], *counts])
    header = ("of", "mass inside the trigger % [95 %]", "by chance (area) %", "n", "without mass")
    return Table("Share of the maps' mass inside the trigger", header, lines)
