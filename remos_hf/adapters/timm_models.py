"""Models of timm, bare or wrapped: which modules are the head, which layers a sample runs through, how they start."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from remos_hf.adapters.base import Adapter, inputs_of
from remos_hf.adapters.sequences import Sequence
from remos_hf.errors import UnsupportedModelError
from remos_hf.layers import Layer, sliceable_layers
from remos_hf.randomness import seeded

# Direct children of timm's models that hold the repeated blocks, and the name of a stage that is a child itself.
_BLOCK_LISTS = ("blocks", "stages", "layers", "levels", "network", "transformers", "dense_stages")
_NUMBERED_BLOCK = re.compile(r"(layer|stage|block|denseblock|serial_blocks|level|s)[1-9]\d*")
# Parts that turn a table of positions into a bias: they run on coordinates, never on a sample, so nothing covers them.
_POSITION_NETWORKS = frozenset({"cpb_mlp", "meta_mlp", "rel_pos", "shared_rel_pos", "pos_proj", "token_projection"})
# Attention whose `qkv` rows are (head, part, head_dim); everywhere else in timm they are (part, head, head_dim).
_HEAD_FIRST_MODULES = frozenset({"tiny_vit"})
BODY = "body."


class ImageClassifier(nn.Module):
    """Any image classifier that returns logits, as `transformers.Trainer` and `RemosTrainer` take it.

    `Trainer.save_model` writes its weights as `model.safetensors`, each name with "body." before it. Three ways back:

        image_classifier("resnet18", checkpoint_path="out/model.safetensors")  # timm id; the labels are the file's
        safetensors.torch.load_model(ImageClassifier(body), "out/model.safetensors")  # any body of the same shape
        body.load_state_dict({name.removeprefix("body."): weight for name, weight in load_file(...).items()})

    `student.body` is the plain module; its state dict is what timm (or whoever made it) calls a checkpoint.

    Attributes:
        body: The classifier itself.
        head: Dotted names, within `body`, of the modules that are never sliced.
        label_smoothing: As in `torch.nn.functional.cross_entropy`, in [0, 1).

    Args:
        body: Takes images (samples, channels, height, width), returns logits (samples, labels).
        head: Dotted names of its task-specific last modules. None asks timm's models, which know it.
        label_smoothing: In [0, 1). 0.1 is the ReMoS artifact's default.

    Raises:
        UnsupportedModelError: The body names no head, or is wrapped, or is a model of transformers already.
        ValueError: `head` names what is not there, or the smoothing is out of range.
    """

    def __init__(self, body: nn.Module, head: tuple[str, ...] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if isinstance(body, (PreTrainedModel, ImageClassifier)):
            raise UnsupportedModelError(
                f"{type(body).__name__} takes pixel_values and labels already: give it to the trainer as it is."
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share of the target, in [0, 1), but got {label_smoothing}.")
        if head is None and isinstance(body, nn.Module) and not is_timm(body):
            raise UnsupportedModelError(
                f"{type(body).__name__} does not say which modules are its head. Name them: "
                f"ImageClassifier(body, head=(...,)). Its direct children are "
                f"{[name for name, _ in body.named_children()]}."
            )
        adapter = TimmAdapter(body, head) if is_timm(body) else Adapter(body, head)
        if not adapter.head:
            raise UnsupportedModelError(
                f"{type(body).__name__} has no head, so it gives no logits. Give it one: "
                "image_classifier(model, num_labels=...)."
            )
        self.body, self.head, self.label_smoothing = body, adapter.head, float(label_smoothing)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: Normalised images, floating point, shape (samples, channels, height, width).
            labels: int64, shape (samples,), from 0 to the number of labels - 1.

        Returns:
            `logits`, shape (samples, labels), and `loss`, the mean cross-entropy, if labels are given.

        Raises:
            TypeError: The images are whole numbers, or the body returns something else than logits.
            ValueError: A label is out of range (looked at on the CPU only; a GPU would have to wait for it).
        """
        check_images(pixel_values)
        logits = self.body(pixel_values)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"The body must return logits of shape (samples, labels), but {type(self.body).__name__} returned "
                f"{found}. Wrap it in a module that returns its logits alone."
            )
        if labels is None:
            return ImageClassifierOutput(logits=logits)
        _check_labels(labels, *logits.shape)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return ImageClassifierOutput(loss=loss, logits=logits)


