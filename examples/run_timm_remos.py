# /// script
# requires-python = ">=3.10"
# dependencies = ["remos_hf[vision]", "accelerate", "datasets", "torch", "torchvision", "transformers"]
# ///
r"""Fine-tune any image classifier on images of your own, without inheriting what their task does not need.

The form of run_glue_remos.py, for timm: any teacher by its id, augmentations from timm, any data set of the Hub or
folder of images, and two arguments more: `--slice_ratio`, the share of the teacher's weights that the student keeps,
and `--strategy`.

A folder with `train` and `validation` (or `val`, or `test`) in it, and in each of them a folder of images for a class:

    accelerate launch examples/run_timm_remos.py --model resnet18 --dataset imagefolder:path/to/folder \
        --do_train --do_eval --slice_ratio 0.9 --output_dir student

One folder of classes, a tenth of which is held out; a data set of the Hub; a teacher of transformers:

    ... --dataset imagefolder:flowers --validation_share 0.1
    ... --dataset uoft-cs/cifar10 --image_column img --validation_split test
    ... --model google/vit-base-patch16-224

`--slice_ratio auto` finds the ratio: it first trains at up to five ratios and plainly, for half the steps each, and
keeps the smallest that costs no more than `--accuracy_budget` (0.02) of the accuracy on the validation images. It needs
`--do_eval`, and the accuracy to report is then that on other images.

What the student would be without slicing: `--strategy finetune`. The arguments can also come from a file:
`run_timm_remos.py arguments.yaml` (or .json). What `accelerate launch` must be told where there is no config file, for
one process or several, is in run_glue_remos.py. `--bf16`, `--gradient_accumulation_steps`, `--dataloader_num_workers`
and all else that Trainer takes work as they do there; the slice is the same on any number of processes.

The recipe is that of the ReMoS artifact (CV_adv/examples/remos.sh:4-30) unless arguments say otherwise: plain SGD with
learning rate 5e-3 (times 10 for the head), no momentum, weight decay 1e-4, 64 samples a step, 30,000 steps at a
constant rate, label smoothing 0.1, random resized crops and flips in training, the centre crop in evaluation and for
the coverage. Differs:

- The paper's text names other learning rates (1e-2 and 1e-1); no published script has them. The ResNet-50 scripts
  (CV_backdoor) train the head at the body's rate, for 10,000 steps: `--head_lr_factor 1 --max_steps 10000`.
- The artifact drops channels after each stage with probability 0.1; here nothing is dropped.
- Trainer decays no biases and no layer norms; the artifact decays all parameters.
- Crop, size and interpolation are the teacher's own, as timm resolves them; the artifact's are 224 of 256 pixels.
- There is no default slice ratio: the published scripts keep 0.9 and 0.97.

A rerun with the same `--output_dir` goes on from the last checkpoint there; its slice is read, never chosen again.

A student of timm is a plain checkpoint again. `image_classifier.json` beside it says which model it is, what its labels
are called and how it reads images:

    student = remos_hf.image_classifier("resnet18", checkpoint_path="student/model.safetensors").body
    run_timm_remos.py --model resnet18 --checkpoint student/model.safetensors --do_eval --dataset ...

A student of transformers is loaded by `AutoModelForImageClassification.from_pretrained("student")`.

Where `remos_hf.fit` is the better choice: a plain torch loop without Trainer, optimizers and schedulers of timm, a loss
of your own, a module that is not to be wrapped. `fit(body, samples, slice_ratio=0.9, epochs=3, optimizer=partial(
timm.optim.create_optimizer_v2, opt="lamb", lr=5e-3))` takes (image, label) samples, and slices by the same rule; it has
no trackers, no Hub and no TrainingArguments.

The whole path in seconds, offline, on a tiny net of random weights:
`python examples/run_timm_remos.py --smoke --output_dir smoke`

Minutes: those of plain fine-tuning, and one pass over the training data without gradients.
Expected: benchmarks/README.md has what was measured with real teachers.
"""

import copy
import difflib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from PIL import Image as PillowImage
from timm.data import create_transform
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PretrainedConfig,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as hf_logging

from remos_hf import (
    STRATEGIES,
    Finetune,
    ImageClassifier,
    ImageInput,
    RemosTrainer,
    Strategy,
    image_classifier,
    image_input_of,
    load_teacher,
    teacher_config,
)
from remos_hf.adapters.guarded_loading import teacher_folder
from remos_hf.adapters.images import as_mode, decoded
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.auditing.class_folders import IMAGES, class_folders, is_image
from remos_hf.auditing.labels import by_name
from remos_hf.defects.image_samples import whole_images

