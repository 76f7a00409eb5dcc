"""The command `remos`: its commands, their examples, exit codes. What a command does is loaded when it runs.

Exit codes: 0 done; 1 failed, with one line on stderr that says why and what to do; 2 wrong usage; 3 done, but nothing
can be said of what was measured; 130 interrupted.
"""

import inspect
import json
import re
import traceback
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperCommand
except ImportError:
    raise ImportError("The command remos needs typer: pip install 'remos_hf[cli]'.") from None

from remos_hf.cli import options
from remos_hf.cli.command_line import option_of
from remos_hf.cli.explain_options import ExplainOptions

# By command: its options, and where what it does is found. By name, and loaded when a command runs: torch and
# transformers take seconds, which neither --help nor tab completion is worth. No cycle hides here: none of these
# modules imports this one.
_COMMANDS: dict[str, tuple[type, str, str]] = {
    "profile": (options.ProfileOptions, "remos_hf.cli.profile", "run"),
    "slice": (options.SliceOptions, "remos_hf.cli.slicing", "run"),
    "train": (options.TrainOptions, "remos_hf.cli.train", "run"),
    "audit": (options.AuditOptions, "remos_hf.cli.audit", "run"),
    "scan": (options.ScanOptions, "remos_hf.cli.scan", "run"),
    "explain": (ExplainOptions, "remos_hf.cli.explain", "run"),
    "report": (options.ReportOptions, "remos_hf.cli.report", "run"),
    "card": (options.CardOptions, "remos_hf.cli.publish", "card"),
    "push": (options.PushOptions, "remos_hf.cli.publish", "push"),
}
# What a caller, a file or a network can do wrong; anything else is our mistake, or a library's.
_EXPECTED = (ValueError, OSError, ImportError)
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
    "scan": (
        "remos scan student --data train.tsv --output scan",
        "remos scan student --data flowers/train --reference other_student --output scan",
    ),
    "explain": (
        "remos explain student photo.jpg --data flowers/train --output explanation",
        'remos explain student "a film that was never dull" --data train.tsv --label negative --output explanation',
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


def _tell_versions(asked: bool) -> None:
    if not asked:
        return
    found = {}
    for name in ("remos_hf", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    typer.echo(", ".join(f"{name} {number}" for name, number in {**found, "Python": python_version()}.items()))
    raise typer.Exit


@app.callback()
def _about(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_tell_versions,
            is_eager=True,
            help="Print the versions of remos_hf, torch, transformers and Python, and stop.",
        ),
    ] = False,
) -> None:
    """Take what is asked before a command."""


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


_COMMON = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what other libraries say.")],
}


def _typed(command: str, asked: type) -> Callable[..., None]:
    """Give the function whose signature typer reads: a parameter for each field, and those that all commands take."""

    def run(*, as_json: bool, debug: bool, **given: Any) -> None:  # noqa: ANN401 - of the fields
        _do(command, asked(**given), as_json, debug)

    kinds = {one.name: one.type for one in fields(asked)} | _COMMON
    defaults = {one.name: _default(one) for one in fields(asked)} | dict.fromkeys(_COMMON, False)
    kind_only = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind_only, annotation=kinds[name], default=defaults[name]) for name in kinds]
    )
    run.__annotations__ = kinds
    return run


def _default(one: Field) -> Any:  # noqa: ANN401 - of any field
    if one.default_factory is not MISSING:
        return one.default_factory()
    return inspect.Parameter.empty if one.default is MISSING else one.default


for _command, (_asked, *_) in _COMMANDS.items():
    # Typer keeps the line breaks of the source in all paragraphs but the first.
    _paragraphs = [" ".join(lines.split()) for lines in inspect.cleandoc(_asked.__doc__).split("\n\n")]
    app.command(
        _command,
        cls=_SeveralValues,
        help="\n\n".join(_paragraphs),
        epilog="\n\n".join(["Examples:", *_EXAMPLES[_command]]),
    )(_typed(_command, _asked))


def _do(command: str, asked: Any, as_json: bool, debug: bool) -> None:  # noqa: ANN401 - of the command
    """Run a command, print its result, and turn what it raises into an exit code."""
    try:
        _, home, name = _COMMANDS[command]
        with import_module("remos_hf.cli.console").manners(debug, partial(_in_options, command)) as progress:
            told, text, *status = getattr(import_module(home), name)(asked, progress)
    except KeyboardInterrupt as stopped:
        typer.echo(f"Interrupted. {stopped}".rstrip(), err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            typer.echo(f"remos {command}: {_reason(command, error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(told, indent=1) if as_json else text)
    if status:
        raise typer.Exit(status[0])


def _in_options(command: str, text: str) -> str:
    """Say options where a message of the package names arguments: --text-column for text_columns."""
    text = _PYTHON.sub(lambda found: _ON_THE_COMMAND_LINE[found[0]], text)
    options_of = {**_OPTIONS, **_options_of(_COMMANDS[command][0])}
    text = _ARGUMENTS.sub(lambda found: options_of[found[1]] + (" " if found[2] else ""), text)
    return _SAID_TWICE.sub(r"\1", text)


def _options_of(asked: type) -> dict[str, str]:
    # Words with an underscore alone: "data" and "seed" mean other things in a sentence.
    return {one.name: option_of(one) for one in fields(asked) if "_" in one.name}


# By argument: what a message may name though the command at hand has it not.
_OPTIONS = {name: option for asked, *_ in _COMMANDS.values() for name, option in _options_of(asked).items()}
_ARGUMENTS = re.compile(rf"(?<![\w.])({'|'.join(_OPTIONS)})\b(=?)")
# What else a message calls by its name in Python.
_ON_THE_COMMAND_LINE = {
    "criterion=": "--criterion",
    "threshold_coverage()": "--criterion nc",
    "top_k_coverage()": "--criterion tknc",
    "strong_coverage()": "--criterion snac",
    "MedianCoverage": "median",
    "ThresholdCoverage": "nc",
    "TopKCoverage": "tknc",
    "StrongCoverage": "snac",
    "TopMagnitude": "top_magnitude",
    "checkpoint_path=": "its folder by timm/local-dir:FOLDER",
    "seed=": "--seed",
    "revision=": "--revision",
}
_PYTHON = re.compile("|".join(rf"(?<![\w.-]){re.escape(name)}" for name in _ON_THE_COMMAND_LINE))
# A message that names the argument and the option: text_columns (--text-column).
_SAID_TWICE = re.compile(r"(--[\w-]+) \(\1\)")


def _reason(command: str, error: Exception) -> str:
    told = _in_options(command, " ".join(str(error).split()))
    if type(error).__name__ == "OutOfMemoryError":
        return f"The memory of the GPU is too small ({told}). Take a smaller --batch-size, or --cpu."
    ours = type(error).__module__.startswith("remos_hf")
    if told and (ours or isinstance(error, _EXPECTED)):
        return told
    return f"{type(error).__name__}: {told} This was not expected; --debug shows where it comes from."


def main() -> None:
    """Run the command line."""
    app()
