"""What the configs beside a teacher's weights may say: nothing that they name is fetched, run, or opened elsewhere.

`trust_remote_code=False` does not cover all of it. An attention kernel, a backbone, another config or a vocabulary that
a config names is loaded by some version of transformers without asking.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remos_hf.adapters.teacher_files import read_any_json, read_json
from remos_hf.errors import CorruptFileError, UnsupportedModelError

logger = logging.getLogger(__name__)

CONFIG = "config.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Implementations (of attention, experts, caches) that come with torch and transformers themselves.
_LOCAL = frozenset(
    {
        *("", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
        *("grouped_mm", "batched_mm"),
        *("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "quantized", "mamba"),
        *("hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked", "sliding_window"),
    }
)
_PAGED = "paged|"
_QUANTISED = ("quantization_config", "compression_config")
_KERNELS = ("use_kernels", "use_hub_kernels", "kernel_config", "kernel_mapping")
# Keys whose value is the name of other files or repositories, which some version of transformers or timm would open.
_NAMES_WEIGHTS = ("transformers_weights", "configuration_files", "use_pretrained_backbone", "checkpoint_path")
_NAMES_MODELS = ("backbone", "architecture")
_NAMES_VOCABULARIES = ("_file", "_files", "_spm", "_path", "init_inputs")
_UNREAD_NAMES = ("special_tokens_map_file", "added_tokens_file", "name_or_path")
_DTYPES = frozenset({"auto", "float32", "float16", "bfloat16", "float64"})
_DEEPEST = 100
# More labels than any task has, and more layers than any model, unless its files hold as many tensors.
_MOST_LABELS, _MOST_LAYERS = 2**20, 1000
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def check_configs(folder: Path) -> None:
    """Refuse a folder whose configs name something that would be fetched, run, or opened outside it.

    Args:
        folder: The teacher's.

    Raises:
        FileNotFoundError: There is no config.json.
        UnsupportedModelError: A config asks for a kernel or a backbone of somebody else's, for quantised weights, for
            other files; or adapters lie beside the weights. The text names the file and the key.
        CorruptFileError: A config is no JSON object, or holds numbers that no model has.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} should hold {CONFIG} beside the weights, but does not. A repository of the Hub is fetched by "
            "huggingface_hub.snapshot_download(repo_id)."
        )
    for name in ADAPTERS:
        if (folder / name).exists():
            raise UnsupportedModelError(
                f"{folder} holds an adapter ({name}), which from_pretrained would put on without a word. Merge it into "
                "the weights first (merge_and_unload, save_pretrained), or remove it to take the weights alone."
            )
    read_json(folder / CONFIG)
    for path in sorted(folder.glob("*config.json")):
        check_config(path, read_any_json(path))


def check_config(path: Path, config: Any) -> None:  # noqa: ANN401 - whatever JSON holds
    """Refuse one config that names something that would be fetched, run, or opened elsewhere.

    Args:
        path: Its file, for messages.
        config: What the file holds.

    Raises:
        UnsupportedModelError: It does; the text names the key.
        CorruptFileError: A number is absurd, or it is nested too deep.
    """
    for place, key, value in _entries(path, config):
        where = f"{path} ({place})"
        if "implementation" in key.lower():
            _check_implementation(where, value)
        elif value and key in _KERNELS:
            raise UnsupportedModelError(
                f"{where} asks for kernels, which are programs from the Hub that run here. Remove the key."
            )
        elif value and key in _QUANTISED:
            raise UnsupportedModelError(
                f"{where} says that the weights are quantised, and ranks need float32, bfloat16 or float16. Take the "
                "unquantised checkpoint, then quantise the student."
            )
        elif value and key in _NAMES_WEIGHTS:
            raise UnsupportedModelError(
                f"{where} names other files or weights ({value!r}), but only those of the folder itself are read. "
                "Remove the key."
            )
        elif key in _NAMES_MODELS and isinstance(value, str) and not set(value).isdisjoint("/:\\"):
            raise UnsupportedModelError(
                f"{where} names a model elsewhere ({value!r}), which would be fetched. Nothing outside the folder is."
            )
        elif key == "auto_map" and value:
            logger.warning("%s names programs that came with the teacher. They are not run.", where)
    if path.name == CONFIG:
        _check_values(path, config)
    elif path.name == "tokenizer_config.json" and isinstance(config, dict):
        _check_tokenizer(path, config)


def check_depth(folder: Path, num_tensors: int) -> None:
    """Refuse a config with many more layers than its files hold tensors: building it would take days and all memory.

    Args:
        folder: The teacher's.
        num_tensors: That its files hold.

    Raises:
        CorruptFileError: It has.
    """
    most = max(_MOST_LAYERS, num_tensors)
    for place, key, value in _entries(folder / CONFIG, read_json(folder / CONFIG)):
        if key in _LAYER_COUNTS and isinstance(value, int) and value > most:
            raise CorruptFileError(
                f"{folder / CONFIG} ({place}) asks for {value:,} layers, but the files hold {num_tensors} tensors."
            )


def _entries(path: Path, config: Any) -> Iterator[tuple[str, str, Any]]:  # noqa: ANN401
    """Give every key at any depth: its dotted place, the key, its value."""
    waiting = [("", config, 0)]
    while waiting:
        place, found, depth = waiting.pop()
        if depth > _DEEPEST:
            raise CorruptFileError(f"{path} is nested deeper than {_DEEPEST} levels, which no config is.")
        if isinstance(found, dict):
            for key, value in found.items():
                here = f"{place}.{key}" if place else key
                yield here, key, value
                waiting.append((here, value, depth + 1))
        elif isinstance(found, list):
            waiting += [(f"{place}[{number}]", value, depth + 1) for number, value in enumerate(found)]


def _check_implementation(where: str, value: Any) -> None:  # noqa: ANN401
    if isinstance(value, dict):
        for one in value.values():
            _check_implementation(where, one)
    elif value is not None and not isinstance(value, bool):
        known = isinstance(value, str) and value.removeprefix(_PAGED) in _LOCAL
        if not known:
            raise UnsupportedModelError(
                f"{where} asks for the implementation {value!r}. What is no part of transformers is a program from the "
                "Hub that would be fetched and run. Remove the key if you trust the rest of the teacher."
            )


def _check_values(path: Path, config: dict[str, Any]) -> None:
    for place, key, value in _entries(path, config):
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value.removeprefix("torch.") not in _DTYPES:
            raise UnsupportedModelError(
                f"{path} ({place}) says that the weights are {value}, and ranks need float32, bfloat16 or float16. "
                "Take the unquantised checkpoint."
            )
        if key == "num_labels" and isinstance(value, int) and value > _MOST_LABELS:
            raise CorruptFileError(f"{path} ({place}) asks for {value:,} labels, which no task has.")


def _check_tokenizer(path: Path, config: dict[str, Any]) -> None:
    """Refuse paths to vocabularies: transformers 4 opens them, wherever they lie."""
    for key, value in config.items():
        if value and key.endswith(_NAMES_VOCABULARIES) and key not in _UNREAD_NAMES:
            names = value if isinstance(value, list) else [value]
            plain = key == "fast_tokenizer_files" and all(Path(str(name)).name == name for name in names)
            if not plain:
                raise UnsupportedModelError(
                    f"{path} ({key}) names files of its own ({value!r}), which may lie anywhere. Remove the key: the "
                    "files of the folder are found without it."
                )
