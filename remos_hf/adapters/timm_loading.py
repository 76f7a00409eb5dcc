"""Image classifiers of timm, loaded from safetensors alone: the way of an untrusted teacher that has a timm id.

timm itself is imported only where a model is built, so that other models need not have it installed.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import nn

from remos_hf.adapters.architecture import check_finite
from remos_hf.adapters.teacher_configs import CONFIG, check_config
from remos_hf.adapters.teacher_files import RANKABLE, check_inside, read_header, read_json, wrong_dtype
from remos_hf.adapters.timm_models import (
    BODY,
    ImageClassifier,
    check_num_labels,
    classifiers_of,
    copy_with_new_head,
    is_timm,
    labels_of,
    replace_head,
)
from remos_hf.errors import UnsupportedModelError
from remos_hf.randomness import seeded

_SAFE = ".safetensors"
_SAFE_FILES = ("model.safetensors", "open_clip_model.safetensors")
_HUB = ("hf-hub", "hf_hub")


def image_classifier(
    model: str | nn.Module,
    num_labels: int | None = None,
    *,
    seed: int = 0,
    pretrained: bool = True,
    checkpoint_path: str | Path | None = None,
) -> ImageClassifier:
    """Load an image classifier that Trainer takes, from safetensors only.

    No pickle is ever opened: the weights file is found here, must end in ".safetensors", and is handed to timm as a
    local file, which timm reads with the safetensors library by that ending. timm's own choice of file on the Hub
    would fall back to `pytorch_model.bin`, and for ids that only have a URL to a `.pth`; both are refused.

    Args:
        model: A timm id ("resnet18", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "hf-hub:owner/name@revision",
            "local-dir:folder"), or a module of timm, which is taken as it is (copied if it gets another head).
        num_labels: Labels of the task. None, or the teacher's own number, keeps the teacher's head; another number
            gives a head that was never trained.
        seed: Seed of a new head, and of all weights if not `pretrained`. The global random state stays as it is.
        pretrained: Load the teacher's weights.
        checkpoint_path: A local safetensors file to load instead of the id's own weights: timm's names, or what
            Trainer saved of an `ImageClassifier`. Its number of labels is the teacher's.

    Raises:
        UnsupportedModelError: There are only pickled weights, a weight is missing, misshapen or of a type that none
            has, the config names something elsewhere, or there is no head and no `num_labels`.
        CorruptFileError: The file is no safetensors file, or a link out of its folder.
        NonFiniteError: A weight is NaN or infinite.
        FileNotFoundError: There is no such file.
        ValueError: `num_labels` is below 1, or `checkpoint_path` is given with a module.
        ImportError: timm is not installed.
    """
    if num_labels is not None:
        check_num_labels(num_labels)
    if isinstance(model, nn.Module):
        if checkpoint_path is not None:
            raise ValueError("checkpoint_path goes with a timm id. Load a module's weights before passing it.")
        if not is_timm(model) and not isinstance(model, ImageClassifier):
            return ImageClassifier(model)  # which says what is missing
        if num_labels is not None and num_labels != labels_of(model):
            model = copy_with_new_head(model, num_labels, seed=seed)
        return model if isinstance(model, ImageClassifier) else ImageClassifier(model)
    with seeded(seed):
        body = _create(model, pretrained, checkpoint_path)
    if num_labels is not None and num_labels != labels_of(body):
        replace_head(body, num_labels, seed)
    return ImageClassifier(body)


def _create(name: str, pretrained: bool, checkpoint_path: str | Path | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError("Models of timm need timm: pip install 'remos_hf[vision]'.") from error
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3)) or "none"
        raise UnsupportedModelError(f"timm {timm.__version__} has no model {name!r}. Names like it: {close}.")
    file = None if checkpoint_path is None else _checked_file(Path(checkpoint_path))
    if pretrained and file is None:
        file = _checked_file(_weights_file(name, timm.get_pretrained_cfg))
    _check_config(name)
    if file is None:
        return timm.create_model(name, pretrained=False)
    try:
        if checkpoint_path is not None:
            body = _with_weights_of(timm.create_model(name, pretrained=False), file)
        else:
            # Without a source, timm reads `file`; the other keys could send it elsewhere.
            place = {"source": "", "file": str(file), "state_dict": None, "custom_load": False}
            body = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=place)
            body.pretrained_cfg.pop("file", None)  # the place on this machine says nothing to others
    except Exception as error:  # a weight that is missing or misshapen, and whatever a stranger's config sets off
        told = " ".join(str(error).split())
        raise UnsupportedModelError(f"{file} does not hold all weights of {name} ({told:.500}).") from error
    stated = body.pretrained_cfg.get("num_classes", body.num_classes)
    if checkpoint_path is None and body.num_classes != stated:  # then timm would load what fits and draw the rest
        raise UnsupportedModelError(
            f"The config of {name} says num_classes {body.num_classes} in one place and {stated} in another. Mend it."
        )
    check_finite(body, name)
    return body


def _check_config(name: str) -> None:
    """Look at the config of a folder or a repository before timm builds what it says."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        folder = Path(place)
        if (folder / CONFIG).is_file():
            check_inside(folder / CONFIG, folder)
            check_config(folder / CONFIG, read_json(folder / CONFIG))
        for file in _SAFE_FILES:
            if (folder / file).is_file():
                check_inside(folder / file, folder)
    elif source in _HUB:
        repo, _, revision = place.partition("@")
        try:
            config = Path(hf_hub_download(repo, CONFIG, revision=revision or None))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise UnsupportedModelError(f"The repository {repo} holds no {CONFIG}, so no model of timm.") from error
        check_config(config, read_json(config))


