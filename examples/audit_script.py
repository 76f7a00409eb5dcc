"""What the two audit scripts share: which students are made, how all are trained, and a run up to its report."""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from torch import nn
from transformers.utils import logging as hf_logging

from remos_hf import (
    Audit,
    Defect,
    ImageTask,
    Reactivation,
    StudentPlan,
    TextTask,
    report_of,
    run_audit,
    standard_students,
    with_new_head,
)
from remos_hf.auditing.recipes import Recipe, StudentTuner


def add_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add what both scripts take; `defaults` says by name what differs between them."""
    what = parser.add_argument_group("defects and students")
    what.add_argument("--defects", nargs="+")
    what.add_argument(
        "--curves_for", nargs="*", help="defects that get all slice ratios (others the first); default all"
    )
    what.add_argument("--students", nargs="+", help="names, as --plan gives them; default all")
    what.add_argument("--slice_ratios", nargs="+", type=float)
    what.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    what.add_argument("--target_label", type=int)
    what.add_argument("--poison_rate", type=float)
    what.add_argument("--num_attacked", type=int, help="test samples that found defects start from")
    what.add_argument("--reactivate", nargs="*", type=int, default=[0, 5, 20, 50], help="numbers of poisoned samples")
    what.add_argument("--num_reactivated", type=int, default=250, help="exposed samples to measure re-activation on")
    what.add_argument("--reactivated_seeds", nargs="*", type=int, help="seeds whose students are re-tuned; default all")

    train = parser.add_argument_group("training")
    train.add_argument("--learning_rate", type=float)
    train.add_argument(
        "--high_lr_factor", type=float, default=3.0, help="of the rival that only learns faster; at least 3"
    )
    train.add_argument("--epochs", type=float)
    train.add_argument("--batch_size", type=int)
    train.add_argument("--teacher_learning_rate", type=float)
    train.add_argument("--teacher_epochs", type=float)
    train.add_argument("--eval_batch_size", type=int)
    train.add_argument("--bf16", action="store_true")
    train.add_argument("--use_cpu", action="store_true")

    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1], help="dev accuracy rules may cost"
    )
    parser.add_argument("--keep_students", action="store_true", help="save them, so that defects can be added later")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--report_only", action="store_true", help="report what is done, and stop")
    parser.add_argument("--smoke", action="store_true", help="a tiny teacher and a toy task, offline, in seconds")
    parser.set_defaults(**defaults)


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    args = parser.parse_args(argv)
    if args.high_lr_factor < 3:
        parser.error(
            f"--high_lr_factor is the honest rival's learning rate, at least 3 times, but got {args.high_lr_factor}"
        )
    return args


def made(names: Sequence[str], makers: Mapping[str, Callable[[], Defect]]) -> dict[str, Defect]:
    """Give the defects of these names."""
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise SystemExit(f"--defects takes {', '.join(makers)}, but got {unknown[0]!r}.")
    return {name: makers[name]() for name in names}


def chosen_students(args: argparse.Namespace, found: Sequence[str], *, rows: bool = False) -> dict[str, StudentPlan]:
    """Give the students by name: what decides whether slicing is worth it, and ReMoS.

    Args:
        args: The command line.
        found: Defects that are searched, not implanted: they get all slice ratios whatever --curves_for says.
        rows: Also fine-tuning with the embedding rows of unseen tokens reset.
    """
    curves = args.defects if args.curves_for is None else [*args.curves_for, *set(args.defects) & set(found)]
    students = standard_students(
        args.slice_ratios,
        high_lr_factor=args.high_lr_factor,
        curves_for=[name for name in args.defects if name in curves],
        rows=rows,
        reactivate=bool(args.reactivate),
    )
    unknown = [name for name in args.students or () if name not in students]
    if unknown:
        raise SystemExit(f"--students takes {', '.join(map(repr, students))}, but got {unknown[0]!r}.")
    return {name: plan for name, plan in students.items() if args.students is None or name in args.students}


def put_together(
    args: argparse.Namespace,
    task: TextTask | ImageTask,
    data: Mapping[str, Dataset],
    *,
    defects: Mapping[str, Defect],
    students: Mapping[str, StudentPlan],
    teacher: str | Path,
    load_teacher: Callable[[int], nn.Module],
    num_labels: int,
) -> Audit:
    """Put the audit together.

    Args:
        args: The command line.
        task: How inputs are read.
        data: The four parts.
        defects: By name.
        students: By name.
        teacher: Where it comes from.
        load_teacher: From a seed to a model with a head for the attacker's classes.
        num_labels: The students' classes.
    """
    common = (args.batch_size, args.eval_batch_size, args.bf16, args.use_cpu)
    texts = isinstance(task, TextTask)
    recipe = Recipe(args.learning_rate, args.epochs, *common, texts=texts, curve=True)
    settings: dict[str, Any] = {"teacher": Path(teacher).name}
    for name in ("learning_rate", "epochs", "batch_size", "teacher_learning_rate", "teacher_epochs", "high_lr_factor"):
        settings[name] = getattr(args, name)
    return Audit(
        name=args.name,
        task=task,
        **data,
        defects=defects,
        students=students,
        seeds=args.seeds,
        load_teacher=load_teacher,
        teacher_args=Recipe(args.teacher_learning_rate, args.teacher_epochs, *common, texts=texts).arguments,
        start_student=lambda model, seed: with_new_head(model, num_labels, seed=seed),
        fine_tune=StudentTuner(task, recipe.arguments),
        settings=settings,
        reactivation=Reactivation(
            counts=tuple(args.reactivate) or (0,),
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            num_exposed=args.num_reactivated,
            seeds=None if args.reactivated_seeds is None else tuple(args.reactivated_seeds),
        ),
    )


def run(
    args: argparse.Namespace,
    audit_of: Callable[[argparse.Namespace], Audit],
    smoke_inputs: Callable[[argparse.Namespace], argparse.Namespace],
    *,
    workers: int = 1,
) -> None:
    """Run the audit, or tell its plan, and write its report.

    Args:
        args: The command line.
        audit_of: Puts the audit together.
        smoke_inputs: Writes a tiny teacher and a toy task, and points the arguments at them.
        workers: Processes that search for found defects.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    audit = audit_of(smoke_inputs(args) if args.smoke else args)
    if args.plan:
        print(json.dumps(audit.to_dict(), indent=1))
        to_make = report_of(audit, args.output_dir).settings["missing"][audit.name]
        print(f"Students to fine-tune, or to measure on what was added: {to_make}")
        return
    report = (
        report_of(audit, args.output_dir)
        if args.report_only
        else run_audit(audit, args.output_dir, workers=workers, keep_students=args.keep_students)
    )
    report.save(args.output_dir / "report.json")
    (args.output_dir / "report.md").write_text(report.to_markdown(budgets=args.budgets))
    print(report.to_markdown(budgets=args.budgets))