logger = logging.getLogger(__name__)

FOLDER = "imagefolder:"
# Where each split is looked for, in this order, in folders and on the Hub.
PLACES = {"train": ("train",), "eval": ("validation", "valid", "val", "test")}
TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:", "timm/")
STUDENT_FILE = "image_classifier.json"
SMOKE_ARGUMENTS = (
    "--do_train --do_eval --use_cpu --max_steps 4 --per_device_train_batch_size 8 --save_strategy no --report_to none "
    "--disable_tqdm True --model test_resnet --no_pretrained --input_size 32"
).split()


@dataclass
class ModelArguments:
    """Which teacher the student starts from."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "The teacher: an id of timm (resnet18, hf-hub:owner/name), or a folder or Hub id of an image "
            "classifier of transformers. Its weights must be safetensors."
        },
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of a teacher of transformers."}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "A local safetensors file to load into the model of timm, or a student's."}
    )
    no_pretrained: bool = field(default=False, metadata={"help": "Start from random weights."})
    input_size: int | None = field(
        default=None, metadata={"help": "Side of what the model sees, in pixels; the teacher's own if left out."}
    )


@dataclass
class DataArguments:
    """Which images the student is trained and evaluated on."""

    dataset: str | None = field(
        default=None, metadata={"help": "imagefolder:path/to/folder, or the id of a data set on the Hub."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set on the Hub."})
    image_column: str | None = field(default=None, metadata={"help": "Found by its type if left out."})
    label_column: str | None = field(default=None, metadata={"help": "'label', or found by its type, if left out."})
    train_split: str | None = field(default=None, metadata={"help": "'train' if left out."})
    validation_split: str | None = field(
        default=None, metadata={"help": f"The first of {', '.join(PLACES['eval'])} if left out."}
    )
    validation_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of each class's training images that is held out where there are no others, in [0, 1)."
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of what is held out, and of --max_*_samples."})
    skip_corrupt: bool = field(default=False, metadata={"help": "Leave out images that do not decode, and count them."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Likewise."})
    smoke: bool = field(
        default=False, metadata={"help": "Run everything on a few tiny images, and a tiny net: offline, in seconds."}
    )


@dataclass
class AugmentArguments:
    """What is done to a training image. The defaults are torchvision's crop and flip, which the artifact uses."""

    augment: str = field(
        default="timm", metadata={"help": "'none' trains on the crop of the evaluation.", "choices": ["timm", "none"]}
    )
    scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Smallest and largest share of the area to crop out."}
    )
    ratio: list[float] = field(
        default_factory=lambda: [3 / 4, 4 / 3], metadata={"help": "Least and largest width over height of the crop."}
    )
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    train_interpolation: str | None = field(
        default=None, metadata={"help": "bilinear, bicubic, random, ...; the teacher's own if left out."}
    )
    color_jitter: float = field(default=0.0, metadata={"help": "Strength of timm's colour jitter; timm's own is 0.4."})
    auto_augment: str | None = field(
        default=None, metadata={"help": "A policy as timm writes it, such as rand-m9-mstd0.5-inc1."}
    )
    reprob: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle."})
    remode: str = field(
        default="const", metadata={"help": "What it is filled with.", "choices": ["const", "rand", "pixel"]}
    )


