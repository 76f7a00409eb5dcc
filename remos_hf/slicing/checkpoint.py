"""Slice a checkpoint on disk: weights are read one at a time and written shard by shard, the model is never held.

The architecture is built on the meta device, where it has names and shapes but no values. Each pass of `choose_slice`
then reads a layer's weight from its file and lets go of it. The written shards are the teacher's files, byte for byte,
but for the weights outside the slice.

The files are read with plain reads and never mapped: a mapped file would count as memory, and one that is cut short
meanwhile would kill the process.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from remos_hf.adapters.base import Adapter
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import CorruptFileError, RemosError, UnsupportedModelError
from remos_hf.layers import Layer
from remos_hf.profiling.coverage import COVERAGE_FILE, CoverageProfile
from remos_hf.slicing.competition import competing_layers
from remos_hf.slicing.ordinal import unpack
from remos_hf.slicing.refill import parameter_generator
from remos_hf.slicing.relevant_slice import RelevantSlice, check_choice, choose_among

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
except ImportError:  # transformers 4, where files name tensors as models do, but for the base model's prefix
    get_model_conversion_mapping = None

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FLOATING = {**_DTYPES, "F64": torch.float64}
# Weights that are reset at once; a multiple of 8, so that each piece starts with a byte of packed bits.
_PIECE = 2**20
_COPIED_BYTES = 2**22
_MAX_JSON_BYTES = 2**28
# What belongs to a checkpoint beside its weights: configs and tokenizers. No pickle, no program, no other weights.
_SIDE_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".codes", ".vocab", ".tiktoken"})
_SIDE_NAMES = ("LICENSE", "NOTICE")
_LEFT_OUT = re.compile(r"\.|remos_|trainer_state\.json$|.*\.index\.json$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_SHARD_NUMBER = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_INSTEAD = "Load the model and use choose_slice and reset_outside instead."


@dataclass(frozen=True)
class Sliced:
    """A checkpoint that was sliced, and how.

    Attributes:
        relevant_slice: The weights that were kept, also written as `remos_slice.safetensors`.
        squares_reset: Share of the sum of squared weights that was given up, in [0, 1].
        seconds: Wall-clock seconds of "choose" and of "reset", which writes.
        files: What was written, relative to the folder, sorted.
    """

    relevant_slice: RelevantSlice
    squares_reset: float
    seconds: dict[str, float]
    files: list[str]


def slice_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    slice_ratio: float,
    profile: CoverageProfile | None = None,
    rule: Literal["remos", "top_magnitude", "mag_prune", "random"] = "remos",
    scope: Literal["model", "layer"] = "model",
    seed: int = 0,
    ties: Literal["mean", "artifact"] = "mean",
    reset_to: Literal["zero", "init"] = "zero",
    embeddings: bool = False,
    head: tuple[str, ...] | None = None,
    progress: bool = True,
) -> Sliced:
    """Choose a slice of a checkpoint and write the checkpoint with everything outside it reset.

    What comes out is what `choose_slice`, `reset_outside` and `save_pretrained` make of
    `from_pretrained(source, dtype="auto")`, bit for bit. Held at once are about one weight and the packed bits.
    Tensors outside the slice, metadata and the split into shards stay as they are, byte for byte. Configs and tokenizer
    files are copied; what they say about remote code (`auto_map`) is left out. Pickles and programs are never read.

    Args:
        source: Folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        target: Folder to write; it must not exist, or be empty. It appears whole or not at all: until then the files
            lie in a hidden folder beside it, `.<name>.partial`, which the next call clears if this one is killed.
        slice_ratio: Share of the weights to keep, in (0, 1].
        profile: Coverage of the teacher as `from_pretrained(source, dtype="auto")` loads it. Needed by "remos"; it is
            written as `remos_coverage.safetensors`.
        rule: As in `choose_slice`, like the arguments that follow.
        scope: "model" or "layer".
        seed: Seed of the random rule and of fresh values.
        ties: "mean" or "artifact".
        reset_to: "zero", or "init" for fresh values, as in `reset_outside`.
        embeddings: Without a profile, whether the rows of the input embeddings compete too.
        head: Without a profile, the modules that are never sliced; found if None.
        progress: Show bars on work longer than two seconds.

    Returns:
        The slice, what it gives up, and what was written.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: `source` is no folder with config.json and weights.
        FileExistsError: `target` is not empty, or another process is writing it.
        UnsupportedModelError: Only pickles, a quantised checkpoint, an architecture that transformers does not have, or
            weights that this version of transformers joins, cuts or renames beyond recognition as it loads them.
        CorruptFileError: A shard is truncated, missing, holds a tensor twice, lies outside the folder, or was changed
            meanwhile.
        NonFiniteError: A weight is NaN or infinite.
        LayerMismatchError: The profile was taken of another architecture.
        TeacherMismatchError: The profile was taken of other weights, or in another dtype.
        RemosError: The disk is full, or something else kept the files from being written.

    Source:
        ReMoS, ICSE 2022, section 4.2. Differs: streamed.
    """
    check_choice(slice_ratio, rule, scope, ties, profile)
    if reset_to not in ("zero", "init"):
        raise ValueError(f"reset_to is 'zero' or 'init', but got {reset_to!r}.")
    source, target = Path(source), Path(target).resolve()
    _check_target(target)
    _check_config(source)
    checkpoint = _Checkpoint.in_folder(source)
    side_files = _side_files(source)

    start = time.perf_counter()
    model = _on_meta(source, checkpoint)
    competing, account = competing_layers(model, profile, head=head, embeddings=embeddings)
    stored = _find_stored(model, competing, checkpoint)
    relevant = choose_among(
        stored,
        profile,
        slice_ratio=slice_ratio,
        rule=rule,
        scope=scope,
        ties=ties,
        seed=seed,
        progress=progress,
        account=account,
    )
    chosen = time.perf_counter()
    adapter, counted, resets = adapter_for(model, ()), [], {}
    relevant.check_matches(adapter.layers(embeddings=True), verify_teacher=False)  # else reset_outside would refuse it
    for name, layer in stored.items():
        # Drawn for the layer on the meta device: drawing asks for the weight's shape, which must not read it.
        fresh = partial(_fresh, adapter, competing[name], seed) if reset_to == "init" else None
        same = [_Reset(relevant.kept.bits[layer.key], layer.dtype, fresh) for _ in layer.tensors]
        counted.append(same[0])
        resets |= {(tensor.path, tensor.name): reset for tensor, reset in zip(layer.tensors, same, strict=True)}
    needed = checkpoint.num_bytes + sum(bits.numel() for bits in relevant.kept.bits.values())
    with _appearing_whole(target, needed) as folder:
        bar = tqdm(
            total=checkpoint.num_bytes,
            desc="Writing weights",
            unit="B",
            unit_scale=True,
            delay=2,
            disable=not progress,
            leave=False,
        )
        with bar:
            for path in checkpoint.paths:
                _write_shard(path, folder / path.name, checkpoint.tensors_in(path), resets, bar)
        for path in (*([checkpoint.index] if checkpoint.index else []), *side_files):
            _copy_side_file(path, folder / path.relative_to(source))
        relevant.save_pretrained(folder)
        if profile is not None:
            profile.save(folder / COVERAGE_FILE)
        checkpoint.check_unchanged()
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    lost, total = sum(reset.lost for reset in counted), sum(reset.total for reset in counted)
    seconds = {"choose": chosen - start, "reset": time.perf_counter() - chosen}
    return Sliced(relevant, lost / total if total else 0.0, seconds, files)


# ---- What lies in the files


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of a safetensors file, by the place of its bytes."""

    path: Path
    name: str
    dtype: str
    shape: torch.Size
    start: int
    stop: int

    def read(self) -> Tensor:
        """Read all of it. Its dtype must be one that is ranked."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            return _read_values(file, self.shape.numel(), _DTYPES[self.dtype], self.path).view(self.shape)


@dataclass(frozen=True)
class _Checkpoint:
    """The safetensors files of a folder, whose tensors are read when asked for."""

    paths: list[Path]
    tensors: dict[str, _StoredTensor]
    index: Path | None
    states: dict[Path, tuple[int, int]]

    @classmethod
    def in_folder(cls, folder: Path) -> "_Checkpoint":
        """Find the weights that `from_pretrained` would load, and check that the files hold what they say."""
        single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
        if single.is_file():
            weight_map, index, paths = None, None, [single]
        elif index.is_file():
            weight_map = _read_weight_map(index)
            paths = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            raise _no_weights(folder)
        tensors: dict[str, _StoredTensor] = {}
        states = {}
        for path in paths:
            states[path] = _state(path)
            for tensor in _read_header(path):
                if tensor.name in tensors:
                    raise CorruptFileError(
                        f"Both {tensors[tensor.name].path} and {path} hold '{tensor.name}', and nothing says which one "
                        "counts. Fetch the checkpoint again."
                    )
                tensors[tensor.name] = tensor
        if weight_map is not None:
            _check_weight_map(index, weight_map, tensors)
        return cls(paths, tensors, index, states)

    @property
    def num_bytes(self) -> int:
        """Size of the files of weights."""
        return sum(size for size, _ in self.states.values())

    def tensors_in(self, path: Path) -> list[_StoredTensor]:
        """Give the tensors of one file in the order of their bytes."""
        return sorted((tensor for tensor in self.tensors.values() if tensor.path == path), key=lambda t: t.start)

    def check_unchanged(self) -> None:
        """Refuse files that were written since they were first looked at: the slice was chosen from other weights."""
        for path, state in self.states.items():
            if _state(path) != state:
                raise CorruptFileError(f"{path} was changed while it was read. Slice it when nothing writes to it.")


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be opened ({error.strerror}). Fetch the checkpoint again.") from error
    return found.st_size, found.st_mtime_ns


def _no_weights(folder: Path) -> Exception:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return UnsupportedModelError(
            f"{folder} holds its weights as {pickles[0]} alone, and opening a pickle runs whatever program it brings. "
            f"Only {SAFE_WEIGHTS_NAME} is read: fetch a revision that has it, or convert the file where nothing can "
            "be harmed (load with weights_only=True, save_pretrained)."
        )
    return FileNotFoundError(
        f"{folder} should hold {SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and its shards, but holds neither."
    )


def _read_json(path: Path) -> dict[str, Any]:
    found = _read_any_json(path)
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} should be a JSON object, but is a {type(found).__name__}. Fetch it again.")
    return found


def _read_any_json(path: Path) -> Any:  # noqa: ANN401 - whatever JSON holds
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptFileError(f"{path} is larger than {_MAX_JSON_BYTES} bytes, which no config or index is.")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} should be JSON, but cannot be read ({error}). Fetch it again.") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names '{next(name for name in names if names.count(name) > 1)}' twice")
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptFileError(f"{index} should name a file for every tensor (weight_map), but does not.")
    names = set(weight_map.values())
    for name in sorted(names):
        if re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII) is None:
            raise CorruptFileError(
                f"{index} names the file {name!r}, but shards are safetensors files in the folder itself. "
                "Nothing outside it is read."
            )
        numbered = _SHARD_NUMBER.fullmatch(name)
        if numbered and int(numbered[1]) != len(names):
            raise CorruptFileError(
                f"{index} names {name!r}, one of {int(numbered[1])} shards, but {len(names)} in all. "
                "Fetch the checkpoint again."
            )
        if not (index.parent / name).is_file():
            raise CorruptFileError(f"{index} names the shard {name!r}, which is not there. Fetch the checkpoint again.")
    return weight_map


def _check_weight_map(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, _StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CorruptFileError(
                f"{index} says that '{name}' is in {file}, but it is not. Fetch the checkpoint again."
            )
    unnamed = [name for name in tensors if name not in weight_map]
    if unnamed:
        raise CorruptFileError(
            f"{tensors[unnamed[0]].path} holds '{unnamed[0]}', which {index} does not name. Fetch the checkpoint again."
        )


def _read_header(path: Path) -> list[_StoredTensor]:
    """Read what a safetensors file says it holds, after its own library has checked that against its size."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=_without_repeats)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{path} cannot be read as safetensors ({error}). It is truncated or broken: fetch it again."
        ) from error
    written_by = header.pop("__metadata__", {}).get("format", "pt")
    if written_by != "pt":
        raise UnsupportedModelError(
            f"{path} was written by {written_by!r}, which may lay out weights in another way than PyTorch ('pt'). "
            f"{_INSTEAD}"
        )
    found = []
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        found.append(_StoredTensor(path, name, entry["dtype"], torch.Size(entry["shape"]), start, stop))
    return found