class TimmAdapter(Adapter):
    """A model of timm: bare, in transformers' TimmWrapper, or as the body of an `ImageClassifier`.

    Its head is what `get_classifier()` gives and what its configuration calls `classifier`; of models with a distilled
    head, both. Images have no padding, so every position counts.
    """

    @property
    def _place(self) -> tuple[str, nn.Module]:
        return timm_place(self.model)

    def _find_head(self) -> tuple[str, ...]:
        prefix, body = self._place
        return tuple(f"{prefix}{name}" for name in classifiers_of(body))

    def feature_layer(self) -> str:
        """Name the module whose input is the penultimate feature.

        Of models with a distilled head it is the first one, which reads the class token.

        Returns:
            Dotted name. The input has the shape (samples, features); (samples, features, 1, 1) where a 1x1 convolution
            classifies (DLA, DPN, ResNetV2).

        Raises:
            UnsupportedModelError: There is no head, or neither in it.
        """
        if self.head and isinstance(self.model.get_submodule(self.head[0]), nn.Conv2d):
            return self.head[0]
        return self._last_linear(self.head[:1])

    def _gives_channels_last(self, module: nn.Module) -> bool:
        maps = getattr(self._place[1], "output_fmt", None) == "NHWC"
        return super()._gives_channels_last(module) or (maps and not isinstance(module, (_ConvNd, _BatchNorm)))

    def layers(self, *, embeddings: bool = False) -> dict[str, Layer]:
        """Find the weights outside the head that can be sliced, by module name in registration order.

        Parts that run on coordinates instead of samples (Swin V2's `cpb_mlp` and its like) are left alone.

        Args:
            embeddings: Changes nothing: images have no tokens.
        """
        found = sliceable_layers(self.model, exclude=self.head)
        return {
            name: self._as_stacked(layer)
            for name, layer in found.items()
            if _POSITION_NETWORKS.isdisjoint(name.split("."))
        }

    def _as_stacked(self, layer: Layer) -> Layer:
        parent, _, name = layer.name.rpartition(".")
        if name != "qkv" or not isinstance(layer.module, nn.Linear):
            return layer
        attention = self.model.get_submodule(parent)
        width = getattr(getattr(attention, "proj", None), "in_features", 0)
        if not layer.part_sizes and 3 * width == layer.out_neurons:  # MViTv2, Hiera: wider than what they read
            layer = replace(layer, part_sizes=(width,) * 3)
        file = type(attention).__module__.rpartition(".")[2]
        head_first = getattr(attention, "head_first", file in _HEAD_FIRST_MODULES)
        return replace(layer, part_heads=attention.num_heads) if layer.part_sizes and head_first else layer

    def forward(self, batch: Any, *, hidden_states: bool = False) -> Any:  # noqa: ANN401 - any batch, any output
        """Run the model on the images of a batch, leaving labels out.

        BEiT, EVA and Swin V2 keep the bias of `qkv` in parts beside it and never call that layer; while this runs, the
        bias lies in the layer, so that it is called. The outputs are the same.

        Args:
            batch: Images, an (images, ...) tuple, or a mapping with `pixel_values` (or one tensor that is no label).
            hidden_states: Not known to timm.

        Raises:
            TypeError: There is no image tensor, or it holds whole numbers.
            UnsupportedModelError: Hidden states are asked for.
        """
        if hidden_states:
            raise UnsupportedModelError(
                f"{type(self._place[1]).__name__} is a model of timm and has no hidden states that remos_hf knows. "
                "Use source='hooks'."
            )
        images = self._images_of(batch) if isinstance(batch, Mapping) else inputs_of(batch)
        check_images(images)
        with _bias_in_qkv(self._place[1]):
            return self.model(images)

    def _images_of(self, batch: Mapping) -> Any:  # noqa: ANN401 - checked by the caller
        tensors = {key: one for key, one in batch.items() if isinstance(one, Tensor) and not self._is_label(key)}
        if "pixel_values" in tensors:
            return tensors["pixel_values"]
        if len(tensors) != 1:
            raise TypeError(
                f"A batch of images must hold `pixel_values`, or one tensor beside its labels, but got {sorted(batch)}."
            )
        return next(iter(tensors.values()))

    def sequences(self, batch: Any) -> dict[str, Sequence]:  # noqa: ANN401 - any batch
        """Say that images have no sequence and no padding: always empty."""
        return {}

    def blocks(self) -> dict[str, nn.Module]:
        """Give the repeated blocks (ViT) or stages (convolutional nets, Swin), by name, first to last.

        Raises:
            UnsupportedModelError: The model keeps them under no name that timm uses elsewhere.
        """
        prefix, body = self._place
        for name in _BLOCK_LISTS:
            found = getattr(body, name, None)
            if isinstance(found, (nn.Sequential, nn.ModuleList)) and len(found) > 1:
                return {f"{prefix}{name}.{key}": block for key, block in found.named_children()}
        for place, parent in (("", body), ("features.", getattr(body, "features", None))):
            children = parent.named_children() if isinstance(parent, nn.Module) else ()
            numbered = {f"{prefix}{place}{key}": one for key, one in children if _NUMBERED_BLOCK.fullmatch(key)}
            if len(numbered) > 1:
                return numbered
        raise UnsupportedModelError(
            f"{type(body).__name__} has no list of blocks that remos_hf knows ({', '.join(_BLOCK_LISTS)}, or numbered "
            f"stages). Its direct children are {[name for name, _ in body.named_children()]}."
        )

    def fresh_weight(self, layer: Layer, generator: torch.Generator) -> Tensor:
        """Draw what timm starts most such layers with. Shape of the weight, on the CPU.

        A convolution: N(0, 2 / outputs of a group and kernel), as ResNet and EfficientNet. A Linear: N(0, 0.02^2), as
        ViT, Swin and ConvNeXt.

        Source: timm's `kaiming_normal_(mode="fan_out")`, EfficientNet's initialiser and `trunc_normal_(std=0.02)`.
        Differs: ConvNeXt also starts its convolutions with 0.02; patch embeddings follow torch's own rule in timm.
        """
        fresh = torch.empty(layer.weight.shape)
        fan_out = fresh.shape[0] * fresh.shape[2:].numel() / layer.groups
        return fresh.normal_(std=(2 / fan_out) ** 0.5 if fresh.dim() > 2 else 0.02, generator=generator)