@dataclass
class RemosArguments:
    """How the student starts. What is left out takes the strategy's own default."""

    strategy: str = field(
        default="remos", metadata={"help": "How the student starts from the teacher.", "choices": list(STRATEGIES)}
    )
    slice_ratio: str | None = field(
        default=None,
        metadata={
            "help": "Share of the teacher's weights to keep, in (0, 1], or 'auto', which tries several on the "
            "evaluation data. Published: 0.9 and 0.97."
        },
    )
    accuracy_budget: float | None = field(
        default=None, metadata={"help": "With --slice_ratio auto: accuracy that slicing may cost, a share; else 0.02."}
    )
    scope: str | None = field(
        default=None, metadata={"help": "'model': all weights compete; 'layer': each layer is cut by itself."}
    )
    ties: str | None = field(
        default=None, metadata={"help": "'mean': equal weights share their rank; 'artifact': the published order."}
    )
    criterion: str | None = field(
        default=None, metadata={"help": "When a neuron is covered: median (default), nc, tknc, snac."}
    )
    criterion_value: float | None = field(default=None, metadata={"help": "The threshold of nc, the k of the others."})
    reset_to: str | None = field(default=None, metadata={"help": "'zero', or 'init' for fresh values."})
    profile_samples: int | None = field(
        default=None, metadata={"help": "Training samples that decide the coverage; all of them if left out."}
    )
    slice_seed: int | None = field(default=None, metadata={"help": "Seed of random rules and of fresh values."})


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments with the defaults of the ReMoS artifact, CV_adv/examples/remos.sh:4-30."""

    optim: str = field(default="sgd", metadata={"help": "The artifact's is sgd, without momentum."})
    learning_rate: float = field(default=5e-3, metadata={"help": "The artifact's is 5e-3."})
    head_lr_factor: float = field(
        default=10.0, metadata={"help": "The head's learning rate over the body's. The artifact's is 10 (ResNet-18)."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The artifact's is constant."})
    weight_decay: float = field(default=1e-4, metadata={"help": "The artifact's is 1e-4."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0 clips nothing: the artifact's SGD is plain."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "The artifact's is 0.1."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "The artifact's is 64, on one device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Changes nothing but the speed."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "Counts unless --max_steps is given."})
    max_steps: int = field(
        default=-1, metadata={"help": "Steps; the artifact's 30,000 unless this or --num_train_epochs is given."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self) -> None:
        """Settle how long to train."""
        if self.num_train_epochs is None:
            self.num_train_epochs, self.max_steps = 3.0, 30_000 if self.max_steps <= 0 else self.max_steps
        super().__post_init__()


@dataclass
class Arguments:
    """All that was asked for."""

    model: ModelArguments
    data: DataArguments
    augment: AugmentArguments
    remos: RemosArguments
    training: RecipeArguments


class ImageSamples(torch.utils.data.Dataset):
    """Images as a model takes them, decoded where they are used.

    Args:
        rows: With an undecoded `image` and a `label` column.
        labels: Names of the labels in the order of the model's outputs.
        images: How the model reads images.
        augment: From a decoded image to what the model takes, in training; None for the crop of evaluation.
    """

    def __init__(
        self,
        rows: Dataset,
        labels: list[str],
        images: ImageInput,
        augment: Callable[[PillowImage.Image], Tensor] | None = None,
    ) -> None:
        number_of = [labels.index(name) for name in rows.features["label"].names]
        self.labels = [number_of[label] for label in rows["label"]]
        self.rows, self.images, self.augment = rows, images, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.rows[index]["image"]
        image = decoded(found, found.get("path") or f"the image of row {index}")
        if self.augment is not None:
            values = self.augment(as_mode(image, "RGB" if self.images.channels == 3 else "L"))
        else:
            values = self.images.normalised(self.images.pixels(image))
        return {"pixel_values": values, "labels": self.labels[index]}


class ImageTrainer(RemosTrainer):
    """RemosTrainer whose head learns `head_lr_factor` times as fast as its body."""

    def create_optimizer(self, *given: Any) -> Optimizer:  # noqa: ANN401 - Trainer's own
        """Make Trainer's optimizer, and give the head's parameters groups of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*given)
        factor = self.args.head_lr_factor
        if not is_new or factor == 1:
            return optimizer
        modules = [self.model.get_submodule(name) for name in adapter_for(self.model).head]
        head = {id(parameter) for module in modules for parameter in module.parameters()}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in head]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                optimizer.add_param_group({**group, "params": own, "lr": factor * group["lr"]})
        return optimizer


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate as the command line (or `argv`) asks."""
    given = parse_arguments(sys.argv[1:] if argv is None else argv)
    args = given.training
    configure_logging(args)
    # A student that is only evaluated was started when it was trained.
    strategy = strategy_from(given.remos) if args.do_train else Finetune()
    if given.data.smoke:
        given.data = smoke_inputs(given.data, args)
    check_arguments(given)
    set_seed(args.seed)

    splits = load_splits(given.data, args)
    model, processor, labels = prepared_teacher(given.model, args, next(iter(splits.values())).features["label"].names)
    images = reading(model, given.model.input_size)
    samples = {name: ImageSamples(split, labels, images) for name, split in splits.items()}
    profiled = samples.get("train")
    if args.do_train:
        samples["train"] = ImageSamples(splits["train"], labels, images, augmentation(given.augment, images))

    trainer = ImageTrainer(
        model,
        trainer_arguments(args, model),
        strategy=strategy,
        **search_from(given.remos, args),
        train_dataset=samples.get("train"),
        profile_dataset=profiled,  # as in the artifact: the training images, with the transforms of evaluation
        eval_dataset=samples.get("eval"),
        processing_class=processor,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=best_labels,
        compute_metrics=measures_of(len(labels)),
    )
    if args.do_train:
        train(trainer)
        describe_student(trainer, given.model, labels, images)
    if args.do_eval:
        report(trainer, "eval", trainer.evaluate(), samples["eval"])
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()  # a process that leaves its group to the interpreter's end may abort there


def parse_arguments(argv: list[str]) -> Arguments:
    """Read the arguments from the command line, or from the one json or yaml file that it names."""
    parser = HfArgumentParser((ModelArguments, DataArguments, AugmentArguments, RemosArguments, RecipeArguments))
    if len(argv) == 1 and argv[0].endswith(".json"):
        return Arguments(*parser.parse_json_file(argv[0]))
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return Arguments(*parser.parse_yaml_file(argv[0]))
    if "--smoke" in argv:
        ratio = [] if any(part.startswith("--strategy") for part in argv) else ["--slice_ratio", "0.9"]
        argv = [*SMOKE_ARGUMENTS, *ratio, *argv]  # what is given twice counts as given last
    return Arguments(*parser.parse_args_into_dataclasses(argv))


def configure_logging(args: TrainingArguments) -> None:
    """Let the main process say what was sliced and how long it took; of the others only what goes wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in (__name__, "remos_hf"):
        logging.getLogger(name).setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    if args.process_index != 0:
        hf_logging.set_verbosity_error()
    logger.info("Processes: %d. This one runs on %s.", args.world_size, args.device)


