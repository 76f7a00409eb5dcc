"""The one way an untrusted teacher gets into memory: looked at first, then built from its safetensors alone.

Nothing that came with a teacher is run, no pickle is opened, nothing outside its folder is read, and nothing but its
head may be missing. A teacher on the Hub is fetched first, the small files before the weights, and looked at alike.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from remos_hf.adapters.architecture import (
    check_complete,
    check_finite,
    check_fits,
    first_line,
    on_meta,
    place_tensors,
    settled_dtype,
)
from remos_hf.adapters.teacher_configs import ADAPTERS, check_configs, check_depth
from remos_hf.adapters.teacher_files import SIDE_SUFFIXES, Checkpoint, check_links, only_pickles, read_json
from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.errors import UnsupportedModelError
from remos_hf.randomness import seeded

logger = logging.getLogger(__name__)

TIMM = "timm/"
_SMALL_FILES = [*(f"*{suffix}" for suffix in SIDE_SUFFIXES), "LICENSE*", "NOTICE*", *ADAPTERS]
# What a config may choose itself; anything else may lead to a kernel of the Hub.
_OWN_CHOICES = {
    "_attn_implementation_internal": (None, "eager", "sdpa"),
    "_experts_implementation_internal": (None, "eager"),
}


@dataclass(frozen=True)
class TeacherFolder:
    """A teacher whose files were looked at.

    Attributes:
        name: As it was named: a folder or an id of the Hub.
        path: Where its files lie.
        checkpoint: Its weights.
    """

    name: str
    path: Path
    checkpoint: Checkpoint

    @property
    def commit(self) -> str | None:
        """The commit that was fetched from the Hub; None of a folder."""
        return self.path.name if self.path.parent.name == "snapshots" and not Path(self.name).is_dir() else None


def teacher_folder(name: str, *, revision: str | None = None) -> TeacherFolder:
    """Find a teacher's folder, fetching it from the Hub if need be, and look at all its files.

    Args:
        name: A folder, or an id of the Hub.
        revision: Branch, tag or commit of the Hub.

    Raises:
        FileNotFoundError: There is no such folder or repository, or it holds no weights.
        UnsupportedModelError: There are only pickles; a config names a kernel, other files, or quantised weights; an
            adapter lies beside the weights; or a tensor is of a type that no weight has.
        CorruptFileError: An index or a shard is broken, or leads out of the folder.
    """
    path = Path(name) if Path(name).is_dir() else _fetched(name, revision)
    check_links(path)
    if not (path / SAFE_WEIGHTS_NAME).exists() and not (path / SAFE_WEIGHTS_INDEX_NAME).exists():
        Checkpoint.in_folder(path)  # says that there are no weights, whatever else is wrong
    check_configs(path)
    checkpoint = Checkpoint.in_folder(path)
    check_depth(path, len(checkpoint.tensors))
    return TeacherFolder(name, path, checkpoint)


def load_config(folder: TeacherFolder) -> PretrainedConfig:
    """Read a teacher's config, without what asks for kernels of others.

    Raises:
        UnsupportedModelError: transformers has no such architecture.
    """
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a stranger's values set off in the config's constructor
        raise UnsupportedModelError(
            f"{folder.path / 'config.json'} describes no architecture of transformers ({first_line(error)}). Programs "
            "that come with a checkpoint (auto_map) are not run."
        ) from error
    _use_own_attention(config)
    config._name_or_path = str(folder.name)
    config._commit_hash = folder.commit
    return config


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a teacher; one without a padding token pads with its end token.

    Args:
        name: A folder, or an id of the Hub.
        revision: Branch, tag or commit of the Hub.

    Raises:
        UnsupportedModelError: It has no way to pad, or no tokenizer that transformers knows.
    """
    folder = teacher_folder(name, revision=revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise UnsupportedModelError(f"The tokenizer of {name} cannot be loaded ({first_line(error)}).") from error
    tokenizer.name_or_path = str(name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UnsupportedModelError(f"The tokenizer of {name} has neither a padding token nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_teacher(
    name: str,
    kind: Any = None,  # noqa: ANN401 - an Auto class has no type of its own
    *,
    revision: str | None = None,
    num_labels: int | None = None,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
) -> nn.Module:
    """Load a teacher that nobody vouches for. The one way to do it: every command and example goes through here.

    Args:
        name: A folder, an id of the Hub, or "timm/<id>".
        kind: A model class of transformers, or an Auto class (`AutoModelForSequenceClassification`). None: the class
            that the checkpoint was saved as.
        revision: Branch, tag or commit of the Hub.
        num_labels: Labels of the head. A head that the teacher lacks, or has for other labels, starts from the seed.
            None keeps the teacher's head, which then has to be there in its shape.
        config: Settings to load it with, from `teacher_config`; None takes the teacher's own.
        dtype: Of the weights; "auto" as they were saved.
        seed: Of a new head. The global random state stays as it is.

    Returns:
        The model in evaluation mode, on the CPU; of "timm/<id>" an `ImageClassifier`.

    Raises:
        FileNotFoundError: There is no such teacher, or it has no weights.
        UnsupportedModelError: Its weights are pickled or quantised, a weight of the body is missing or misshapen, an
            adapter lies beside them, a config asks for a program, or `num_labels` is given for a class without a head.
            The text names the file, the parameter, the key.
        CorruptFileError: A file is broken, or leads out of the folder.
        NonFiniteError: A weight is NaN or infinite.
    """
    if name.startswith(TIMM):
        return image_classifier(name.removeprefix(TIMM), num_labels, seed=seed).eval()
    folder = teacher_folder(name, revision=revision)
    own_config = config is None
    config = load_config(folder) if own_config else copy.deepcopy(config)
    _use_own_attention(config)
    any_head = num_labels is not None
    if any_head and own_config and num_labels != config.num_labels:
        config.problem_type = None  # of the teacher's labels: a regression's loss would take class numbers for values
    if any_head:
        config.num_labels = num_labels
    blank = _blank(folder, config, kind, any_head)
    if any_head and kind is None and blank.base_model is blank:
        raise UnsupportedModelError(
            f"{name} was saved as a {type(blank).__name__}, which has no head for {num_labels} labels. Name the class, "
            "such as kind=AutoModelForSequenceClassification."
        )
    with seeded(seed, devices=()):
        try:
            model, info = type(blank).from_pretrained(
                folder.path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told apart below: only the head may differ
                output_loading_info=True,
                local_files_only=True,
            )
        except Exception as error:  # a stranger's files may set off anything in there
            raise UnsupportedModelError(f"{name} cannot be loaded ({first_line(error)}).") from error
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    check_complete(blank, {*info["missing_keys"], *mismatched}, name, any_head=any_head)
    check_finite(model, name)
    model.name_or_path = str(name)
    return model


def teacher_config(name: str, *, revision: str | None = None) -> PretrainedConfig:
    """Read the config of a teacher after all its files were looked at, to change it and give it to `load_teacher`.

    Args:
        name: A folder, or an id of the Hub.
        revision: Branch, tag or commit of the Hub.

    Raises:
        UnsupportedModelError: As `load_teacher`.
    """
    return load_config(teacher_folder(name, revision=revision))


def _blank(folder: TeacherFolder, config: PretrainedConfig, kind: Any, any_head: bool) -> PreTrainedModel:  # noqa: ANN401
    """Build the architecture without values, and compare it with what the files say they hold."""
    shaped = copy.deepcopy(config)
    shaped.dtype = settled_dtype(config, folder.checkpoint)
    blank = on_meta(shaped, kind)
    placed = place_tensors(blank, folder.checkpoint)
    check_fits(blank, placed, any_head=any_head)
    if placed.unknown:
        names = [tensor.name for tensor in placed.unknown]
        logger.info("%s holds %d tensors without a place, such as '%s'.", folder.name, len(names), names[0])
    return blank


def _use_own_attention(config: PretrainedConfig) -> None:
    """Leave the choice of attention and experts to transformers: "flash_attention_2" too may fetch a kernel."""
    waiting = [config]
    while waiting:
        one = waiting.pop()
        for key, choices in _OWN_CHOICES.items():
            if getattr(one, key, None) not in choices:
                logger.warning("%s is left to transformers, not %r as config.json says.", key, getattr(one, key))
                setattr(one, key, None)
        waiting += [value for value in vars(one).values() if isinstance(value, PretrainedConfig)]


def _fetched(name: str, revision: str | None) -> Path:
    """Fetch a repository: configs and tokenizers, and when these are harmless the safetensors."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {name}. Give the folder of a model, or its id on the Hub.")
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES))
        check_links(path)
        if (path / "config.json").is_file():
            check_configs(path)
        weights = [SAFE_WEIGHTS_NAME]
        if (path / SAFE_WEIGHTS_INDEX_NAME).is_file():
            shards = read_json(path / SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
            weights += [str(shard) for shard in shards.values()] if isinstance(shards, dict) else []
        if (path / "modules.json").is_file():  # sentence-transformers: dense layers in folders of their own
            weights.append(f"*/{SAFE_WEIGHTS_NAME}")
        path = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, *sorted(set(weights))]))
        if not any(path.glob("*.safetensors")):
            raise only_pickles(name, _listed(name, revision, path))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor an id of the Hub: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{name} is no folder, and the Hub cannot be reached, nor is it in the cache ({first_line(error)})."
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"The Hub does not give {name!r}: {error}") from error
    return path


def _listed(name: str, revision: str | None, path: Path) -> list[str]:
    try:
        return HfApi().list_repo_files(name, revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return [file.name for file in path.iterdir()]
