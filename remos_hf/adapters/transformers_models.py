"""Models of transformers: where the body ends, which positions are padding, how weights start."""

import copy
from collections.abc import Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from remos_hf.adapters.base import Adapter
from remos_hf.adapters.sequences import Sequence, sequences_of
from remos_hf.adapters.timm_models import ImageClassifier, TimmAdapter, copy_with_new_head, timm_place
from remos_hf.errors import UnsupportedModelError
from remos_hf.layers import Layer, sliceable_layers
from remos_hf.randomness import seeded

# The last name component (or two) of layers that write to the residual stream, in the architectures of transformers.
_STREAM_WRITERS = (
    "output.dense",  # BERT, RoBERTa, ELECTRA, ViT: attention.output.dense and output.dense
    "o_proj",  # LLaMA, Mistral, Qwen, Gemma
    "down_proj",
    "out_proj",  # BART, CLIP, GPT-Neo, OPT
    "fc2",
    "c_proj",  # GPT-2
    "Wo",  # ModernBERT
    "out_lin",  # DistilBERT
    "lin2",
    "dense_4h_to_h",  # BLOOM, GPT-NeoX
    "attention.dense",
    "ff.layer_2",  # XLNet
)


class TransformersAdapter(Adapter):
    """A `PreTrainedModel`. Its head is all that lies outside the base model, and the base model's pooler.

    A model that is its own base model, as T5 with its projection to words is, has that projection as its head.

    Source: the ReMoS artifact leaves the pooler and the classifier alone (NLP
        nc_prune/coverage/pytorch_wrapper.py:137).
    """

    def _find_head(self) -> tuple[str, ...]:
        body = self.model.base_model
        prefix = next((name for name, module in self.model.named_modules() if module is body), "")
        children = list(self.model.named_children())
        if prefix:
            outside = [name for name, _ in children if not f"{prefix}.".startswith(f"{name}.")]
        else:
            projection = self.model.get_output_embeddings()
            outside = [name for name, module in children if module is projection]
        pooler = [f"{prefix}.{name}".lstrip(".") for name, _ in body.named_children() if name == "pooler"]
        return (*outside, *pooler)

    def feature_layer(self) -> str:
        """Name the module whose input is the penultimate feature: the last Linear outside the body and its pooler."""
        body = {id(module) for module in self.model.base_model.modules()}
        return self._last_linear(tuple(name for name in self.head if id(self.model.get_submodule(name)) not in body))

    def layers(self, *, embeddings: bool = False) -> dict[str, Layer]:
        """Find the weights outside the head that can be sliced, by module name in registration order."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 0)
        heads = heads if isinstance(heads, int) else 0  # a list, one a stage: Swin and PVT, which fuse nothing
        return sliceable_layers(
            self.model,
            exclude=self.head,
            embeddings=self._embedding_names() if embeddings else (),
            num_heads=heads,
            qkv_sizes=_qkv_sizes(config, heads),
        )

    def _embedding_names(self) -> tuple[str, ...]:
        try:
            tokens = self.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # a convolutional net has none
            return ()
        return tuple(name for name, module in self.model.named_modules() if module is tokens)

    def _is_label(self, key: str) -> bool:
        # An encoder-decoder makes its decoder's inputs from the labels.
        return super()._is_label(key) and not self.model.config.is_encoder_decoder

    def sequences(self, batch: Any) -> dict[str, Sequence]:  # noqa: ANN401 - any batch
        """Find the sequences; a decoder that is fed with labels has one of its own."""
        return sequences_of(batch, decoder=bool(self.model.config.is_encoder_decoder))

    @contextmanager
    def plain_experts(self) -> Iterator[None]:
        """Have stacked experts compute one product an expert while the block runs; transformers 5 can fuse them."""
        if not hasattr(self.model, "get_experts_implementation") or not self.model._can_set_experts_implementation():
            yield
            return
        before = self.model.get_experts_implementation()
        self.model.set_experts_implementation("eager")
        try:
            yield
        finally:
            self.model.set_experts_implementation(before)

    def blocks(self) -> dict[str, nn.Module]:
        """Give the blocks between which `output_hidden_states` looks: the first list as long as the layer count."""
        config = self.model.config.get_text_config()
        count = getattr(config, "num_hidden_layers", None)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return {f"{name}.{index}": block for index, block in enumerate(module)}
        raise UnsupportedModelError(
            f"{type(self.model).__name__} has no list of {count} blocks, so its hidden states cannot be matched with "
            "its layers. Use source='hooks'."
        )

    def writes_to_stream(self, layer: Layer) -> bool:
        """Whether a layer's output is added to the hidden state, known by the names that transformers gives."""
        return layer.name.endswith(_STREAM_WRITERS)

    def fresh_weight(self, layer: Layer, generator: torch.Generator) -> Tensor:
        """Draw from N(0, initializer_range), as transformers starts its layers. Shape of the weight, on the CPU."""
        std = getattr(self.model.config.get_text_config(), "initializer_range", None)
        if std is None:
            return super().fresh_weight(layer, generator)
        return torch.empty(layer.weight.shape).normal_(std=std, generator=generator)


