"""What the command `remos` may be asked for: names, options, help, exit codes. What it does is loaded on use.

Exit codes: 0 done; 1 failed, with one line on stderr that says why and what to do; 2 wrong usage; 130 interrupted.
"""

import inspect
import json
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from typer.core import TyperCommand
except ImportError as error:
    raise ImportError("The command remos needs typer: pip install 'remos_hf[cli]'.") from error

# By name, and loaded when a command runs: torch and transformers take seconds, which neither --help nor tab completion
# is worth. No cycle hides here: none of these modules imports this one.
_HOMES = {
    "profile": ("remos_hf.cli.profile", "run"),
    "slice": ("remos_hf.cli.slicing", "run"),
    "train": ("remos_hf.cli.train", "run"),
    "audit": ("remos_hf.cli.audit", "run"),
    "report": ("remos_hf.cli.report", "run"),
    "card": ("remos_hf.cli.publish", "card"),
    "push": ("remos_hf.cli.publish", "push"),
}
# What a caller, a file or a network can do wrong; anything else is our mistake, or a library's.
_EXPECTED = (ValueError, OSError, ImportError)
_SLICING = ("remos", "top_magnitude", "mag_prune", "random")
AUTO = "auto"
# By command; shown below its options.
_EXAMPLES = {
    "profile": (
        "remos profile bert-base-uncased --data train.tsv --output profile",
        "remos profile timm/resnet18.a1_in1k --data flowers/train --max-samples 500 --output profile",
    ),
    "slice": (
        "remos slice bert-base-uncased --coverage profile --slice-ratio 0.9 --output sliced",
        "remos slice ./teacher --data train.tsv --slice-ratio 0.9 --output sliced",
        "remos slice ./teacher --rule random --slice-ratio 0.9 --output random",
    ),
    "train": (
        "remos train bert-base-uncased --train-data train.tsv --eval-data dev.tsv --slice-ratio 0.9 --output student",
        "remos train ./teacher --train-data train.tsv --eval-data dev.tsv --slice-ratio auto --output student",
        "remos train ./teacher --train-data train.tsv --strategy finetune --output plain",
    ),
    "audit": (
        "remos audit bert-base-uncased --data train.tsv --output audit --plan",
        "remos audit ./teacher --data train.tsv --test-data test.tsv --defects word sentence --quick --output audit",
        "remos audit timm/resnet18.a1_in1k --data flowers/train --test-data flowers/test --output audit",
    ),
    "report": (
        "remos report audit/report.json",
        'remos report audit/report.json --output page/index.html --title "MiniLM on SST-2"',
    ),
    "card": (
        "remos card student",
        'remos card student --report audit/report.json --student "remos 0.9" --output student/README.md',
    ),
    "push": (
        "remos push student me/minilm-sst2-remos --dry-run",
        'remos push student me/minilm-sst2-remos --report audit/report.json --student "remos 0.9"',
    ),
}

app = typer.Typer(
    name="remos",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune public models without inheriting their defects: profile and slice a teacher, train a student, "
    "audit what students inherit, publish them.",
)


def _examples(command: str) -> str:
    return "\n\n".join(["Examples:", *_EXAMPLES[command]])


class _SeveralValues(TyperCommand):
    """A command whose options of several values take them as a row of words: --defects word sentence."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Put the option before each of its values."""
        several = {name for one in self.params if getattr(one, "multiple", False) for name in one.opts}
        spread: list[str] = []
        held = None  # the option whose values follow
        for place, word in enumerate(args):
            if word == "--":
                spread += args[place:]
                break
            if word.startswith("-"):
                held = word if word in several else None
                spread += [] if held else [word]
            else:
                spread += [held, word] if held else [word]
        return super().parse_args(ctx, spread)


def _ratio(text: str | None) -> str | None:
    """Refuse what is neither a share nor "auto"."""
    if text is None or text == AUTO:
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise typer.BadParameter(f"is the share of weights kept, above 0 and at most 1, or {AUTO}, but got {text}.")
    return text


def _share(value: float) -> float:
    """Refuse what is no share of weights."""
    if not 0 < value <= 1:
        raise typer.BadParameter(f"is the share of weights kept, above 0 and at most 1, but got {value:g}.")
    return value


def _shares(values: list[float]) -> list[float]:
    """Refuse what are no shares of weights."""
    return [_share(value) for value in values]