def _read_values(file: BinaryIO, count: int, dtype: torch.dtype, path: Path) -> Tensor:
    """Read numbers from an open file. Shape (count,)."""
    values = torch.empty(count, dtype=dtype)
    buffer = memoryview(values.view(torch.uint8).numpy())
    filled = 0
    while filled < len(buffer):
        got = file.readinto(buffer[filled:])
        if not got:
            raise _cut_short(path)
        filled += got
    return values


def _cut_short(path: Path) -> CorruptFileError:
    return CorruptFileError(f"{path} became shorter while it was read. Slice it when nothing writes to it.")


# ---- The architecture, and which of its weights lies where


def _check_config(source: Path) -> None:
    """Refuse what cannot be sliced on disk, by the config alone."""
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"source is a folder that holds config.json beside the weights, but there is no {path}. "
            "Fetch a repository of the Hub first: huggingface_hub.snapshot_download(repo_id)."
        )
    config = _read_json(path)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if any(part.get(key) for part in parts for key in ("quantization_config", "compression_config")):
        raise UnsupportedModelError(
            f"{path} says that the weights are quantised, and ranks need float32, bfloat16 or float16. "
            "Slice the unquantised checkpoint, then quantise the student."
        )
    if config.get("transformers_weights"):
        raise UnsupportedModelError(
            f"{path} names its own file of weights (transformers_weights: {config['transformers_weights']!r}), but "
            f"only {SAFE_WEIGHTS_NAME} and its shards are read. {_INSTEAD}"
        )
    if (source / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{source} holds adapters (adapter_config.json), which from_pretrained would put on. Merge them into the "
            "weights first (merge_and_unload, save_pretrained)."
        )