def with_new_head(teacher: nn.Module, num_labels: int, *, seed: int, labels: Several[str] | None = None) -> nn.Module:
    """Start a student: a copy of the teacher's body under a head that was never trained.

    Args:
        teacher: A model of transformers or timm, or an `ImageClassifier`; it stays as it is.
        num_labels: Labels of the student's task.
        seed: Seed of the new head. The global random state stays as it is.
        labels: Names of the labels, in the order of their numbers, for the config of a model of transformers. None:
            LABEL_0, LABEL_1, ...; the teacher's names and its kind of problem (`problem_type`) are never taken over.

    Returns:
        A model of the same class, on the teacher's device.

    Raises:
        ValueError: There would be no label, or there is another number of names than of labels, or a name twice.
        UnsupportedModelError: The teacher is another kind of module, which does not say what its head is.
    """
    names = _label_names(num_labels, labels)
    if isinstance(teacher, ImageClassifier) or timm_place(teacher) is not None:
        student = copy_with_new_head(teacher, num_labels, seed=seed)
        if isinstance(student, PreTrainedModel):
            write_class_names(student.config, names)
        return student
    if not isinstance(teacher, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(teacher).__name__} does not say what its head is. If it classifies images, wrap it: "
            "ImageClassifier(module, head=(...,)); otherwise copy it and replace its head yourself."
        )
    config = copy.deepcopy(teacher.config)
    write_class_names(config, names)
    config.problem_type = None  # the loss reads it off the student's own labels
    with seeded(seed):
        student = type(teacher)(config)
    student.base_model.load_state_dict(teacher.base_model.state_dict())
    return student.to(device=teacher.device, dtype=teacher.dtype)


def _label_names(num_labels: int, labels: Several[str] | None) -> list[str]:
    if num_labels < 1:
        raise ValueError(f"num_labels is the number of labels of the task, at least 1, but got {num_labels}.")
    names = [f"LABEL_{number}" for number in range(num_labels)] if labels is None else [str(name) for name in labels]
    if len(names) != num_labels or len(set(names)) != num_labels:
        raise ValueError(
            f"labels names each of the {num_labels} labels once, in the order of their numbers, but got {names}."
        )
    return names


def write_class_names(config: PretrainedConfig, names: Several[str]) -> None:
    """Write the names of the classes into a config, in the order of their numbers."""
    config.id2label = dict(enumerate(names))  # num_labels is its length
    config.label2id = {name: number for number, name in enumerate(names)}


def _qkv_sizes(config: Any, heads: int) -> tuple[int, ...]:  # noqa: ANN401 - any model's config
    width = getattr(config, "hidden_size", None)  # a list, or none at all, where stages differ in width
    if not heads or not isinstance(width, int):
        return ()
    head_dim = getattr(config, "head_dim", None) or width // heads
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    return (heads * head_dim, key_value, key_value)


def own_head(model: nn.Module) -> tuple[str, ...]:
    """Find the head that a model says it has; () of a plain module, which says nothing."""
    return adapter_for(model).head if _says_its_head(model) else ()


def _says_its_head(model: nn.Module) -> bool:
    return isinstance(model, (PreTrainedModel, ImageClassifier)) or timm_place(model) is not None


def adapter_for(model: nn.Module, head: tuple[str, ...] | None = None) -> Adapter:
    """Pick the adapter for a model.

    Args:
        model: The module, before any wrapping.
        head: Dotted names of the modules that are never sliced; None lets the adapter find them.
    """
    if isinstance(model, ImageClassifier) and head is None:
        head = tuple(f"body.{name}" for name in model.head)
    if timm_place(model) is not None:
        return TimmAdapter(model, head)
    kind = TransformersAdapter if isinstance(model, PreTrainedModel) else Adapter
    return kind(model, head)


def adapter_beside_head(model: nn.Module, head: tuple[str, ...] | None = None) -> Adapter:
    """Pick the adapter for a model whose head is told apart from its body: it is new, and a teacher has none to give.

    Args:
        model: As in `adapter_for`.
        head: Dotted names of the new modules; () says that there is none, None lets the adapter find them.

    Raises:
        UnsupportedModelError: `head` is None, and the model is a plain module, which does not say what its head is.
    """
    adapter = adapter_for(model, head)  # which refuses what is wrapped, first
    if head is None and not _says_its_head(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} names no head, which is new and must be left out of what is held to the teacher. "
            f"Name it: head=(...,). Its direct children are {[name for name, _ in model.named_children()]}."
        )
    return adapter