def strategy_from(arguments: RemosArguments) -> Strategy:
    """Make the strategy that the arguments describe.

    Raises:
        ValueError: The strategy is unknown, lacks its slice ratio, or does not take one of the arguments.
    """
    chosen = arguments.strategy
    if chosen not in STRATEGIES:
        raise ValueError(f"--strategy is one of {', '.join(STRATEGIES)}, but got {chosen!r}.")
    field_of = {"profile_samples": "max_samples", "slice_seed": "seed"}
    if arguments.accuracy_budget is not None and arguments.slice_ratio != "auto":
        raise ValueError(
            f"--accuracy_budget goes with --slice_ratio auto, but got --slice_ratio {arguments.slice_ratio}."
        )
    described = {**vars(arguments), "slice_ratio": ratio_from(arguments.slice_ratio)}
    apart = ("strategy", "accuracy_budget")
    given = {name: value for name, value in described.items() if name not in apart and value is not None}
    takes = {key: {item.name for item in fields(kind)} for key, kind in STRATEGIES.items()}
    for name, value in given.items():
        if field_of.get(name, name) not in takes[chosen]:
            others = [key for key in takes if field_of.get(name, name) in takes[key]]
            raise ValueError(
                f"--strategy {chosen} takes no --{name}, but got {value}. Leave it out, or choose a strategy that "
                f"takes it: {', '.join(others)}."
            )
    if "slice_ratio" in takes[chosen] - given.keys():
        raise ValueError(
            f"--strategy {chosen} needs --slice_ratio, the share of the teacher's weights that the student keeps, in "
            "(0, 1]. There is no default, since the published scripts vary: 0.9 and 0.97."
        )
    return STRATEGIES[chosen](**{field_of.get(name, name): value for name, value in given.items()})


def ratio_from(text: str | float | None) -> float | None:
    """Read a slice ratio; what "auto" finds replaces the 1.0 that it stands for.

    Raises:
        ValueError: It is neither a number nor "auto".
    """
    if text is None or text == "auto":
        return text and 1.0
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--slice_ratio is a number in (0, 1], or auto, but got {text!r}.") from None


def search_from(arguments: RemosArguments, args: TrainingArguments) -> dict[str, Any]:
    """Give what RemosTrainer is told where it is to find the ratio by itself."""
    if not args.do_train or arguments.slice_ratio != "auto":
        return {}
    return {"slice_ratio": "auto", "accuracy_budget": arguments.accuracy_budget}