def _on_meta(source: Path, checkpoint: _Checkpoint) -> PreTrainedModel:
    """Build the architecture that the config names, without weights and without its author's programs."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a stranger's values set off in the config's constructor
        raise UnsupportedModelError(
            f"{source / 'config.json'} describes no architecture of transformers {transformers.__version__} "
            f"({_first_line(error)}). Programs that come with a checkpoint (auto_map) are not run."
        ) from error
    kind = _architecture(config)
    if config.dtype is None:  # from_pretrained goes by the first tensor then
        stored = (tensor.dtype for tensor in checkpoint.tensors_in(checkpoint.paths[0]) if tensor.dtype in _FLOATING)
        config.dtype = _FLOATING[next(stored, "F32")]
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            # The config may ask for an attention kernel, which is a program from the Hub.
            model = kind._from_config(config, attn_implementation="eager")
            model.tie_weights()
    except Exception as error:
        raise UnsupportedModelError(
            f"{kind.__name__} cannot be built from {source / 'config.json'} ({_first_line(error)})."
        ) from error
    return model


def _architecture(config: PretrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures
    named = isinstance(names, list) and names
    found = getattr(transformers, str(names[0]), None) if named else MODEL_MAPPING.get(type(config), None)
    fits = isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is not None
    if not fits or not isinstance(config, found.config_class):
        raise UnsupportedModelError(
            f"config.json names the architecture {names!r} for a config of type {type(config).__name__}, but "
            f"transformers {transformers.__version__} has no such model. Programs that come with a checkpoint "
            "(auto_map) are not run."
        )
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@dataclass(frozen=True, kw_only=True)
class _StoredLayer(Layer):
    """A layer whose weight lies in a file and is read anew each time it is asked for.

    Attributes:
        tensors: Where it is stored; more than once if tied modules were all saved.
        loaded_as: Type that from_pretrained gives it.
    """

    tensors: tuple[_StoredTensor, ...] = field(repr=False)
    loaded_as: torch.dtype

    @property
    def weight(self) -> Tensor:
        """Read the weight. Shape: as the module would hold it."""
        return self.tensors[0].read().to(self.loaded_as)

    @property
    def dtype(self) -> torch.dtype:
        """Type that `weight` has."""
        return self.loaded_as

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")


def _find_stored(
    model: PreTrainedModel, competing: Mapping[str, Layer], checkpoint: _Checkpoint
) -> dict[str, _StoredLayer]:
    """Find the tensor of each layer in the files."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders: dict[int, list[_StoredTensor]] = {}  # by id of a parameter that the model keeps alive
    taken: dict[str, str] = {}
    changed, unknown = [], []
    for name, (parameter, is_converted) in _names_on_load(model, checkpoint.tensors).items():
        if is_converted:
            changed.append(name)
        elif parameter not in parameters:
            unknown.append(name)
        elif parameter in taken:
            raise UnsupportedModelError(
                f"Both '{taken[parameter]}' and '{name}' would be loaded as '{parameter}', and nothing says which one "
                f"counts. {_INSTEAD}"
            )
        else:
            taken[parameter] = name
            holders.setdefault(id(parameters[parameter]), []).append(checkpoint.tensors[name])
    stored = {}
    for name, layer in competing.items():
        tensors = tuple(holders.get(id(layer.parameter), ()))
        if not tensors:
            seen = next(iter((*changed, *unknown)), next(iter(checkpoint.tensors), "nothing"))
            raise UnsupportedModelError(
                f"No tensor of the checkpoint becomes '{layer.parameter_name}' of {type(model).__name__} as it is: "
                f"transformers {transformers.__version__} joins, cuts or renames it, or it is missing. The first "
                f"tensor without a place is '{seen}'. {_INSTEAD}"
            )
        for tensor in tensors:
            _check_tensor(tensor, layer)
        if len(tensors) > 1:
            _check_equal(tensors)
        same = {one.name: getattr(layer, one.name) for one in fields(layer)}
        stored[name] = _StoredLayer(**same, tensors=tensors, loaded_as=_loaded_as(model, layer))
    return stored


