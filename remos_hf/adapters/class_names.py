"""What a model calls its classes, beside what its data calls them: the same names in the same order, or it is said."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from datasets import ClassLabel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from remos_hf.adapters.timm_models import ImageClassifier, labels_of, timm_place
from remos_hf.adapters.transformers_models import adapter_for, write_class_names
from remos_hf.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_LABEL_COLUMNS = ("labels", "label")


def class_names(model: nn.Module) -> list[str] | None:
    """Give the names of a classifier's classes in the order of its outputs; None if it only numbers them.

    Args:
        model: Any model; one that is no classifier of transformers has no names.
    """
    config = _classifier_config(model)
    if config is None:
        return None
    names = [str(config.id2label.get(number, number)) for number in range(config.num_labels)]
    told = all(name.removeprefix("LABEL_") != str(number) for number, name in enumerate(names))
    return names if told else None


def num_classes(model: nn.Module) -> int | None:
    """Give the number of classes that a classifier of transformers or timm tells apart; None of any other module."""
    config = _classifier_config(model)
    if config is not None:
        return config.num_labels
    return labels_of(model) if isinstance(model, ImageClassifier) or timm_place(model) is not None else None


def take_class_names(model: nn.Module, dataset: Any) -> None:  # noqa: ANN401 - any data set, also none of `datasets`
    """Write the names of the data's classes into the config of a model that has none of its own.

    Args:
        model: The student.
        dataset: Its data. Without a `ClassLabel` column "labels" or "label" nothing is known, and nothing done.

    Raises:
        ValueError: The model has the same names in another order, so its head would mean other classes.
    """
    features = getattr(dataset, "features", None) or {}
    feature = next((features[name] for name in _LABEL_COLUMNS if isinstance(features.get(name), ClassLabel)), None)
    config = _classifier_config(model)
    if feature is None or config is None:
        return
    names, own = list(feature.names), class_names(model)
    if config.num_labels != len(names) or names == [str(number) for number in range(len(names))]:
        return
    if own is None:
        write_class_names(config, names)
        logger.info("The student's classes are named as its data names them: %s.", ", ".join(names))
    elif not same_names(own, names):
        check_class_order(own, names, "The data")
        logger.warning(
            "The student says that its classes are %s, but its data calls them %s. If the first are the teacher's, "
            "start with with_new_head(teacher, %d, seed=0, labels=%s).",
            own,
            names,
            len(names),
            names,
        )


def check_class_order(own: Sequence[str], names: Sequence[str], source: object) -> None:
    """Refuse data that numbers a model's classes otherwise.

    Args:
        own: The model's names in the order of its outputs.
        names: The data's.
        source: For messages.

    Raises:
        ValueError: The names are the same, but in another order.
    """
    if not same_names(own, names) and sorted(map(str.casefold, own)) == sorted(map(str.casefold, names)):
        raise ValueError(
            f"{source} has the classes {list(names)}, and the model the same ones in another order, {list(own)}: what "
            "one calls class 0 is another class for the other. Give the data the model's order, "
            "dataset.align_labels_with_mapping(model.config.label2id, 'label'), or the model a new head, "
            "with_new_head(model, ..., labels=...)."
        )


def check_classes(own: Sequence[str] | None, outputs: int | None, names: Sequence[str], source: object) -> None:
    """Refuse to measure a model by labels that are not the numbers of its outputs.

    Args:
        own: The model's names in the order of its outputs; None if it has none.
        outputs: How many classes it tells apart; None if nobody knows.
        names: The data's names in the order of their numbers.
        source: The data, for messages.

    Raises:
        ValueError: The data names another number of classes, or the same ones in another order.
    """
    if outputs is not None and outputs != len(names):
        told = f", {list(own)}" if own else ""
        raise ValueError(
            f"{source} has the {len(names)} classes {list(names)}, but the model tells {outputs} apart{told}. A class "
            "that the samples lack counts, too: give them the numbers of the model's classes by "
            "remos_hf.auditing.labels.by_name(samples, 'samples', [all names in order], 'the model')."
        )
    if own is None or same_names(own, names):
        return
    check_class_order(own, names, source)
    logger.warning(
        "The model calls its classes %s and the samples %s: they are matched by number.", list(own), list(names)
    )


def put_in_order(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Give a classifier the names of its classes; where its trained head knows the same ones, that is put in order.

    Args:
        model: The classifier, with as many outputs as there are names. Its head and its config change.
        names: The names, in the order of the data's numbers.

    Returns:
        Whether the head's classes are these: False if it was trained on other ones.

    Raises:
        UnsupportedModelError: The order of the head's outputs cannot be changed, as the last layer is no Linear.
    """
    own = class_names(model)
    known = own is None or sorted(map(str.casefold, own)) == sorted(map(str.casefold, names))
    if own is not None and known and not same_names(own, names):
        folded = [name.casefold() for name in own]
        order = torch.tensor([folded.index(name.casefold()) for name in names])
        last = model.get_submodule(adapter_for(model).feature_layer())
        if not isinstance(last, nn.Linear) or last.out_features != len(names):
            raise UnsupportedModelError(
                f"{type(model).__name__} has the classes {own} and the data {list(names)}, but the order of its head's "
                "outputs cannot be changed. Number the data's classes as the model does."
            )
        with torch.no_grad():
            for weight in last.parameters(recurse=False):
                weight.copy_(weight[order.to(weight.device)].clone())
    write_class_names(model.config, names)
    return known


def same_names(own: Sequence[str], names: Sequence[str]) -> bool:
    """Whether both are the same names in the same order, capitals aside: teachers write POSITIVE."""
    return [name.casefold() for name in own] == [name.casefold() for name in names]


def _classifier_config(model: nn.Module) -> PretrainedConfig | None:
    # The config of any model of transformers holds labels, those of two by default.
    config = getattr(model, "config", None)
    return config if isinstance(config, PretrainedConfig) and "Classification" in type(model).__name__ else None
