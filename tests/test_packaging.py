import configparser
import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]


def settings():
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def test_every_room_is_in_what_is_built():
    # `packages = find:` takes a folder for a package by its __init__.py alone.
    metrics = ROOT / "remos_hf" / "evaluation" / "metrics"
    rooms = {path.parent for path in (ROOT / "remos_hf").rglob("*.py")}
    assert [room for room in rooms if metrics not in room.parents and not (room / "__init__.py").is_file()] == []


def test_files_that_are_no_modules_are_in_what_is_built():
    wanted = settings()["options.package_data"]
    given = {path for room, patterns in wanted.items() for one in patterns.split(",") for path in _files(room, one)}
    others = {
        path for path in (ROOT / "remos_hf").rglob("*") if path.suffix in (".md", ".jinja", ".css", ".js", ".json")
    }
    assert others and others <= given


def _files(room, pattern):
    return (ROOT / room.replace(".", "/")).glob(pattern.strip())


def test_the_description_has_no_links_into_the_repository():
    told = settings()["metadata"]
    text = told["long_description"]
    assert "file:" not in text and not re.search(r"\]\((?!https://)", text)
    assert all(line.partition(" = ")[2].startswith("https://") for line in told["project_urls"].split("\n") if line)


def test_the_command_is_where_it_is_looked_for():
    (script,) = settings()["options.entry_points"]["console_scripts"].strip().split("\n")
    name, _, place = script.partition(" = ")
    home, _, function = place.partition(":")
    assert name == "remos" and callable(getattr(import_module(home), function))
