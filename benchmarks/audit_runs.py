"""What the benchmarks of defects share: an audit's settings, each run in several processes, and their reports together.

No benchmark of its own: see text_defects.py, image_defects.py and seven_defects.py.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from remos_hf import DefectReport

EXAMPLES = Path(__file__).parents[1] / "examples"
BUDGETS = (0.02, 0.05, 0.1)  # accuracy on dev


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add how to run, and where to write."""
    parser.add_argument("--processes", type=int, default=2, help="that share the work, one thread each")
    parser.add_argument("--report_only", action="store_true", help="put together what is done")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results") / output)


def run_settings(script: str, settings: Mapping[str, Sequence[str]], args: argparse.Namespace) -> DefectReport | None:
    """Run an example on each setting in a folder of its name, and put the reports together; None if nothing is done.

    Args:
        script: File in examples/.
        settings: The script's arguments by name of the setting. What is given twice counts as given last.
        args: With `processes`, `report_only` and `work_dir`.
    """
    args.work_dir.mkdir(parents=True, exist_ok=True)
    report = None
    for name, options in settings.items():
        folder = args.work_dir / name
        if args.report_only and not (folder / "cells").is_dir():
            continue
        command = [sys.executable, str(EXAMPLES / script), *map(str, options), "--output_dir", str(folder)]
        start = time.time()
        if args.report_only:
            _run([*command, "--report_only"], 1, folder)
        else:
            _run(command, args.processes, folder)
        print(f"{name}: {time.time() - start:.0f} s")
        one = DefectReport.load(folder / "report.json")
        report = one if report is None else report + one
    return report


def _run(command: list[str], processes: int, log: Path) -> None:
    # A second thread that waits by spinning makes shared cores slower.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = []
    for process in range(processes):
        with log.with_suffix(f".{process}.log").open("a") as file:
            started.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))  # noqa: S603
    codes = [one.wait() for one in started]
    if any(codes):
        sys.exit(f"{' '.join(command)} failed; see {log}.*.log")


def write(report: DefectReport | None, output: Path, heading: str, budgets: Sequence[float] = BUDGETS) -> None:
    """Write the report as JSON and as tables, below a heading."""
    if report is None:
        sys.exit("Nothing was run.")
    report.save(output.with_suffix(".json"))
    output.with_suffix(".md").write_text(f"{heading}\n\n{report.to_markdown(budgets=budgets)}")
    print(f"{len(report.records)} records; plain fine-tuning does not inherit: {report.not_inheriting()}")