_TeacherName = Annotated[
    str,
    typer.Argument(
        metavar="TEACHER", help="Folder or Hub id of a model with safetensors weights; images: timm/ID too."
    ),
]
_DATA = (
    "a csv, tsv, json or jsonl file (also .gz); a folder of class folders of images; or a Hub data set: OWNER/NAME, "
    "OWNER/NAME:SPLIT, OWNER/NAME:CONFIG:SPLIT."
)
_Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result. It has to be new or empty.")]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a teacher on the Hub.")]
_TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text-column", help="The text, or both texts of a pair. Found if only one can be meant."),
]
_LabelColumn = Annotated[str, typer.Option(help="Column of the labels: whole numbers from 0 on.")]
_MaxSamples = Annotated[int | None, typer.Option(min=1, help="Use so many samples of each file, drawn by a seed.")]
_MaxLength = Annotated[int, typer.Option(min=4, help="Tokens kept of each text.")]
_Seed = Annotated[int, typer.Option(min=0, help="Decides every draw. The same seed gives the same result.")]
_Cpu = Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone.")]
_Bf16 = Annotated[bool, typer.Option("--bf16", help="Train in bfloat16 autocast.")]
_Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the files of an earlier result in --output; no other file is touched."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what other libraries say.")]
_Criterion = Annotated[
    Literal["nc", "tknc", "snac"], typer.Option(help="When a sample covers a neuron: above a threshold, top k, strong.")
]
_Report = Annotated[Path | None, typer.Option(help="report.json of an audit, for the figures on the card.")]
_ReportStudent = Annotated[str | None, typer.Option("--student", help="The student's name in the report.")]
_Command = Annotated[str | None, typer.Option(help="What made the student, for the card.")]
_ReportTask = Annotated[str | None, typer.Option("--task", help="The task's name in the report.")]