def check_arguments(given: Arguments) -> None:
    """Refuse what cannot run, before anything is loaded.

    Raises:
        ValueError: An argument is missing or out of range.
    """
    if given.model.model is None:
        raise ValueError("--model is missing: name the teacher, an id of timm or an image classifier of transformers.")
    if given.data.dataset is None:
        raise ValueError(f"--dataset is missing: pass {FOLDER}path/to/folder, or the id of a data set on the Hub.")
    if not (given.training.do_train or given.training.do_eval):
        raise ValueError("There is nothing to do: pass one or both of --do_train and --do_eval.")
    if given.model.checkpoint is not None and given.model.no_pretrained:
        raise ValueError("--checkpoint loads weights and --no_pretrained loads none: pass one of them.")
    if not 0 <= given.data.validation_share < 1:
        raise ValueError(
            f"--validation_share is a share of the training images, in [0, 1), but got {given.data.validation_share}."
        )
    for name in ("scale", "ratio"):
        values = getattr(given.augment, name)
        if len(values) != 2 or not 0 < values[0] <= values[1]:
            raise ValueError(f"--{name} is two numbers above 0, the smaller one first, but got {values}.")
    for name in ("hflip", "reprob"):
        if not 0 <= getattr(given.augment, name) <= 1:
            raise ValueError(f"--{name} is a probability, in [0, 1], but got {getattr(given.augment, name)}.")


def load_splits(data_args: DataArguments, args: TrainingArguments) -> dict[str, Dataset]:
    """Load what was asked for, as files hold it: an undecoded `image` and a `label` column.

    Returns:
        Datasets by "train" and "eval". Both have the same labels.

    Raises:
        ValueError: A split or a column is missing, or a validation image has a class that no training image has.
    """
    if data_args.dataset.startswith(FOLDER):
        splits = read_folder(Path(data_args.dataset.removeprefix(FOLDER)))
    else:
        with args.main_process_first(desc="download of the data"):
            splits = load_from_hub(data_args)
    splits = checked(splits)
    if "eval" not in splits and data_args.validation_share > 0:
        splits = hold_out(splits["train"], data_args.validation_share, data_args.split_seed)
        logger.info("Held out %d of %d images.", len(splits["eval"]), sum(map(len, splits.values())))
    limits = {"train": data_args.max_train_samples, "eval": data_args.max_eval_samples}
    found = {}
    for name, places in PLACES.items():
        if not getattr(args, f"do_{name}"):
            continue
        if name not in splits:
            raise ValueError(
                f"--do_{name} needs images to {name} on, but {data_args.dataset} holds none of {', '.join(places)}."
            )
        split = whole_images(splits[name]) if data_args.skip_corrupt else splits[name]
        found[name] = drawn(split, limits[name], data_args.split_seed)
    if args.do_train and len(set(found["train"]["label"])) < 2:
        raise ValueError("All training images have the same label: there is nothing to learn.")
    return found


def read_folder(folder: Path) -> dict[str, Dataset]:
    """Read a folder of splits, or one of classes, which is all "train".

    Raises:
        ValueError: There is no such folder, or no image in one of its classes, or only one class.
    """
    if not folder.is_dir():
        raise ValueError(f"--dataset {FOLDER}<folder> names a folder of images, but there is no folder {folder}.")
    places = {
        split: next((folder / name for name in names if class_folders(folder / name)[0]), None)
        for split, names in PLACES.items()
    }
    if not any(places.values()):  # a class may be called "train": it holds no folders
        return {"train": read_classes(folder)}
    return {split: read_classes(place) for split, place in places.items() if place is not None}


def read_classes(folder: Path) -> Dataset:
    """Read a folder that holds a folder of images, however deep, for each class. Files are not opened."""
    classes, odd = class_folders(folder)
    if odd:
        logger.warning("No classes, so left out of %s: %s", folder, ", ".join(odd))
    if len(classes) < 2:
        raise ValueError(
            f"{folder} should hold a folder of images for each of two or more classes, but holds "
            f"{[path.name for path in classes] or 'no folder'}."
        )
    files, labels = [], []
    for label, place in enumerate(classes):
        own = sorted(path for path in place.rglob("*") if is_image(path))
        if not own:
            raise ValueError(
                f"The class folder {place} holds no image ({', '.join(sorted(IMAGES))}). Delete or fill it."
            )
        files += map(str, own)
        labels += [label] * len(own)
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=[path.name for path in classes])})
    return Dataset.from_dict({"image": files, "label": labels}, features)


