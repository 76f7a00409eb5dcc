"""Checkpoints of Trainer that a killed run left half written: told from whole ones, and passed over."""

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from remos_hf.errors import CorruptFileError
from remos_hf.profiling.data_pass import on_main_process

logger = logging.getLogger(__name__)

# As Trainer, PEFT, FSDP and DeepSpeed name what they write weights into.
_WEIGHTS = ("model", "adapter_model", "pytorch_model", "global_step")
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def is_whole(checkpoint: Path) -> bool:
    """Whether Trainer came to the end of writing a checkpoint: its state is the last file, and no file is cut off."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    weights = [path for path in checkpoint.iterdir() if path.name.startswith(_WEIGHTS)]
    if not weights:
        return False  # its removal was begun
    if any(path.suffix == ".safetensors" and _is_cut_off(path) for path in weights):
        return False
    zipped = [path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")]  # torch ends them with an index
    return all(zipfile.is_zipfile(path) for path in zipped)


def _is_cut_off(weights: Path) -> bool:
    try:
        with safe_open(weights, framework="pt"):  # compares the header with the size, and reads no tensor
            return False
    except (SafetensorError, OSError):
        return True


def check_whole(checkpoint: Path) -> None:
    """Refuse to resume from half a checkpoint.

    Raises:
        CorruptFileError: The folder is there, but not whole.
    """
    if checkpoint.is_dir() and not is_whole(checkpoint):
        raise CorruptFileError(
            f"{checkpoint} is no whole checkpoint of Trainer: its {TRAINER_STATE_NAME}, which is written last, or "
            "another file is missing or cut off, as a killed run leaves it. resume_from_checkpoint=True takes the last "
            "whole one."
        )


def chosen_checkpoint(resume: str | Path | bool | None, folder: str) -> str | None:
    """Give the checkpoint that Trainer's `resume_from_checkpoint` means.

    Args:
        resume: The checkpoint; True takes the last whole one, see `last_whole_checkpoint`.
        folder: The run's output folder.

    Returns:
        The checkpoint; None to start anew.

    Raises:
        CorruptFileError: It is half written.
        ValueError: There is none.
    """
    if not resume:
        return None
    if resume is True:
        found = last_whole_checkpoint(Path(folder))
        return None if found is None else str(found)
    check_whole(Path(resume))
    return str(resume)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Find the newest whole checkpoint of a run; those that a killed run left half written or removed are removed.

    Every process calls it; the first one looks and removes.

    Args:
        folder: The run's output folder.

    Returns:
        The checkpoint. None if the run was killed before its first one was whole: it starts anew.

    Raises:
        ValueError: There is no checkpoint at all.
    """
    if on_main_process():
        found = whole_and_half(folder)
        for half in found[1]:
            then = f"{found[0].name} is gone on with" if found[0] else "There is no other, so the run starts anew"
            logger.warning("%s was left half written by a run that was killed. It is removed; %s.", half, then)
            shutil.rmtree(half)
    else:
        found = None
    whole, half = broadcast_object_list([found])[0]
    if whole is None and not half:
        raise ValueError(f"There is no checkpoint to resume from in {folder}.")
    return whole


def whole_and_half(folder: Path) -> tuple[Path | None, list[Path]]:
    """Find the newest whole checkpoint below a folder, and all that are not whole."""
    named = [(_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    newest_first = sorted(((int(match[1]), path) for match, path in named if match and path.is_dir()), reverse=True)
    whole = [path for _, path in newest_first if is_whole(path)]
    return next(iter(whole), None), [path for _, path in newest_first if path not in whole]