@app.command(cls=_SeveralValues, epilog=_examples("profile"))
def profile(
    teacher: _TeacherName,
    data: Annotated[str, typer.Option(help=f"The student's data, labels not needed: {_DATA}")],
    output: _Output,
    text_column: _TextColumns = None,
    max_samples: _MaxSamples = None,
    criterion: _Criterion = "nc",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a forward pass.")] = 32,
    max_length: _MaxLength = 128,
    revision: _Revision = None,
    seed: _Seed = 0,
    cpu: _Cpu = False,
    overwrite: _Overwrite = False,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Count which neurons of a teacher the student's data uses.

    Writes remos_coverage.safetensors. Profiles add: those of two files give the profile of both.
    """
    _do(
        "profile",
        as_json,
        debug,
        teacher=teacher,
        data=data,
        output=output,
        text_columns=text_column or [],
        max_samples=max_samples,
        criterion=criterion,
        batch_size=batch_size,
        max_length=max_length,
        revision=revision,
        seed=seed,
        cpu=cpu,
        overwrite=overwrite,
    )


@app.command("slice", cls=_SeveralValues, epilog=_examples("slice"))
def slice_(
    teacher: _TeacherName,
    output: _Output,
    slice_ratio: Annotated[float, typer.Option(callback=_share, help="Share of the weights to keep.")],
    coverage: Annotated[Path | None, typer.Option(help="remos_coverage.safetensors of `remos profile`.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Instead, profile this first: {_DATA}")] = None,
    rule: Annotated[
        Literal["remos", "top_magnitude", "mag_prune", "random"], typer.Option(help="What is kept.")
    ] = "remos",
    reset_to: Annotated[Literal["zero", "init"], typer.Option(help="What the others become.")] = "zero",
    scope: Annotated[
        Literal["model", "layer"], typer.Option(help="All weights compete, or each layer is cut by itself.")
    ] = "model",
    text_column: _TextColumns = None,
    max_samples: _MaxSamples = None,
    criterion: _Criterion = "nc",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a forward pass.")] = 32,
    max_length: _MaxLength = 128,
    revision: _Revision = None,
    seed: _Seed = 0,
    cpu: _Cpu = False,
    overwrite: _Overwrite = False,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Forget what the student's data does not need of a teacher, and save an ordinary checkpoint.

    Any trainer can fine-tune it. The weights are streamed from their files, so a model larger than the memory can be
    sliced; with --data the teacher is profiled first, which holds it in memory whole. With --coverage it is not.
    """
    if rule == "remos" and (coverage is None) == (data is None):
        raise typer.BadParameter("give one of --coverage and --data: the rule remos keeps what the data uses.")
    if rule != "remos" and (coverage is not None or data is not None):
        raise typer.BadParameter(f"the rule {rule} looks at no data: leave out --coverage and --data.")
    _do(
        "slice",
        as_json,
        debug,
        teacher=teacher,
        output=output,
        slice_ratio=slice_ratio,
        coverage=coverage,
        data=data,
        rule=rule,
        reset_to=reset_to,
        scope=scope,
        text_columns=text_column or [],
        max_samples=max_samples,
        criterion=criterion,
        batch_size=batch_size,
        max_length=max_length,
        revision=revision,
        seed=seed,
        cpu=cpu,
        overwrite=overwrite,
    )


@app.command(cls=_SeveralValues, epilog=_examples("train"))
def train(
    teacher: _TeacherName,
    train_data: Annotated[str, typer.Option(help=f"The student's data: {_DATA}")],
    output: _Output,
    eval_data: Annotated[str | None, typer.Option(help="Clean data to measure accuracy on.")] = None,
    slice_ratio: Annotated[
        str | None,
        typer.Option(callback=_ratio, help="Share of the weights to keep, or auto: the smallest in a budget."),
    ] = None,
    accuracy_budget: Annotated[
        float, typer.Option(min=0, max=1, help="Accuracy that auto may lose on --eval-data, as a share.")
    ] = 0.02,
    strategy: Annotated[
        Literal["remos", "finetune", "retrain", "random", "top_magnitude", "mag_prune"],
        typer.Option(help="How the student starts."),
    ] = "remos",
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data.")] = 3.0,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW, decaying linearly.")] = 5e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 16,
    max_length: _MaxLength = 128,
    augment: Annotated[
        Literal["none", "crop_and_flip"], typer.Option(help="Of images, in training.")
    ] = "crop_and_flip",
    text_column: _TextColumns = None,
    label_column: _LabelColumn = "label",
    max_samples: _MaxSamples = None,
    revision: _Revision = None,
    seed: _Seed = 0,
    bf16: _Bf16 = False,
    cpu: _Cpu = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that --output holds.")] = False,
    overwrite: _Overwrite = False,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Train a student of a teacher and save it, with the record of how it was made.

    A checkpoint is kept after each epoch in --output until the student is saved. Interrupted, the same command with
    --resume goes on from there.
    """
    slices = strategy in _SLICING
    if slices and slice_ratio is None:
        raise typer.BadParameter(f"give --slice-ratio, the share of weights that the strategy {strategy} keeps.")
    if not slices and slice_ratio is not None:
        raise typer.BadParameter(f"the strategy {strategy} slices nothing: leave out --slice-ratio.")
    if slice_ratio == AUTO and (strategy != "remos" or eval_data is None):
        raise typer.BadParameter("--slice-ratio auto needs --strategy remos and --eval-data to choose on.")
    _do(
        "train",
        as_json,
        debug,
        teacher=teacher,
        train_data=train_data,
        eval_data=eval_data,
        output=output,
        text_columns=text_column or [],
        label_column=label_column,
        max_samples=max_samples,
        slice_ratio=slice_ratio if slice_ratio in (None, AUTO) else float(slice_ratio),
        accuracy_budget=accuracy_budget,
        strategy=strategy,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        augment=augment,
        seed=seed,
        bf16=bf16,
        revision=revision,
        cpu=cpu,
        resume=resume,
        overwrite=overwrite,
    )


@app.command(cls=_SeveralValues, epilog=_examples("audit"))
def audit(
    teacher: _TeacherName,
    data: Annotated[str, typer.Option(help=f"Data of the students' task: {_DATA}")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the audit: new, empty, or to be gone on with.")
    ],
    attacker_data: Annotated[str | None, typer.Option(help="Data the teachers are poisoned with; else a part.")] = None,
    test_data: Annotated[str | None, typer.Option(help="Clean data, exposed and measured; else a part.")] = None,
    defects: Annotated[
        list[str] | None,
        typer.Option(help="texts: word sentence ripples ep lwp; images: patch blended latent penultimate coverage."),
    ] = None,
    slice_ratios: Annotated[
        list[float] | None,
        typer.Option(callback=lambda values: _shares(values or []), help="Shares to keep. [default: 0.9]"),
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(min=0, help="A run each; all are pooled. [default: 0 1]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, one ratio, four students, 1,500 samples.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Tell what would be done and in how many minutes, and stop.")
    ] = False,
    target_label: Annotated[
        int | None, typer.Option(min=0, help="That backdoors force. [default: texts 1, images 0]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the task in the report. [default: the data's]")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Of students.")] = 3.0,
    teacher_epochs: Annotated[float, typer.Option(min=0, help="Of teachers.")] = 3.0,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of both.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 16,
    max_length: _MaxLength = 64,
    text_column: _TextColumns = None,
    label_column: _LabelColumn = "label",
    max_samples: _MaxSamples = None,
    revision: _Revision = None,
    bf16: _Bf16 = False,
    cpu: _Cpu = False,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Measure which defects of a teacher its students inherit, and whether slicing helps.

    Implants each defect into the teacher, makes every student, exposes the defects, and writes report.json, report.md
    and report.html. What --attacker-data and --test-data do not give is split off --data by a fixed seed: a fifth to
    test, a tenth for choices, and half of the rest each for the attacker and the students. Interrupted, the same
    command goes on; more defects, students or seeds add to what is done.
    """
    _do(
        "audit",
        as_json,
        debug,
        teacher=teacher,
        data=data,
        attacker_data=attacker_data,
        test_data=test_data,
        output=output,
        name=name,
        text_columns=text_column or [],
        label_column=label_column,
        max_samples=max_samples,
        defects=defects or [],
        slice_ratios=slice_ratios or [0.9],
        seeds=seeds or [0, 1],
        target_label=target_label,
        quick=quick,
        plan=plan,
        epochs=epochs,
        teacher_epochs=teacher_epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        bf16=bf16,
        revision=revision,
        cpu=cpu,
    )


