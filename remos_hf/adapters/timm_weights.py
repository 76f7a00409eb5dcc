"""Where the weights of a timm id lie: in safetensors, never in a pickle."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from remos_hf.errors import CorruptFileError, UnsupportedModelError

_SAFE = ".safetensors"
_SAFE_FILES = ("model.safetensors", "open_clip_model.safetensors")


def weights_file(name: str, config_of: Callable[[str], Any]) -> Path:
    """Find the safetensors file of a timm id on this machine, or fetch it from the Hub.

    Args:
        name: The id, "hf-hub:owner/name@revision" or "local-dir:folder".
        config_of: timm's `get_pretrained_cfg`.

    Raises:
        UnsupportedModelError: There are only pickled weights.
    """
    source, _, place = name.partition(":")
    if source == "local-dir":
        found = [Path(place) / file for file in _SAFE_FILES if (Path(place) / file).is_file()]
        if found or not Path(place).is_dir():
            return found[0] if found else Path(place) / _SAFE_FILES[0]
        raise UnsupportedModelError(_only_pickles(name, f"the folder {place} holds none of {', '.join(_SAFE_FILES)}"))
    if source in ("hf-hub", "hf_hub"):
        repo, _, revision = place.partition("@")
        return _from_hub(name, repo, revision or None, _SAFE_FILES)
    config = config_of(name)
    if config is None or not config.hf_hub_id:
        url = None if config is None else config.url
        raise UnsupportedModelError(_only_pickles(name, f"timm knows it only at {url}" if url else "timm knows none"))
    repo, _, revision = config.hf_hub_id.partition("@")
    files = _SAFE_FILES[:1]
    if config.hf_hub_filename is not None:
        files = (re.sub(r"\.(safetensors|bin|pth|pt|npz)$", "", config.hf_hub_filename) + _SAFE,)
    return _from_hub(name, repo, revision or None, files)


def _from_hub(name: str, repo: str, revision: str | None, files: Iterable[str]) -> Path:
    for file in files:
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except LocalEntryNotFoundError:
            raise  # no network: it may well be there
        except EntryNotFoundError:
            continue
    raise UnsupportedModelError(_only_pickles(name, f"the repository {repo} holds none of {', '.join(files)}"))


def _only_pickles(name: str, reason: str) -> str:
    return (
        f"There are no safetensors weights for {name!r}: {reason}. What timm would load instead is a pickle, which can "
        "run code, and a teacher is not trusted. Convert it where you trust it (torch.load(weights_only=True), then "
        "safetensors.torch.save_file) and pass checkpoint_path=."
    )


def checked_file(path: Path) -> Path:
    """Give a path back if a safetensors file lies there.

    Raises:
        UnsupportedModelError: It is another kind of file.
        FileNotFoundError: There is none.
        CorruptFileError: It cannot be read.
    """
    if path.suffix != _SAFE:
        raise UnsupportedModelError(
            f"{path} is not a {_SAFE} file. Other checkpoints are pickles, which can run code, and a teacher is not "
            "trusted. Convert it where you trust it: torch.load(weights_only=True), then safetensors.torch.save_file."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.")
    try:
        with safe_open(path, framework="pt"):
            return path
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read as safetensors ({error}). Fetch it again.") from error
