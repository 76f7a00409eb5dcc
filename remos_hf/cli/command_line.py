"""The command line that asks for what a command was asked for, fit to be shown to others."""

import shlex
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from remos_hf.cli.options import was_given


def command_line(command: str, asked: Any) -> str:  # noqa: ANN401 - the options of any command
    """Write a command with the options that differ from their defaults.

    A file or folder of this machine is named without its path: what others read says nothing of where it lies.

    Args:
        command: Its name.
        asked: Its options.
    """
    arguments: list[str] = []
    options: list[str] = []
    for one in fields(asked):
        if not was_given(asked, one.name):
            continue
        value, option = getattr(asked, one.name), option_of(one)
        values = [_public(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
        if _is_argument(one):
            arguments += values
        else:
            options += [option] if value is True else [option, *values]
    return shlex.join(["remos", command, *arguments, *options])


def option_of(one: Field) -> str:
    """Name the option of a field, --text-column; an argument by its place-holder, TEACHER."""
    told = one.type.__metadata__[0]
    if _is_argument(one):
        return told.metavar
    # typer takes the first for a default until it sees where it stands
    given = (told.default, *(told.param_decls or ()))
    named = [name for name in given if isinstance(name, str) and name.startswith("--")]
    return named[0] if named else f"--{one.name.replace('_', '-')}"


def shown_name(source: str) -> str:
    """Name a file or folder of this machine, with its split, without its path; anything else stays as it is."""
    head, _, tail = source.rpartition(":")
    if _lies_here(source):
        return _name(source)
    if head and _lies_here(head):
        return f"{_name(head)}:{tail}"
    return f"{head}:{_name(tail)}" if head and _lies_here(tail) else source  # timm/local-dir:FOLDER


def _public(value: Any) -> str:  # noqa: ANN401 - of any option
    return _name(str(value)) if isinstance(value, Path) else shown_name(str(value))


def _name(path: str) -> str:
    return Path(path).resolve().name


def _lies_here(text: str) -> bool:
    try:
        return Path(text).exists() or (text.startswith((".", "/", "~")) and ":" not in text)
    except OSError:  # too long for a name
        return False


def _is_argument(one: Field) -> bool:
    return type(one.type.__metadata__[0]).__name__ == "ArgumentInfo"
