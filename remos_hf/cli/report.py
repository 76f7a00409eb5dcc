"""`remos report`: pictures and tables from a report's JSON, again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remos_hf.cli.answer import answered
from remos_hf.cli.options import ReportOptions
from remos_hf.judging.judgement import BUDGETS
from remos_hf.judging.report import DefectReport
from remos_hf.showing.given_maps import read_maps
from remos_hf.showing.page import write_html
from remos_hf.whole import replace_file


def run(asked: ReportOptions, progress: bool) -> tuple[Any, ...]:
    """Render a report; give what is told, as JSON values and as text, and the exit status if it is another than 0."""
    if not asked.report.is_file():
        raise FileNotFoundError(f"There is no file {asked.report}. `remos audit` writes report.json.")
    maps = [one for path in asked.maps for one in read_maps(path)]
    report = DefectReport.load(asked.report)
    files = report_files(report, asked.report, output=asked.output, title=asked.title, maps=maps)
    told = {name: str(path) for name, path in files.items()}
    said, text, status = answered(report)
    return {**told, **said}, f"{text}\n\nSaved {', '.join(told.values())}", *status


def report_files(
    report: DefectReport,
    beside: Path,
    *,
    output: Path | None = None,
    title: str | None = None,
    maps: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Path]:
    """Write a report as HTML, as Markdown and as pictures.

    Args:
        report: The report.
        beside: Its JSON: the files get its name.
        output: The HTML file, if it has another place; the others go beside it.
        title: Of the page.
        maps: As `write_html` takes them.

    Returns:
        The files by kind: "html", "md", and "pictures", a folder.
    """
    html = output or beside.with_suffix(".html")
    pictures = html.with_name(f"{html.stem}_pictures")
    write_html(report, html, pictures=pictures, title=title, maps=maps, source=beside.name)
    text = html.with_suffix(".md")
    replace_file(text, report.to_markdown(budgets=BUDGETS).encode())
    return {"html": html, "md": text, "pictures": pictures}
