"""Write docs/api.md: every public name with its one line, how it is called, and an example.

    python tools/api_reference.py        # `make docs` runs it

The line is the first of the docstring, the call its signature without types, the example the part of
docs/api_examples.py under that name. Nothing is typed here, so nothing here can be out of date; a test compares the
file with what this would write.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import remos_hf

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "api_examples.py"
REFERENCE = ROOT / "docs" / "api.md"
# By room, in the order in which a reader needs them.
ROOMS = {
    "training": "Train a student",
    "strategies": "How a student starts, and what holds it",
    "adapters": "Load a teacher",
    "profiling": "What the student's data uses",
    "slicing": "What the student keeps",
    "scanning": "Scan a student",
    "defects": "Defects",
    "evaluation": "Measure",
    "auditing": "Whole audits",
    "applications": "What a slice by data flow is good for",
    "judging": "Reports",
    "showing": "Pages",
    "sharing": "Publish",
    "activations": "Look inside",
    "errors": "Errors",
}
# What has no docstring of its own.
LINES = {
    "STRATEGIES": "The strategies by the names that the commands use.",
    "PRESETS": "Strategies with the training that their paper and their artifact publish, by name.",
}


def examples(path: Path = EXAMPLES) -> dict[str, str]:
    """Give the parts of the file of examples by the names above them; the first part has the name "".

    Raises:
        ValueError: A name stands over two parts.
    """
    parts = re.split(r"^# %%(.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found: dict[str, str] = {}
    for head, code in zip(parts[::2], parts[1::2], strict=True):
        for name in map(str.strip, head.split(",")):
            if name in found:
                raise ValueError(f"{name or 'The first part'} stands over two parts of {path.name}.")
            found[name] = code.strip()
    return found


def line_of(name: str) -> str:
    """Give a name's one line."""
    told = LINES.get(name) or (inspect.getdoc(getattr(remos_hf, name)) or "").partition("\n")[0]
    if not told:
        raise ValueError(f"remos_hf.{name} has no docstring, and no line in LINES.")
    return told


def call_of(name: str) -> str:
    """Give a name with its arguments, without their types; a constant and an error have none."""
    thing = getattr(remos_hf, name)
    if not callable(thing) or (isinstance(thing, type) and issubclass(thing, Exception)):
        return name
    told = []
    star = False
    for one in inspect.signature(thing).parameters.values():
        if one.kind is one.KEYWORD_ONLY and not star:
            told.append("*")
        star = star or one.kind in (one.KEYWORD_ONLY, one.VAR_POSITIONAL)
        marks = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        told.append(f"{marks}{one.name}{_default(one)}")
    return f"{name}({', '.join(told)})"


def _default(one: inspect.Parameter) -> str:
    if one.default is one.empty:
        return ""
    if isinstance(one.default, (str, int, float, tuple, type(None))):
        return f"={one.default!r}"
    return "=..."  # made anew for each call


def entry(name: str, room: str, parts: Mapping[str, str]) -> list[str]:
    """Give the lines of one name."""
    if not re.search(rf"\b{name}\b", parts.get(name, "")):
        raise ValueError(f"{EXAMPLES.name} has no example of {name}: put one under the line '# %% {name}'.")
    home = f"{room.replace('.', '/')}{'/__init__' if (ROOT / 'remos_hf' / room.replace('.', '/')).is_dir() else ''}.py"
    return [
        f"### {name}",
        "",
        f"{line_of(name)} [Source](../remos_hf/{home})",
        "",
        *([] if call_of(name) == name else [f"`{call_of(name)}`", ""]),
        "```python",
        parts[name],
        "```",
        "",
    ]


def reference() -> str:
    """Give all of docs/api.md."""
    parts = examples()
    unknown = set(parts) - {""} - set(remos_hf.__all__)
    if unknown:
        raise ValueError(f"{EXAMPLES.name} has examples of what is not public: {sorted(unknown)}.")
    homes: dict[str, dict[str, str]] = {room: {} for room in ROOMS}
    for home, names in remos_hf._HOMES.items():
        homes[home.partition(".")[0]] |= dict.fromkeys(names, home)
    lines = [
        "# API reference",
        "",
        "Written by `make docs` from docstrings and [api_examples.py](api_examples.py), all of which a test runs.",
        "`teacher`, `student`, `tokenizer`, `train`, `test`, `dataloader`, `args` and the like are what the",
        "[first part of that file](api_examples.py) makes; `help(remos_hf.NAME)` tells arguments, errors and sources.",
        "",
    ]
    for room, names in homes.items():
        links = " · ".join(f"[{name}](#{name.lower()})" for name in sorted(names, key=str.lower))
        lines += [f"- **{ROOMS[room]}**: {links}"]
    for room, names in homes.items():
        lines += ["", f"## {ROOMS[room]}", ""]
        for name in sorted(names, key=str.lower):
            lines += entry(name, names[name], parts)
    text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def main() -> None:
    """Write the reference."""
    REFERENCE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