def load_from_hub(data_args: DataArguments) -> dict[str, Dataset]:
    """Load a data set of the Hub, which runs no code of it.

    Raises:
        ValueError: A split that was named is missing, or a column is missing or not clear.
    """
    hub = load_dataset(data_args.dataset, data_args.dataset_config)
    given = {"train": data_args.train_split, "eval": data_args.validation_split}
    for name in given.values():
        if name is not None and name not in hub:
            raise ValueError(f"{data_args.dataset} has the splits {', '.join(hub)}, but got {name!r}.")
    places = {split: given[split] or next((name for name in PLACES[split] if name in hub), None) for split in PLACES}
    splits = {
        split: two_columns(hub[name], data_args.image_column, data_args.label_column)
        for split, name in places.items()
        if name is not None
    }
    if not splits:
        raise ValueError(f"{data_args.dataset} has the splits {', '.join(hub)}: name one by --train_split.")
    if isinstance(next(iter(splits.values())).features["label"], ClassLabel):
        return splits
    classes = sorted_labels(next(iter(splits.values())))
    return {name: with_class_labels(split, classes) for name, split in splits.items()}


def two_columns(split: Dataset, image_column: str | None, label_column: str | None) -> Dataset:
    """Keep the column of images, undecoded, as `image`, and that of labels as `label`.

    Raises:
        ValueError: A column is missing, or nothing says which it is.
    """
    if label_column is None and "label" in split.column_names:
        label_column = "label"
    columns = {}
    for option, kind, given in (("image", Image, image_column), ("label", ClassLabel, label_column)):
        found = [name for name, feature in split.features.items() if isinstance(feature, kind)]
        if given is None and len(found) != 1 or given is not None and given not in split.column_names:
            raise ValueError(
                f"--{option}_column names one of {split.column_names}, but got {given}"
                + (f", and {len(found)} of them hold {option}s: {found}." if given is None else ".")
            )
        columns[option] = found[0] if given is None else given
    split = split.select_columns(list(columns.values())).rename_columns({own: name for name, own in columns.items()})
    if not isinstance(split.features["image"], Image):
        raise ValueError(f"Column {columns['image']!r} holds no images, but {split.features['image']}.")
    return split.cast_column("image", Image(decode=False))


def sorted_labels(split: Dataset) -> list[str]:
    """Give the values of a label column without names, numbers in their order.

    Raises:
        ValueError: They are neither whole numbers nor texts, or one is missing.
    """
    feature = split.features["label"]
    if not isinstance(feature, Value) or not feature.dtype.startswith(("int", "uint", "string", "large_string")):
        raise ValueError(f"Labels are classes, whole numbers or texts, but the label column holds {feature}.")
    values = split.unique("label")
    if None in values:
        raise ValueError("A training image has no label, but training needs all of them.")
    return [str(value) for value in sorted(values)]


def with_class_labels(split: Dataset, classes: list[str]) -> Dataset:
    """Number the labels of a split.

    Raises:
        ValueError: A label is not among the classes.
    """
    number_of = {name: number for number, name in enumerate(classes)}
    values = [str(value) for value in split["label"]]
    strange = sorted(set(values) - set(classes))
    if strange:
        raise ValueError(
            f"The validation images have the label {strange[0]!r}, but the training images have {classes}."
        )
    features = Features({"label": ClassLabel(names=classes)})
    numbered = Dataset.from_dict({"label": [number_of[value] for value in values]}, features)
    return concatenate_datasets([split.select_columns(["image"]), numbered], axis=1)


