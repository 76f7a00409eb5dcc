"""What belongs to a checkpoint beside its weights and comes along: configs and tokenizers, no program, no pickle."""

import json
import re
import shutil
from pathlib import Path

from remos_hf.adapters.teacher_files import PICKLES, SIDE_SUFFIXES, check_inside, read_any_json
from remos_hf.errors import CorruptFileError

_SIDE_NAMES = ("LICENSE", "NOTICE")
_LEFT_OUT = re.compile(r"\.|remos_|trainer_state\.json$|.*\.index\.json$")


def side_files(source: Path) -> list[Path]:
    """Find the files that belong to a checkpoint beside its weights, sorted.

    Args:
        source: The teacher's folder.

    Raises:
        CorruptFileError: One is a link out of the folder.
    """
    found = [path for path in source.iterdir() if path.is_file() and _belongs(path.name)]
    modules = source / "modules.json"
    if modules.is_file():  # sentence-transformers: what follows the transformer lies in folders that this file names
        found += _files_of_modules(modules)
    for path in found:
        check_inside(path, source)
    return sorted(found)


def copy_side_file(source: Path, target: Path) -> None:
    """Copy a file; from a config, leave out what names programs that come with the checkpoint."""
    target.parent.mkdir(exist_ok=True)
    if source.name.endswith("config.json"):
        config = read_any_json(source)  # sentence-transformers keeps lists in files of such names
        if isinstance(config, dict) and config.pop("auto_map", None) is not None:
            target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            return
    shutil.copyfile(source, target)


def _belongs(name: str) -> bool:
    named = Path(name).suffix in SIDE_SUFFIXES or name.startswith(_SIDE_NAMES)
    return named and _LEFT_OUT.match(name) is None and not name.endswith((".py", *PICKLES))


def _files_of_modules(modules: Path) -> list[Path]:
    try:
        listed = json.loads(modules.read_text(encoding="utf-8"))
        names = [entry["path"] for entry in listed]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CorruptFileError(f"{modules} should list modules and their paths, but does not ({error}).") from error
    folders = [modules.parent / name for name in names if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)]
    return [
        path
        for folder in folders
        if folder.is_dir() and not folder.is_symlink()
        for path in folder.iterdir()
        if path.is_file() and (_belongs(path.name) or path.suffix == ".safetensors")
    ]
