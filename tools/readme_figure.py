"""Draw docs/inheritance.png, the figure of the README, from a measured report.

    python tools/readme_figure.py        # `make docs` runs it

Every point is one student of one seed; nothing is pooled, so the figure claims no more than its points show. The
report's hash is written into the PNG: a test sees when the figure is older than its report.
"""

import argparse
import hashlib
import io
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from remos_hf import DefectReport
from remos_hf.showing.palette import looks_of

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks" / "results" / "seven_defects.json"
FIGURE = ROOT / "docs" / "inheritance.png"
DEFECTS = {
    "word": "a rare word (text)",
    "ripples": "poisoned weights (text)",
    "textfooler": "TextFooler (text)",
    "kuleshov": "greedy word swaps (text)",
    "penultimate": "adversarial images, features",
    "coverage": "adversarial images, coverage",
    "latent": "latent backdoor (image)",
}


# By student: its kind, whose look is that of all reports, its words and its line in a row.
STUDENTS = {
    "finetune": ("plain", "plain fine-tuning", 0.27),
    "finetune lr x3": ("faster", "... at 3 times the learning rate", 0.09),
    "random 0.9": ("random", "random reset of 10 %", -0.09),
    "remos 0.9": ("remos", "ReMoS reset of 10 %", -0.27),
}
LOOKS = looks_of({kind: label for kind, label, _ in STUDENTS.values()})


def fingerprint(report: Path = REPORT) -> str:
    """Hash the report that the figure shows."""
    return hashlib.sha256(report.read_bytes()).hexdigest()


def draw(report: DefectReport) -> Figure:
    """Draw a row a defect: how many exposed inputs fail, a point a seed; at its right the price in accuracy."""
    figure = Figure(figsize=(8.3, 2.6))
    axes = figure.add_axes((0.25, 0.165, 0.57, 0.66))
    for row, (defect, told) in enumerate(DEFECTS.items()):
        height = len(DEFECTS) - 1 - row
        axes.axhspan(height - 0.5, height + 0.5, color="0.965" if row % 2 else "white", zorder=0, linewidth=0)
        axes.text(-2, height, told, ha="right", va="center", fontsize=9)
        for number, (student, (kind, label, place)) in enumerate(STUDENTS.items()):
            look = LOOKS[kind]
            found = [one for one in report.records if (one["defect"], one["student"]) == (defect, student)]
            rates = [100 * one["dir"]["value"] for one in found]
            axes.scatter(
                rates,
                [height + place] * len(rates),
                s=32,
                color=look.colour,
                marker=look.marker,
                edgecolors="white",
                linewidths=0.3,
                zorder=3,
                label=label if row == 0 else None,
                clip_on=False,
            )
            accuracy = statistics.fmean(100 * one["acc"]["value"] for one in found)
            axes.text(_place(number), height, f"{accuracy:.0f}", ha="center", va="center", fontsize=9)
    for number, look in enumerate(LOOKS.values()):
        above = len(DEFECTS) - 0.15
        axes.scatter([_place(number)], [above], s=22, color=look.colour, marker=look.marker, clip_on=False)
    axes.text(_place(1.5), len(DEFECTS) + 0.3, "mean accuracy (%)", ha="center", va="bottom", fontsize=8.5)
    axes.set(xlim=(0, 100), ylim=(-0.5, len(DEFECTS) - 0.5), yticks=[])
    axes.tick_params(labelsize=8.5)
    seeds = len({one["seed"] for one in report.records})
    axes.set_xlabel(f"exposed inputs on which the student fails (%): one point = one seed, of {seeds}", fontsize=9)
    axes.grid(axis="x", color="0.87", linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(
        loc="upper left",
        bbox_to_anchor=(0.01, 1.02),
        ncols=4,
        fontsize=8.5,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.1,
    )
    return figure


def _place(number: float) -> float:
    """Give the column of a student's accuracy."""
    return 106.5 + 7 * number


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--output", type=Path, default=FIGURE)
    args = parser.parse_args()
    held = io.BytesIO()
    draw(DefectReport.load(args.report)).savefig(held, dpi=200)
    about = PngInfo()
    about.add_text("Source", fingerprint(args.report))
    Image.open(held).convert("RGB").quantize(128).save(args.output, optimize=True, pnginfo=about)


if __name__ == "__main__":
    main()