def checked(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Number the classes as in the training images; refuse images without a class, or with one that was not trained.

    Raises:
        ValueError: There are such images, or a split holds none.
    """
    for name, split in splits.items():
        if not len(split):
            raise ValueError(f"The {name} split holds no image.")
        if any(label is None or label < 0 for label in split["label"]):
            raise ValueError(f"An image of the {name} split has no class. Name another split by --validation_split.")
    if len(splits) < 2:
        return splits
    told = ("The validation split", "the training split")
    return {**splits, "eval": by_name(splits["eval"], told[0], splits["train"], told[1])}


def hold_out(data: Dataset, share: float, seed: int) -> dict[str, Dataset]:
    """Hold out a share of each class, at least one image of it, for the evaluation.

    Raises:
        ValueError: A class has only one image.
    """
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(data["label"]):
        rows.setdefault(label, []).append(row)
    generator, held = torch.Generator().manual_seed(seed), set()
    for label in sorted(rows):
        own = rows[label]
        if len(own) < 2:
            raise ValueError(
                f"The class {data.features['label'].names[label]!r} has one image, of which none can be held out. Give "
                "validation images of their own, or --validation_share 0 to train without them."
            )
        count = min(len(own) - 1, max(1, round(share * len(own))))
        held.update(own[place] for place in torch.randperm(len(own), generator=generator)[:count].tolist())
    kept = [row for row in range(len(data)) if row not in held]
    return {"train": data.select(kept), "eval": data.select(sorted(held))}


def drawn(split: Dataset, limit: int | None, seed: int) -> Dataset:
    """Draw so many samples, in their order: the first ones would be those of the first class."""
    if limit is None or limit >= len(split):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.select(sorted(order[:limit].tolist()))


def prepared_teacher(
    model_args: ModelArguments, args: RecipeArguments, classes: list[str]
) -> tuple[nn.Module, BaseImageProcessor | None, list[str]]:
    """Load the teacher with a head for the classes. The teacher is untrusted: safetensors only, no pickle.

    Args:
        model_args: Which teacher.
        args: Whether it is trained, so that a head of another size may be replaced; the seed of that head.
        classes: The data's classes.

    Returns:
        The model, what is saved beside it to say how it reads images (None for timm), and the classes in the order of
        the model's outputs: its own order where it knows the same classes.

    Raises:
        ValueError: There is no such model, or it is only evaluated and has another number of labels.
    """
    name = model_args.model
    of_transformers = (Path(name) / "config.json").is_file() or ("/" in name and not name.startswith(TIMM_SOURCES))
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"The folder {name} has no config.json, so it is no model of transformers. A student of timm is loaded by "
            f"its id and its weights: --model resnet18 --checkpoint {name}/model.safetensors."
        )
    if of_transformers and model_args.checkpoint is not None:
        raise ValueError("--checkpoint goes with an id of timm. Name the folder of a model of transformers by --model.")
    if not of_transformers:
        model = load_timm(name.removeprefix("timm/"), model_args, args, len(classes))
        return model, None, classes
    return load_transformers(name, model_args, args, classes)


def load_timm(name: str, model_args: ModelArguments, args: RecipeArguments, num_labels: int) -> ImageClassifier:
    """Load a model of timm, whose own module smooths the labels."""
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm {timm.__version__} has no model {name!r}. Close to it: {', '.join(close) or 'none'}.")
    found = image_classifier(
        name,
        num_labels if args.do_train else None,
        seed=args.seed,
        pretrained=not model_args.no_pretrained,
        checkpoint_path=model_args.checkpoint,
    )
    check_num_labels(found.body.num_classes, num_labels)
    return ImageClassifier(found.body, found.head, args.label_smoothing_factor)


def load_transformers(
    name: str, model_args: ModelArguments, args: RecipeArguments, classes: list[str]
) -> tuple[nn.Module, BaseImageProcessor, list[str]]:
    """Load an image classifier of transformers and its image processor, and settle the order of its labels."""
    config = teacher_config(name, revision=model_args.model_revision)
    known = known_labels(config)
    labels = known if sorted(known) == sorted(classes) else classes
    if not args.do_train:
        check_num_labels(config.num_labels, len(labels))
    config.num_labels = len(labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    looked_at = teacher_folder(name, revision=model_args.model_revision).path
    processor = AutoImageProcessor.from_pretrained(looked_at, trust_remote_code=False)
    if model_args.input_size is not None:
        logger.warning(
            "The image processor beside the student keeps the teacher's size: pass --input_size %d to evaluate it.",
            model_args.input_size,
        )
    if model_args.no_pretrained:
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32), processor, labels
    model = load_teacher(
        name,
        AutoModelForImageClassification,
        revision=model_args.model_revision,
        num_labels=config.num_labels if args.do_train else None,
        config=config,
        dtype=torch.float32,
        seed=args.seed,
    )
    return model, processor, labels


def known_labels(config: PretrainedConfig) -> list[str]:
    """Give the labels of a model of transformers in their order; numbers where it only numbers them."""
    return [str(config.id2label[number]).removeprefix("LABEL_") for number in range(config.num_labels)]


def check_num_labels(found: int, expected: int) -> None:
    """Refuse to evaluate a model that does not know the classes.

    Raises:
        ValueError: It has another number of labels.
    """
    if found != expected:
        raise ValueError(
            f"The model has {found} labels, but the data has {expected} classes. A new head is only made to be "
            "trained: add --do_train, or name the student by --checkpoint (timm) or --model (transformers)."
        )


def reading(model: nn.Module, input_size: int | None) -> ImageInput:
    """Say how the teacher's images were prepared, at another size if asked to.

    Raises:
        ValueError: The model takes no images of that size.
    """
    images = image_input_of(model)
    if input_size is None:
        return images
    images = replace(images, size=(input_size, input_size))
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, images.channels, input_size, input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{type(getattr(model, 'body', model)).__name__} takes no images of {input_size} pixels ({error}). Leave "
            "--input_size out, or choose one that it takes."
        ) from error
    model.train(was_training)
    return images


def augmentation(arguments: AugmentArguments, images: ImageInput) -> Callable[[PillowImage.Image], Tensor] | None:
    """Make timm's training transform, which normalises as the model reads images; None if there is none.

    timm erases after it normalised, and fills with the mean colour what a policy leaves empty, so it is told both.
    """
    if arguments.augment == "none":
        return None
    return create_transform(
        (images.channels, *images.size),
        is_training=True,
        scale=tuple(arguments.scale),
        ratio=tuple(arguments.ratio),
        hflip=arguments.hflip,
        color_jitter=arguments.color_jitter or None,
        auto_augment=arguments.auto_augment,
        interpolation=arguments.train_interpolation or images.interpolation,
        mean=images.mean,
        std=images.std,
        re_prob=arguments.reprob,
        re_mode=arguments.remode,
    )


def trainer_arguments(args: RecipeArguments, model: nn.Module) -> RecipeArguments:
    """Leave the label smoothing to the model where it smooths itself; Trainer's looks for a config that it lacks."""
    args = copy.copy(args)
    if isinstance(model, ImageClassifier):
        args.label_smoothing_factor = 0.0
    return args


def best_labels(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Give the (up to) five likeliest labels, best first, which takes less memory than all logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits  # some models give hidden states after them
    return logits.topk(min(5, logits.shape[-1])).indices


def measures_of(num_labels: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """Give the function that measures accuracy and, where it says something, whether the label is among five."""

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        hits = np.asarray(prediction.predictions) == np.asarray(prediction.label_ids)[:, None]
        measured = {"accuracy": float(hits[:, 0].mean())}
        return {**measured, "top5_accuracy": float(hits.any(1).mean())} if num_labels > 5 else measured

    return measure


def train(trainer: RemosTrainer) -> None:
    """Train, from the last checkpoint in the output folder if there is one, and save the student with its sidecars."""
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint is None and Path(trainer.args.output_dir).is_dir():
        checkpoint = get_last_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:
        logger.info("Going on from %s. To start anew, choose another --output_dir.", checkpoint)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    report(trainer, "train", result.metrics, trainer.train_dataset)
    trainer.save_state()


def describe_student(trainer: RemosTrainer, model_args: ModelArguments, labels: list[str], images: ImageInput) -> None:
    """Say how the student is loaded; beside one of timm, whose file holds weights only, say how it is used."""
    folder = Path(trainer.args.output_dir)
    if not trainer.is_world_process_zero():
        return
    if not isinstance(trainer.model, ImageClassifier):
        logger.info("Load the student: AutoModelForImageClassification.from_pretrained(%r)", str(folder))
        return
    name = model_args.model.removeprefix("timm/")
    described = {"model": name, "labels": labels, "images": images.to_dict()}
    (folder / STUDENT_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    weights = str(folder / "model.safetensors")
    logger.info("Load the student as a model of timm: image_classifier(%r, checkpoint_path=%r).body", name, weights)


def report(trainer: RemosTrainer, name: str, metrics: dict[str, float], samples: ImageSamples) -> None:
    """Log and save measured numbers with their sample count, also into `all_results.json`."""
    metrics = {**metrics, f"{name}_samples": len(samples)}
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)


def smoke_inputs(data_args: DataArguments, args: TrainingArguments) -> DataArguments:
    """Write tiny images into the output folder, and name them in a copy of the arguments."""
    folder = Path(args.output_dir) / "_smoke_inputs"  # push_to_hub leaves out what starts with an underscore
    with args.main_process_first(desc="smoke inputs"):
        if args.local_process_index == 0:
            write_smoke_inputs(folder)
    return replace(data_args, dataset=f"{FOLDER}{folder}")


def write_smoke_inputs(folder: Path) -> None:
    """Write 36 images of six colours: grey, transparent, and JPEG. The same pixels every time."""
    generator = torch.Generator().manual_seed(0)
    for name in ("blue", "green", "orange", "pink", "red", "white"):
        colour = torch.randint(60, 200, (1, 1, 3), generator=generator)
        for split, count in (("train", 4), ("validation", 2)):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                noise = torch.randint(-50, 50, (40, 48, 3), generator=generator)
                picture = PillowImage.fromarray((colour + noise).byte().numpy())
                if number < 2:
                    picture.convert(("L", "RGBA")[number]).save(place / f"{number}.png")
                else:
                    picture.save(place / f"{number}.jpg")


if __name__ == "__main__":
    main()
