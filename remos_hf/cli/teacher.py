"""The teacher that a command names: loaded from safetensors, without running anything that came with it."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from remos_hf.adapters.timm_models import image_classifier
from remos_hf.auditing.data_files import TEXT_COLUMNS, holds_images
from remos_hf.errors import UnsupportedModelError
from remos_hf.evaluation.tasks import TextTask
from remos_hf.sharing.record import PICKLES

if TYPE_CHECKING:  # needs Pillow, which texts do not
    from remos_hf.evaluation.image_task import ImageTask

TIMM = "timm/"
# Pickles, and weights that no command reads.
UNREAD = (*PICKLES, ".h5", ".msgpack", ".th")


def check_teacher(teacher: str, revision: str | None = None) -> Path | None:
    """Refuse a teacher that has no safetensors weights, before anything of it is loaded.

    Args:
        teacher: A folder, or an id of the Hub.
        revision: Branch, tag or commit of the Hub.

    Returns:
        The folder, if it is one.

    Raises:
        UnsupportedModelError: There are only weights in formats that may run code when they are opened.
        FileNotFoundError: There are no weights, or there is no such folder.
    """
    if teacher.startswith(TIMM):
        return None  # `image_classifier` looks for itself
    folder = Path(teacher)
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
    elif teacher.startswith((".", "/", "~")) or teacher.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {teacher}. Give the folder of a model, or its id on the Hub.")
    else:
        try:
            names = HfApi().list_repo_files(teacher, revision=revision)
        except HFValidationError as error:
            raise FileNotFoundError(f"{teacher!r} is neither a folder nor an id of the Hub: {error}") from error
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403, 404):
                raise FileNotFoundError(f"The Hub does not give {teacher!r}: {error}") from error
            return None
        except (OfflineModeIsEnabled, OSError):
            return None  # what is in the cache may do, and only safetensors are read of it
    if any(name.endswith(".safetensors") for name in names):
        return folder if folder.is_dir() else None
    pickled = [name for name in names if name.endswith(UNREAD)]
    if pickled:
        raise UnsupportedModelError(
            f"{teacher} holds its weights only as {pickled[0]}, which may run any code when it is opened; a teacher is "
            "not to be trusted. Take a revision with safetensors, or convert it where nothing can be harmed."
        )
    raise FileNotFoundError(f"{teacher} holds no *.safetensors, so no weights. Give the folder of a saved model.")


@dataclass(frozen=True)
class Teacher:
    """A teacher that was named, and how it reads the samples at hand.

    Attributes:
        name: A folder, an id of the Hub, or "timm/<id>".
        revision: Branch, tag or commit of the Hub.
        tokenizer: Of texts; None if the samples are images.
    """

    name: str
    revision: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def named(cls, name: str, samples: Dataset, revision: str | None = None) -> "Teacher":
        """Check a teacher, and load what it reads such samples with.

        Raises:
            UnsupportedModelError: It has only pickled weights, or no way to pad texts.
            FileNotFoundError: There is no such teacher.
        """
        check_teacher(name, revision)
        if not holds_images(samples):
            if name.startswith(TIMM):
                raise UnsupportedModelError(f"{name} reads images, but the samples are texts.")
            return cls(name, revision, _tokenizer(name, revision))
        return cls(name, revision)

    @property
    def reads_images(self) -> bool:
        """Whether it reads images, not texts."""
        return self.tokenizer is None

    def load(self, num_labels: int, seed: int = 0) -> nn.Module:
        """Load the model in float32. A head that it lacks starts from the seed.

        Args:
            num_labels: Labels of the task.
            seed: Of the head.
        """
        if self.name.startswith(TIMM):
            return image_classifier(self.name.removeprefix(TIMM), num_labels, seed=seed)
        kind = AutoModelForImageClassification if self.reads_images else AutoModelForSequenceClassification
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind.from_pretrained(
                self.name,
                num_labels=num_labels,
                revision=self.revision,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,  # left out, transformers would ask on the terminal
            )
        if self.tokenizer is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def load_as_saved(self) -> nn.Module:
        """Load the model that the checkpoint was saved as, in its own type: the one that a slice on disk is made of.

        Raises:
            UnsupportedModelError: transformers has no such architecture.
        """
        if self.name.startswith(TIMM):
            return image_classifier(self.name.removeprefix(TIMM))
        config = AutoConfig.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
        names = config.architectures or [""]
        kind = getattr(transformers, names[0], None) if config.architectures else AutoModel
        if kind is not AutoModel and not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            raise UnsupportedModelError(
                f"{self.name} was saved as a {names[0]}, which transformers {transformers.__version__} does not have. "
                "Programs that come with a model are not run."
            )
        return kind.from_pretrained(
            self.name, revision=self.revision, dtype="auto", use_safetensors=True, trust_remote_code=False
        )

    def task(
        self,
        model: nn.Module,
        samples: Dataset,
        *,
        batch_size: int,
        max_length: int,
        bf16: bool = False,
        augment: str = "none",
    ) -> "TextTask | ImageTask":
        """Give how samples are read, by the teacher's own tokenizer or preprocessing.

        Args:
            model: The teacher.
            samples: Says whether texts come in pairs.
            batch_size: Samples of a forward pass.
            max_length: Tokens kept of a text.
            bf16: Run in bfloat16 autocast.
            augment: Of images in training: "none" or "crop_and_flip".
        """
        if self.tokenizer is not None:
            columns = tuple(name for name in TEXT_COLUMNS if name in samples.column_names)
            return TextTask(self.tokenizer, columns, "label", max_length, batch_size, bf16)
        # By name and only now: these modules need Pillow, which a user of texts need not have.
        images = import_module("remos_hf.adapters.images").image_input_of(model)
        make = import_module("remos_hf.evaluation.image_task").ImageTask
        return make(images, batch_size=batch_size, bf16=bf16, augment=augment)


def identity(teacher: str, revision: str | None, model: nn.Module | None = None) -> dict[str, str | None]:
    """Say which teacher it was, for the record beside a student. A folder is named without its path.

    Args:
        teacher: As it was named.
        revision: As it was asked for.
        model: What was loaded; it knows the commit.
    """
    path = Path(teacher)
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return {"id": path.resolve().name if path.is_dir() else teacher, "revision": commit or revision}


def device_for(cpu: bool) -> torch.device:
    """Give the GPU, unless there is none or it is to be left alone."""
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def _tokenizer(teacher: str, revision: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(teacher, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UnsupportedModelError(f"The tokenizer of {teacher} has neither a padding token nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
