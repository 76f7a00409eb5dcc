"""A student's folder, whoever wrote it: the model, what reads its inputs, what its classes are called, its record.

A student may be a stranger's as well as its teacher is, so it gets into memory the same guarded way.
"""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import save_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from remos_hf.adapters.class_names import class_names
from remos_hf.adapters.guarded_loading import TIMM, load_teacher, load_tokenizer, teacher_config, teacher_folder
from remos_hf.adapters.images import ImageInput, image_input_of
from remos_hf.adapters.teacher_configs import CONFIG
from remos_hf.adapters.teacher_files import check_links, read_json
from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.adapters.timm_models import ImageClassifier, labels_of, timm_place
from remos_hf.auditing.data_files import TEXT_COLUMNS, text_columns_of
from remos_hf.auditing.labels import LABEL_COLUMN
from remos_hf.errors import UnsupportedModelError
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.tasks import TextTask
from remos_hf.sharing.record import CONFIG_FILE, Sidecars
from remos_hf.whole import replace_file, whole_file

logger = logging.getLogger(__name__)

_WEIGHTS_FILE = "model.safetensors"
# What examples/run_timm_remos.py writes beside a student of timm.
_TIMM_STUDENT_FILE = "image_classifier.json"
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "merges.txt", "*.model")
# What timm's config says of how images are read, and of the architecture; its other keys say where weights came from.
_TIMM_KEYS = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("pool_size", "first_conv", "classifier"),
)


@dataclass(frozen=True)
class LoadedStudent:
    """A student that lay in a folder.

    Attributes:
        folder: Where it lay.
        model: In evaluation mode, on the CPU, its weights in the type that they were saved in.
        reader: What reads its inputs: a tokenizer of texts, or how images are prepared.
        class_names: In the order of the labels; None if they are only numbered.
        record: How it was made; None if nothing beside it says so.
    """

    folder: Path
    model: nn.Module
    reader: PreTrainedTokenizerBase | ImageInput
    class_names: tuple[str, ...] | None
    record: Sidecars | None

    @property
    def reads_images(self) -> bool:
        """Whether it reads images, not texts."""
        return isinstance(self.reader, ImageInput)

    def task(
        self, samples: Dataset, *, batch_size: int = 32, max_length: int = 128, bf16: bool = False
    ) -> TextTask | ImageTask:
        """Give how samples are read.

        Args:
            samples: Say whether texts come in pairs; columns as `read_data` names them, or by their usual names.
            batch_size: Samples of a forward pass.
            max_length: Tokens kept of a text.
            bf16: Run in bfloat16 autocast.
        """
        if isinstance(self.reader, ImageInput):
            return ImageTask(self.reader, batch_size=batch_size, bf16=bf16)
        ours = tuple(name for name in TEXT_COLUMNS if name in samples.column_names)
        columns = ours or text_columns_of("The data set", samples)
        return TextTask(self.reader, columns, LABEL_COLUMN, max_length, batch_size, bf16)


def load_student(folder: str | Path, *, reader: str | None = None) -> LoadedStudent:
    """Load a classifier that `remos train`, RemosTrainer, `fit`, `save_pretrained` or timm saved.

    Args:
        folder: Its folder, with safetensors weights. What it is, its config says; of a model of timm that has none, its
            record.
        reader: A folder or an id of the Hub, such as the teacher's, that says how inputs are read, where nothing in the
            student's own folder does.

    Raises:
        FileNotFoundError: There is no such folder, no weights in it, or nothing that says what reads its inputs.
        UnsupportedModelError: It is no classifier; or as `load_teacher`, which refuses what could run or be fetched.
        CorruptFileError: A file is broken.
        NonFiniteError: A weight is NaN or infinite.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(
            f"There is no folder {place}. `remos train`, RemosTrainer and save_pretrained write one."
        )
    check_links(place)
    record = Sidecars.load(place) if (place / CONFIG_FILE).is_file() else None
    settings = read_json(place / CONFIG) if (place / CONFIG).is_file() else None
    if settings is None or _is_of_timm(settings):
        model, names = _timm_student(place, settings, record)
        return LoadedStudent(place, model.eval(), _timm_reader(place, model), names, record)
    config = teacher_config(str(place))
    of_images = _reads_images(place, config)
    model = load_teacher(str(place), config=config)
    given = _reader_of(place, model, of_images, reader)
    if not of_images and model.config.pad_token_id is None:
        model.config.pad_token_id = given.pad_token_id
    names = class_names(model)
    return LoadedStudent(place, model, given, None if names is None else tuple(names), record)


def save_timm_student(student: ImageClassifier, folder: str | Path, labels: Sequence[str] | None = None) -> None:
    """Save a student of timm in timm's own form, which says what it is, what its labels are and how it reads images.

    `timm.create_model("local-dir:FOLDER", pretrained=True)`, `image_classifier("local-dir:FOLDER")`, and
    `AutoModelForImageClassification.from_pretrained(FOLDER)` of transformers load it, and `load_student(FOLDER)`.

    Args:
        student: Its weights are saved under timm's names.
        folder: Where to; it is made if it is not there.
        labels: Their names, in the order of their numbers.

    Raises:
        UnsupportedModelError: As `timm_config`.
    """
    folder = Path(folder)
    config = timm_config(student, labels)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / _WEIGHTS_FILE) as path:
        save_model(student.body, str(path), metadata={"format": "pt"})
    replace_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def timm_config(student: ImageClassifier, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe a student of timm as timm does on the Hub.

    Args:
        student: The student.
        labels: Names of its labels, in the order of their numbers.

    Raises:
        UnsupportedModelError: Its architecture's name alone does not say what it is, so nothing could load it again.
    """
    body = student.body
    stated = dict(getattr(body, "pretrained_cfg", None) or {})
    name, number = stated.get("architecture"), labels_of(student)
    if not name or _shapes(image_classifier(name, number, pretrained=False).body) != _shapes(body):
        raise UnsupportedModelError(
            f"{type(body).__name__} is not what timm builds by the name {name!r}: it was made with arguments of its "
            "own, which no file would say, so nobody could load the student again."
        )
    config = {"architecture": name, "num_classes": number, "num_features": getattr(body, "num_features", None)}
    if labels is not None:
        config["label_names"] = list(labels)
    config["pretrained_cfg"] = {key: stated[key] for key in _TIMM_KEYS if stated.get(key) is not None}
    config["pretrained_cfg"]["num_classes"] = number
    return config


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _is_of_timm(settings: Mapping[str, Any]) -> bool:
    # With a "model_type" it is that of transformers' wrapper, which transformers loads.
    return "architecture" in settings and "model_type" not in settings


