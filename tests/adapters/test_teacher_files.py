import json

import pytest
import torch
from safetensors.torch import save_file

from remos_hf.adapters.teacher_files import Checkpoint, check_inside, check_links, read_header, read_json
from remos_hf.errors import CorruptFileError, UnsupportedModelError
from tests import tiny


def test_a_checkpoint_gives_each_tensor_as_it_was_saved(tmp_path):
    model = tiny.gpt2().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    checkpoint = Checkpoint.in_folder(tmp_path)
    assert len(checkpoint.paths) > 1 and checkpoint.index is not None
    held = model.state_dict()
    assert all(torch.equal(one.read(), held[name]) for name, one in checkpoint.tensors.items())
    assert sum(len(checkpoint.tensors_in(path)) for path in checkpoint.paths) == len(checkpoint.tensors)
    checkpoint.check_unchanged()
    checkpoint.paths[0].touch()
    with pytest.raises(CorruptFileError, match="changed"):
        checkpoint.check_unchanged()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_types_that_no_weight_has_are_refused_by_name(tmp_path, dtype):
    save_file({"some.tensor": torch.zeros(4).to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"'some\.tensor'.*dtype is"):
        read_header(tmp_path / "x.safetensors")


def test_whole_numbers_are_left_to_who_knows_what_they_are_for(tmp_path):
    save_file({"counter": torch.zeros(4, dtype=torch.int64)}, tmp_path / "x.safetensors")
    assert [tensor.dtype for tensor in read_header(tmp_path / "x.safetensors")] == ["I64"]


def test_links_are_followed_in_the_hubs_cache_alone(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    plain = tmp_path / "plain" / "models" / "teacher"
    for folder in (snapshot, blobs, plain, tmp_path / "plain" / "blobs"):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (tmp_path / "plain" / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / "1")
    (plain / "config.json").symlink_to(tmp_path / "plain" / "blobs" / "1")
    check_links(snapshot)
    with pytest.raises(CorruptFileError, match="outside the checkpoint"):
        check_links(plain)  # a folder of that name is not the cache
    (snapshot / "vocab.txt").symlink_to(tmp_path / "plain" / "blobs" / "1")
    with pytest.raises(CorruptFileError, match=r"vocab\.txt"):
        check_inside(snapshot / "vocab.txt", snapshot)
    (snapshot / "vocab.txt").unlink()
    (snapshot / "runs").symlink_to(tmp_path)  # never read
    check_links(snapshot)


@pytest.mark.parametrize(
    ("content", "says"),
    [("[1]", "is a list"), ("{", "should be JSON"), ('{"a": 1, "a": 2}', "twice"), ("[" * 100_000, "should be JSON")],
)
def test_json_that_says_nothing_sure_is_refused(tmp_path, content, says):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CorruptFileError, match=says):
        read_json(tmp_path / "x.json")


def test_a_repeat_after_many_names_is_found_at_once(tmp_path):
    names = [*range(200_000), 199_999]  # comparing each with each would take many minutes
    (tmp_path / "x.json").write_text("{" + ", ".join(f'"{name}": 0' for name in names) + "}")
    with pytest.raises(CorruptFileError, match="it names '199999' twice"):
        read_json(tmp_path / "x.json")


def test_a_sparse_file_is_not_read_into_memory(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(CorruptFileError, match="larger than"):
        read_json(tmp_path / "x.json")


def test_an_index_without_metadata_is_refused_as_transformers_needs_it(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="metadata"):
        Checkpoint.in_folder(tmp_path)