@app.command(epilog=_examples("report"))
def report(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", help="report.json of an audit.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file. [default: beside the JSON]")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    maps: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="MAPS.json",
            help="Where models look: a JSON file with a list 'maps' (title, png, caption, share), the pictures beside "
            "it, as benchmarks/trigger_maps.py writes it. May be given again.",
        ),
    ] = None,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Render a report again: one HTML file, tables in Markdown, and a folder of pictures.

    An earlier rendering in the same place is replaced.
    """
    _do("report", as_json, debug, report=report, output=output, title=title, maps=maps)


@app.command(epilog=_examples("card"))
def card(
    student: Annotated[Path, typer.Argument(metavar="STUDENT_DIR", help="Folder of a student with its record.")],
    report: _Report = None,
    report_student: _ReportStudent = None,
    report_task: _ReportTask = None,
    repo_id: Annotated[str | None, typer.Option(help="Where it will be published, for the loading example.")] = None,
    command: _Command = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write. [default: stdout]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Render a student's model card from its record, and from a report if there is one."""
    _do(
        "card",
        as_json,
        debug,
        student=student,
        report=report,
        report_student=report_student,
        report_task=report_task,
        repo_id=repo_id,
        command=command,
        output=output,
        overwrite=overwrite,
    )


@app.command(epilog=_examples("push"))
def push(
    student: Annotated[Path, typer.Argument(metavar="STUDENT_DIR", help="Folder of a student with its record.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub.")],
    report: _Report = None,
    report_student: _ReportStudent = None,
    report_task: _ReportTask = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; private otherwise.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be pushed, and stop.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    command: _Command = None,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Push a student, its record and its card to the Hub, in one commit."""
    _do(
        "push",
        as_json,
        debug,
        student=student,
        repo_id=repo_id,
        report=report,
        report_student=report_student,
        report_task=report_task,
        public=public,
        revision=revision,
        dry_run=dry_run,
        command=command,
    )


for _one in app.registered_commands:
    # Typer keeps the line breaks of the source in all paragraphs but the first.
    paragraphs = inspect.cleandoc(_one.callback.__doc__).split("\n\n")
    _one.help = "\n\n".join(" ".join(lines.split()) for lines in paragraphs)


def _do(command: str, as_json: bool, debug: bool, /, **options: Any) -> None:  # noqa: ANN401 - of the command
    """Run a command, print its result, and turn what it raises into an exit code."""
    try:
        home, name = _HOMES[command]
        with import_module("remos_hf.cli.console").manners(debug) as progress:
            told, text = getattr(import_module(home), name)(progress=progress, **options)
    except KeyboardInterrupt as stopped:
        typer.echo(f"Interrupted. {stopped}".rstrip(), err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            typer.echo(f"remos {command}: {_reason(error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(told, indent=1) if as_json else text)


def _reason(error: Exception) -> str:
    told = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        return f"The memory of the GPU is too small ({told}). Take a smaller --batch-size, or --cpu."
    ours = type(error).__module__.startswith("remos_hf")
    if told and (ours or isinstance(error, _EXPECTED)):
        return told
    return f"{type(error).__name__}: {told} This was not expected; --debug shows where it comes from."


def main() -> None:
    """Run the command line."""
    app()
