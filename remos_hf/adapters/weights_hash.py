"""What ties a measurement to weights: one hash of a model and of the checkpoint that is saved from it."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from remos_hf.adapters.teacher_files import FLOATING, Checkpoint, StoredTensor, cut_short
from remos_hf.errors import UnsupportedModelError

try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:  # transformers 4 saves weights under the names and in the shapes that they have in memory

    def revert_weight_conversion(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give the weights as they are."""
        return state_dict


_PIECE = 2**24
_WHOLE_NUMBERS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
# As safetensors names them.
_NAMES = {**{dtype: name for name, dtype in FLOATING.items()}, **_WHOLE_NUMBERS}


def hash_of_model(model: nn.Module) -> str:
    """Hash all weights and persistent buffers of a model, as they would be saved.

    The hash is over the set of the tensors' dtypes, shapes and bytes. Names are left out, and a tensor that occurs
    twice counts once, since saving drops one of two tied names: whether two equal shapes were exchanged is not seen.

    Args:
        model: The model; on any device, not wrapped.

    Returns:
        SHA-256 in hex, equal to `hash_of_folder` of the checkpoint saved from it.
    """
    state = dict(model.state_dict())
    if isinstance(model, PreTrainedModel):
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = dict(revert_weight_conversion(model, state))
    return _hash_of_set(_digest_of(tensor) for tensor in state.values())


def hash_of_folder(folder: str | Path) -> str | None:
    """Hash the weights of a checkpoint, read piece by piece.

    Args:
        folder: Where `model.safetensors` lies, or the index and its shards.

    Returns:
        SHA-256 in hex, equal to `hash_of_model` of the model that was saved; None if neither file is there, or if a
        tensor is of a type that we do not know (quantised weights).

    Raises:
        CorruptFileError: A file is truncated, missing, or not what the index says.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return None
    try:
        stored = Checkpoint.in_folder(folder).tensors
    except UnsupportedModelError:
        return None
    return _hash_of_set(map(_digest_of_stored, stored.values()))


def _hash_of_set(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(set(digests)))).hexdigest()


def _header(dtype: str, shape: torch.Size) -> bytes:
    return f"{dtype}|{tuple(shape)}|".encode()


def _digest_of(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(_header(_NAMES.get(tensor.dtype, str(tensor.dtype)), tensor.shape))
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.digest()


def _digest_of_stored(tensor: StoredTensor) -> bytes:
    digest = hashlib.sha256(_header(tensor.dtype, tensor.shape))
    left = tensor.stop - tensor.start
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise cut_short(tensor.path)
            digest.update(piece)
            left -= len(piece)
    return digest.digest()