def _weights_file(name: str, config_of: Callable[[str], Any]) -> Path:
    source, _, place = name.partition(":")
    if source == "local-dir":
        found = [Path(place) / file for file in _SAFE_FILES if (Path(place) / file).is_file()]
        if found or not Path(place).is_dir():
            return found[0] if found else Path(place) / _SAFE_FILES[0]
        raise UnsupportedModelError(_only_pickles(name, f"the folder {place} holds none of {', '.join(_SAFE_FILES)}"))
    if source in _HUB:
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
        except LocalEntryNotFoundError as error:  # it may well be there
            raise FileNotFoundError(
                f"The weights of {name} ({repo} on the Hub) are not in the local cache, and the Hub cannot be reached."
            ) from error
        except EntryNotFoundError:
            continue
    raise UnsupportedModelError(_only_pickles(name, f"the repository {repo} holds none of {', '.join(files)}"))


def _only_pickles(name: str, reason: str) -> str:
    return (
        f"There are no safetensors weights for {name!r}: {reason}. What timm would load instead is a pickle, which can "
        "run code, and a teacher is not trusted. Convert it on a machine where nothing can be harmed, and pass "
        "checkpoint_path=."
    )


def _checked_file(path: Path) -> Path:
    if path.suffix != _SAFE:
        raise UnsupportedModelError(
            f"{path} is not a {_SAFE} file. Other checkpoints are pickles, which can run code, and a teacher is not "
            "trusted. Convert it on a machine where nothing can be harmed, and save it as safetensors."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.")
    for tensor in read_header(path):
        # Buffers (counters, indices) may hold whole numbers.
        if tensor.name.endswith(("weight", "bias")) and tensor.dtype not in RANKABLE:
            raise wrong_dtype(tensor.name, path, tensor.dtype)
    return path


def _with_weights_of(body: nn.Module, path: Path) -> nn.Module:
    tensors = load_file(path)
    if tensors.keys().isdisjoint(body.state_dict()):  # TResNet has a "body." of its own
        tensors = {name.removeprefix(BODY): tensor for name, tensor in tensors.items()}
    for name in classifiers_of(body)[:1]:
        rows = len(tensors.get(f"{name}.weight", ()))
        if rows not in (0, body.num_classes):
            body.reset_classifier(rows)
    body.load_state_dict(tensors)
    return body