def _check_tensor(tensor: _StoredTensor, layer: Layer) -> None:
    if tensor.dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"'{tensor.name}' in {tensor.path} cannot be ranked: its dtype is {tensor.dtype}, and ranks need F32, BF16 "
            "or F16. Slice the unquantised checkpoint."
        )
    if tensor.shape != layer.shape:
        raise UnsupportedModelError(
            f"'{tensor.name}' in {tensor.path} has the shape {tuple(tensor.shape)}, but config.json makes "
            f"'{layer.parameter_name}' of shape {tuple(layer.shape)}. {_INSTEAD}"
        )


def _check_equal(tensors: tuple[_StoredTensor, ...]) -> None:
    first = tensors[0]
    for other in tensors[1:]:
        with first.path.open("rb") as one, other.path.open("rb") as two:
            one.seek(first.start)
            two.seek(other.start)
            left, same = first.stop - first.start, first.dtype == other.dtype
            while same and left:
                size = min(left, _COPIED_BYTES)
                same, left = one.read(size) == two.read(size), left - size
        if not same:
            raise UnsupportedModelError(
                f"'{first.name}' and '{other.name}' are one weight in the model that config.json describes, but differ "
                f"in the files. {_INSTEAD}"
            )


def _names_on_load(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Say which parameter each tensor is loaded as, and whether it is changed on the way (joined, cut, transposed)."""
    known, prefix = model.state_dict(), model.base_model_prefix
    if get_model_conversion_mapping is None:
        return {name: (_without_conversion(name, known, prefix), False) for name in names}
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    found = {}
    for name in sorted(names, key=dot_natural_key):  # renamings may remember what came before
        parameter, converter = rename_source_key(name, renamings, converters, prefix, known)
        if parameter not in known and name in known:
            parameter, converter = rename_source_key(name, [], [], prefix, known)
        found[name] = (parameter, converter is not None)
    return found


def _without_conversion(name: str, known: Mapping[str, Tensor], prefix: str) -> str:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in known:
            return candidate
    return name


def _loaded_as(model: PreTrainedModel, layer: Layer) -> torch.dtype:
    """Type that from_pretrained gives a weight: the config's, but for modules that their author keeps in float32."""
    dtype = layer.dtype
    kept_wide: list[str] = []
    if dtype == torch.float16:
        kept_wide += model._keep_in_fp32_modules or ()
    if dtype in (torch.float16, torch.bfloat16):
        kept_wide += model._keep_in_fp32_modules_strict or ()
    patterns = (re.escape(name).replace(r"\*", ".*") for name in kept_wide)
    wide = any(re.search(rf"(^|\.){pattern}(\.|$)", layer.parameter_name) for pattern in patterns)
    return torch.float32 if wide else dtype


# ---- What is written


@dataclass
class _Reset:
    """A weight that is about to be written, and what its reset gave up."""

    bits: Tensor
    compared_as: torch.dtype
    fresh: Callable[[], Tensor] | None = None
    lost: float = 0.0
    total: float = 0.0

    def __call__(self, values: Tensor, first: int, fresh: Tensor | None) -> Tensor:
        """Reset a piece of the weight that starts at a place divisible by 8, in place, and count its squares."""
        kept = unpack(self.bits[first // 8 : -(-(first + len(values)) // 8)], values.shape)
        squares = values.to(self.compared_as).float().square()
        self.total += float(squares.sum(dtype=torch.float64))
        self.lost += float(squares.masked_fill_(kept, 0).sum(dtype=torch.float64))
        if fresh is None:
            return values.masked_fill_(~kept, 0)
        return torch.where(kept, values, fresh[first : first + len(values)].to(self.compared_as).to(values.dtype))


def _fresh(adapter: Adapter, layer: Layer, seed: int) -> Tensor:
    return adapter.fresh_weight(layer, parameter_generator(seed, layer.key)).reshape(-1)


def _write_shard(
    source: Path,
    target: Path,
    tensors: list[_StoredTensor],
    resets: Mapping[tuple[Path, str], _Reset],
    bar: tqdm,
) -> None:
    """Copy a file of weights, resetting some of its tensors on the way."""
    with source.open("rb") as read, target.open("xb") as write:
        for tensor in tensors:
            reset = resets.get((tensor.path, tensor.name))
            if reset is None:
                continue
            _copy_bytes(read, write, tensor.start - read.tell(), source, bar)
            _write_reset(read, write, tensor, reset, bar)
        _copy_bytes(read, write, os.fstat(read.fileno()).st_size - read.tell(), source, bar)
        write.flush()
        os.fsync(write.fileno())


def _write_reset(read: BinaryIO, write: BinaryIO, tensor: _StoredTensor, reset: _Reset, bar: tqdm) -> None:
    fresh = reset.fresh() if reset.fresh is not None else None
    count = tensor.shape.numel()
    for first in range(0, count, _PIECE):
        values = _read_values(read, min(_PIECE, count - first), _DTYPES[tensor.dtype], tensor.path)
        bar.update(write.write(memoryview(reset(values, first, fresh).view(torch.uint8).numpy())))


def _copy_bytes(read: BinaryIO, write: BinaryIO, count: int, source: Path, bar: tqdm) -> None:
    while count:
        block = read.read(min(count, _COPIED_BYTES))
        if not block:
            raise _cut_short(source)
        write.write(block)
        bar.update(len(block))
        count -= len(block)


def _side_files(source: Path) -> list[Path]:
    """Find the files that belong to a checkpoint beside its weights."""
    found = [path for path in source.iterdir() if path.is_file() and _belongs(path.name)]
    modules = source / "modules.json"
    if modules.is_file():  # sentence-transformers: what follows the transformer lies in folders that this file names
        found += _files_of_modules(modules)
    home = source.resolve()
    allowed = (home, home.parent.parent / "blobs")  # the Hub's cache is made of links to its blobs
    for path in found:
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise CorruptFileError(
                f"{path} is a link to {path.resolve()}, outside the checkpoint, and would be copied into the student. "
                "Put the file itself there, or remove the link."
            )
    return sorted(found)


def _belongs(name: str) -> bool:
    named = Path(name).suffix in _SIDE_SUFFIXES or name.startswith(_SIDE_NAMES)
    return named and _LEFT_OUT.match(name) is None and not name.endswith((".py", *_PICKLES))


def _files_of_modules(modules: Path) -> list[Path]:
    try:
        listed = json.loads(modules.read_text(encoding="utf-8"))
        names = [entry["path"] for entry in listed]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CorruptFileError(f"{modules} should list modules and their paths, but does not ({error}).") from error
    folders = [modules.parent / name for name in names if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)]
    return [
        path
        for folder in folders
        if folder.is_dir() and not folder.is_symlink()
        for path in folder.iterdir()
        if path.is_file() and (_belongs(path.name) or path.suffix == ".safetensors")
    ]


def _copy_side_file(source: Path, target: Path) -> None:
    """Copy a file; from a config, leave out what names programs that come with the checkpoint."""
    target.parent.mkdir(exist_ok=True)
    if source.name.endswith("config.json"):
        config = _read_any_json(source)  # sentence-transformers keeps lists in files of such names
        if isinstance(config, dict) and config.pop("auto_map", None) is not None:
            target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            return
    shutil.copyfile(source, target)


def _check_target(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise FileExistsError(
            f"target is a folder to be made, or an empty one, but {target} is not empty. Name another."
        )


@contextlib.contextmanager
def _appearing_whole(target: Path, needed: int) -> Iterator[Path]:
    """Give a hidden folder beside `target` that takes its place at the end, or vanishes if anything goes wrong."""
    folder = target.with_name(f".{target.name}.partial")
    made = [parent for parent in target.parents if not parent.exists()]
    claim = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            claim = _claimed(folder)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise RemosError(
                    f"{target} needs {needed:,} bytes, but its disk has {free:,} free. Free some, or name another "
                    "target."
                )
            yield folder
            _check_target(target)
            folder.replace(target)
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise
            raise RemosError(
                f"{target} could not be written ({error}). Nothing was left there; free space on its disk or name "
                "another target, and slice again."
            ) from error
    except BaseException:
        if claim is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    finally:
        if claim is not None and fcntl is not None:
            os.close(claim)


def _claimed(folder: Path) -> int:
    """Make or empty a folder that no other process is writing to; a killed process leaves its claim with its life."""
    taken = FileExistsError(
        f"{folder} is there, and another process is writing to it. Wait for it or name another target."
    )
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a link. Remove it: the student is written there before it is renamed.")
    folder.mkdir(exist_ok=True)
    claim = 0
    if fcntl is not None:
        claim = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(claim), folder.stat()):  # renamed to its target between the two calls
                raise taken
        except OSError as error:
            os.close(claim)
            raise taken from error
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return claim