def _timm_student(
    place: Path, settings: Mapping[str, Any] | None, record: Sidecars | None
) -> tuple[nn.Module, tuple[str, ...] | None]:
    weights = place / _WEIGHTS_FILE
    if settings is not None:  # timm's own form, which says everything
        teacher_folder(str(place))
        model = image_classifier(f"local-dir:{place}", checkpoint_path=weights)
        return model, _texts(settings.get("label_names"))
    described = read_json(place / _TIMM_STUDENT_FILE) if (place / _TIMM_STUDENT_FILE).is_file() else {}
    name = described.get("model") or _timm_id(place, record)
    if not isinstance(name, str) or ":" in name:
        raise UnsupportedModelError(f"{place / _TIMM_STUDENT_FILE} names no model that timm itself has, but {name!r}.")
    if not weights.is_file():
        raise FileNotFoundError(f"There is no {weights}, the weights of a student of timm.")
    return image_classifier(name, checkpoint_path=weights), _texts(described.get("labels"))


def _texts(names: Any) -> tuple[str, ...] | None:  # noqa: ANN401 - JSON
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def _timm_id(place: Path, record: Sidecars | None) -> str:
    """Say which model of timm a record means: the teacher's id, whose tag also decides how images are read."""
    made = {} if record is None else record.config.get("student", {})
    architecture = made.get("architecture") if made.get("library") == "timm" else None
    if not architecture:
        what = "no record" if record is None else f"a record of {made.get('class') or 'a model that it does not name'}"
        raise FileNotFoundError(
            f"{place} holds no {CONFIG} and {what}, so nothing says what model the weights belong to. Save the student "
            "by its own save_pretrained, or give the model itself (evaluate_transfer takes one)."
        )
    teacher = str(record.config["teacher"].get("id"))
    if teacher.startswith(TIMM) and teacher.removeprefix(TIMM).partition(".")[0] == architecture:
        return teacher.removeprefix(TIMM)
    logger.warning(
        "%s does not say which weights of timm's %s the student started from: images are read as its usual ones are.",
        place / CONFIG_FILE,
        architecture,
    )
    return architecture


def _timm_reader(place: Path, model: nn.Module) -> ImageInput:
    path = place / _TIMM_STUDENT_FILE
    if not path.is_file() or "images" not in (described := read_json(path)):
        return image_input_of(model)
    try:
        return ImageInput(**described["images"])
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{path} does not say how images are read: {error}") from error


def _reads_images(place: Path, config: PretrainedConfig) -> bool:
    """Say whether a classifier reads images; refuse what is none."""
    saved_as = (config.architectures or [None])[0]
    for known, of_images in (
        (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, True),
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, False),
    ):
        names = [name for one in known.values() for name in ([one] if isinstance(one, str) else one)]
        if saved_as in names:
            return of_images
    raise UnsupportedModelError(
        f"{place} holds {saved_as or 'a model of no named class'}, which is no classifier of texts or images. Only a "
        "student that was trained for its task can be measured on it; a sliced teacher is trained first."
    )


def _reader_of(
    place: Path, model: nn.Module, of_images: bool, otherwise: str | None
) -> PreTrainedTokenizerBase | ImageInput:
    if timm_place(model) is not None:  # whose config says it
        return image_input_of(model)
    held = ("preprocessor_config.json",) if of_images else _TOKENIZER_FILES
    if any(any(place.glob(pattern)) for pattern in held):
        return image_input_of(model) if of_images else load_tokenizer(str(place))
    if otherwise is None:
        what = "an image processor" if of_images else "a tokenizer"
        raise FileNotFoundError(
            f"{place} holds no {what.split(' ', 1)[1]}, so nothing says how the student reads its inputs. Save the "
            f"teacher's there ({what} has save_pretrained), or name the teacher."
        )
    if not of_images:
        return load_tokenizer(otherwise)
    like = copy.copy(model)
    like.name_or_path = str(teacher_folder(otherwise).path)
    return image_input_of(like)
