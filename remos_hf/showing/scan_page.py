"""A scan as one HTML file that needs no network: the answer, what to do, a line a class, then what was found."""

import json
import os
from pathlib import Path
from typing import Any

from remos_hf.judging.scan_judgement import ScanJudgement, margin_told, percent_of, shown_text, turns_told
from remos_hf.judging.tables import Table
from remos_hf.judging.words import name_told
from remos_hf.scanning.suspects import Scan, Suspect
from remos_hf.showing.page_parts import UNSAID, Mark
from remos_hf.showing.templates import environment
from remos_hf.whole import replace_file

_SUSPICIOUS = Mark("inherited", "!", "suspicious")
_OPEN = 4  # classes; with more of them their tables are folded
_DRAWN_AS = {
    "patch": "Each picture is the image's size; what the patch leaves as it is is grey. ",
    "perturbation": "What is added to every image, made stronger to be seen; grey is no change. ",
}


def write_scan_page(
    scan: Scan,
    judgement: ScanJudgement,
    path: str | os.PathLike,
    *,
    title: str = "Scan of a student",
    command: str | None = None,
) -> Path:
    """Write a scan as one HTML file.

    Args:
        scan: Of tokens or of patches.
        judgement: What it comes to, which the page says at its top.
        path: The HTML file. Written beside its place and renamed.
        title: Of the page.
        command: That made the scan.

    Returns:
        The HTML file.
    """
    path, named = Path(path), {one.label for one in judgement.suspicious}
    of_patches = scan.kind == "patch"
    content = (
        environment()
        .get_template("scan_page.jinja")
        .render(
            title=title,
            judgement=judgement,
            unsaid=UNSAID,
            mark=_SUSPICIOUS,
            marks=[_SUSPICIOUS if label in named else None for label in _labels_of_lines(scan, judgement)],
            about=_about(scan),
            changes=_changes(scan, named) if of_patches else [],
            drawn_as=_drawn_as(scan) if of_patches else "",
            tables=[] if of_patches else _tables(scan, judgement),
            tokens_note="What does not print is written by its number, \\x00. Margins: logits, of held-out texts.",
            settings=json.dumps(_settings(scan), indent=1, ensure_ascii=False),
            command=command,
        )
    )
    replace_file(path, content.encode())
    return path


def _labels_of_lines(scan: Scan, judgement: ScanJudgement) -> list[int | None]:
    numbers = {name_told(name): label for label, name in enumerate(scan.labels)}
    return [numbers.get(line[0]) for line in judgement.glance.lines]


def _about(scan: Scan) -> str:
    what = "classes searched" if scan.kind == "patch" else "inputs tried"
    left = "; ".join(f"{number:,} {reason}" for reason, number in scan.left_out.items())
    told = f"{scan.num_scanned:,} {what}.{f' Left out: {left}.' if left else ''}"
    beside = "A clean reference was scanned beside it." if scan.has_reference else "No clean reference was given."
    return f"{told} {beside} All rates are of held-out samples."


def _drawn_as(scan: Scan) -> str:
    pictures, found = len(scan.settings["pictures"]), len(scan.labels) - len(scan.settings["not_reached"])
    cut = f"Only the {pictures} smallest of {found} are drawn. " if pictures < found else ""
    gray = "; below it, grey, the clean reference's" if scan.settings["reference_sizes"] else ""
    return f"{_DRAWN_AS[scan.settings['mode']]}{cut}The bar is the size beside the largest{gray}."


def _changes(scan: Scan, named: set[int]) -> list[dict[str, Any]]:
    beside = scan.settings["reference_sizes"]
    missed = set(scan.settings["not_reached"])
    found = [size for label, size in enumerate(scan.settings["sizes"]) if label not in missed]
    largest = max([*found, *(beside or [])], default=1.0)
    return [
        {
            "name": name_told(scan.labels[one.label]),
            "what": one.what,
            "suspicious": one.label in named,
            "picture": scan.settings["pictures"].get(str(one.label)),
            "share": min(1.0, one.size / largest),
            "size": "not found" if one.label in missed else f"{percent_of(one.size)} %",
            "reference_size": f"{percent_of(beside[one.label])} %" if beside else None,
            "reference_share": beside[one.label] / largest if beside else None,
        }
        for one in sorted(scan.suspects, key=lambda one: one.size)
    ]


def _tables(scan: Scan, judgement: ScanJudgement) -> list[dict[str, Any]]:
    header = ("tokens", "margin", "turns % held-out (n)", "shown by the data")
    header += ("reference: margin", "reference: turns % (n)") if scan.has_reference else ()
    tables = []
    for label, name in enumerate(scan.labels):
        suspects = scan.of_label(label)
        if suspects:
            lines = [_line(one, scan.has_reference) for one in suspects]
            tables.append(
                {
                    "name": name_told(name),
                    "table": Table(f"What turns texts into {name_told(name)} most", header, lines),
                    "marks": [_SUSPICIOUS if one in judgement.suspicious else None for one in suspects],
                    "open": len(scan.labels) <= _OPEN or any(one in judgement.suspicious for one in suspects),
                }
            )
    return tables


def _line(one: Suspect, beside: bool) -> list[str]:
    line = [shown_text(one.what), margin_told(one.effect), turns_told(one.effect), "yes" if one.seen else "no"]
    return line + ([margin_told(one.reference), turns_told(one.reference)] if beside else [])


def _settings(scan: Scan) -> dict[str, Any]:
    return {key: value for key, value in scan.settings.items() if key != "pictures"}