def is_timm(model: nn.Module) -> bool:
    """Whether a module is a classifier in timm's form: it can give and replace its classifier."""
    return all(callable(getattr(model, name, None)) for name in ("get_classifier", "reset_classifier"))


def timm_place(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Find the model of timm in a model.

    Returns:
        What stands before its modules' names ("" if it is the model itself, "body.", "timm_model."), and the module;
        None if there is none.
    """
    if isinstance(model, PreTrainedModel):
        is_wrapper = model.config.model_type == "timm_wrapper" and hasattr(model, "timm_model")
        return ("timm_model.", model.timm_model) if is_wrapper else None
    if isinstance(model, ImageClassifier):
        return (BODY, model.body) if is_timm(model.body) else None
    return ("", model) if is_timm(model) else None


def check_images(images: Any) -> None:  # noqa: ANN401 - whatever a batch held
    """Refuse what no image model can read as it is meant.

    Raises:
        TypeError: No tensor of floating-point values.
        ValueError: Another number of axes than four.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"Images are one tensor (samples, channels, height, width), but got {type(images).__name__}.")
    if not images.is_floating_point():
        raise TypeError(
            f"Images are normalised floating-point values, but got a tensor of {images.dtype}. Divide bytes by 255 and "
            "normalise them as the teacher was trained: image_input_of(model).normalised(pixels / 255)."
        )
    if images.dim() != 4:
        raise ValueError(
            f"Images have the shape (samples, channels, height, width), but got {tuple(images.shape)}. "
            "A single image needs an axis before it: image[None]."
        )


def copy_with_new_head(teacher: nn.Module, num_labels: int, *, seed: int) -> nn.Module:
    """Copy a model of timm, its wrapper, or an `ImageClassifier`, under a head that was never trained.

    Parameters, statistics of normalisation and other buffers of the body are the teacher's, bit for bit.

    Args:
        teacher: The teacher; it stays as it is. A model of timm may have no head yet.
        num_labels: Labels of the student's task.
        seed: Seed of the new head. The global random state stays as it is, and every device gets the same values.

    Returns:
        A model of the same class, on the teacher's device.

    Raises:
        ValueError: There would be no label.
        UnsupportedModelError: A TimmWrapperModel, which returns features instead of logits.
    """
    check_num_labels(num_labels)
    if isinstance(teacher, PreTrainedModel) and not classifiers_of(timm_place(teacher)[1]):
        raise UnsupportedModelError(
            f"{type(teacher).__name__} returns features and takes no head. Load it with "
            "AutoModelForImageClassification, or pass its timm_model."
        )
    student = copy.deepcopy(teacher)
    device = next(student.parameters()).device
    replace_head(student.to("cpu"), num_labels, seed)
    return student.to(device)


def classifiers_of(body: nn.Module) -> tuple[str, ...]:
    """Name the classifiers of a model of timm, in timm's order, none below another; () if it has no head."""
    given = body.get_classifier() if is_timm(body) else None
    given = given if isinstance(given, (tuple, list, nn.ModuleList)) else (given,)
    listed = (getattr(body, "pretrained_cfg", None) or {}).get("classifier") or ()
    listed = (listed,) if isinstance(listed, str) else listed
    modules = dict(body.named_modules())
    names = [name for one in given for name, module in modules.items() if module is one]
    names += [name for name in listed if name in modules and name not in names]
    names = [name for name in names if name and any(True for _ in modules[name].parameters())]
    return tuple(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def labels_of(model: nn.Module) -> int:
    """Number of labels that a model's head gives; 0 if it has no head."""
    body = model.body if isinstance(model, ImageClassifier) else model
    if is_timm(body):
        return int(body.num_classes) if classifiers_of(body) else 0
    adapter = Adapter(body, model.head if isinstance(model, ImageClassifier) else ())
    return body.get_submodule(adapter.feature_layer()).out_features


def replace_head(model: nn.Module, num_labels: int, seed: int) -> None:
    """Put a head that was never trained on a model that lies on the CPU, in place."""
    place = timm_place(model)
    with seeded(seed):
        if place is None:
            _replace_named_head(model.body, model.head, num_labels)
        else:
            _replace_timm_head(*place, num_labels)
    if isinstance(model, ImageClassifier) and place is not None:
        model.head = classifiers_of(model.body)
    if isinstance(model, PreTrainedModel):
        # Names of the teacher's labels would be read back as the student's.
        for stale in ("label_names", "label_descriptions"):
            if hasattr(model.config, stale):
                delattr(model.config, stale)
        model.config.num_labels = model.num_labels = num_labels


def _replace_timm_head(prefix: str, body: nn.Module, num_labels: int) -> None:
    some = next(body.parameters())
    modes = {name: module.training for name, module in body.named_modules()}
    body.reset_classifier(num_labels)
    # Whatever mode and dtype the new modules were made in, they get the model's.
    for name, module in body.named_modules():
        module.training = modes.get(name, body.training)
    for name in classifiers_of(body):
        body.get_submodule(name).to(dtype=some.dtype)


def _replace_named_head(body: nn.Module, head: tuple[str, ...], num_labels: int) -> None:
    last = Adapter(body, head).feature_layer()
    for name in head:
        for module in body.get_submodule(name).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    old = body.get_submodule(last)
    new = nn.Linear(old.in_features, num_labels, bias=old.bias is not None, dtype=old.weight.dtype)
    body.set_submodule(last, new.train(old.training))


def check_num_labels(num_labels: int) -> None:
    """Refuse a head without labels.

    Raises:
        ValueError: There would be no label.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels is the number of labels of the task, at least 1, but got {num_labels}.")


def _check_labels(labels: Tensor, samples: int, num_labels: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (samples,):
        raise ValueError(
            f"labels are int64, one for each of the {samples} images, but got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if labels.device.type != "cpu" or not samples:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_labels:
        raise ValueError(
            f"labels go from 0 to {num_labels - 1}, the labels of the head, but got {low if low < 0 else high}. "
            "An image cannot be left out by the label -100; drop it, or make the head with the right num_labels."
        )


@contextmanager
def _bias_in_qkv(body: nn.Module) -> Iterator[None]:
    """Move the parts of a bias that lie beside a `qkv` into it while the block runs."""
    moved = []
    try:
        for module in body.modules():
            qkv = getattr(module, "qkv", None)
            parts = [getattr(module, f"{part}_bias", None) for part in "qkv"]
            if isinstance(qkv, nn.Linear) and qkv.bias is None and all(isinstance(part, Tensor) for part in parts):
                moved.append((module, qkv, module._parameters["q_bias"]))
                # A plain tensor keeps the graph to its parts; only q_bias decides which way the layer is computed.
                qkv._parameters["bias"], module._parameters["q_bias"] = torch.cat(parts), None
        yield
    finally:
        for module, qkv, bias in moved:
            qkv._parameters["bias"], module._parameters["q_bias"] = None, bias
