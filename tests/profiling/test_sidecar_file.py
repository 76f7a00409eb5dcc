import os

import pytest
import torch
from safetensors.torch import save_file

from remos_hf.errors import CorruptFileError
from remos_hf.profiling import sidecar_file

KIND = "test/1"


@pytest.fixture
def path(tmp_path):
    return sidecar_file.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(5)}, KIND, {"n": 5})


def test_what_is_written_is_read(path):
    tensors, metadata = sidecar_file.read_tensors(path, KIND, ["n"])
    assert torch.equal(tensors["x"], torch.arange(5))
    assert metadata == {"n": 5}


def test_one_element_of_a_larger_tensor_is_written(tmp_path):
    column = torch.arange(6).reshape(1, 6)[:, 2:3].T[:, :1]
    strided = torch.arange(8).as_strided((1,), (4,))
    path = sidecar_file.write_tensors(tmp_path / "a", {"x": column, "y": strided}, KIND, {})
    tensors, _ = sidecar_file.read_tensors(path, KIND, [])
    assert tensors["x"].tolist() == [[2]] and tensors["y"].tolist() == [0]


def test_metadata_keep_their_order(tmp_path):
    path = sidecar_file.write_tensors(tmp_path / "a", {}, KIND, {"b": {"10": 0, "2": 1, "1": 2}})
    assert list(sidecar_file.read_tensors(path, KIND, ["b"])[1]["b"]) == ["10", "2", "1"]


def test_the_same_content_makes_the_same_file(tmp_path):
    files = {
        sidecar_file.write_tensors(tmp_path / "a", {"ü": torch.ones(3)}, KIND, {"n": 5}).read_bytes() for _ in range(9)
    }
    assert len(files) == 1


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_refused_by_name(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFileError, match="a.safetensors"):
        sidecar_file.read_tensors(path, KIND, ["n"])


def test_one_changed_byte_is_noticed(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="checksum"):
        sidecar_file.read_tensors(path, KIND, ["n"])


def test_changed_metadata_is_noticed(path):
    content = path.read_bytes()
    assert b'{\\"n\\": 5}' in content
    path.write_bytes(content.replace(b'{\\"n\\": 5}', b'{\\"n\\": 6}'))
    with pytest.raises(CorruptFileError, match="checksum"):
        sidecar_file.read_tensors(path, KIND, ["n"])


def test_another_kind_of_safetensors_is_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptFileError, match="should have the format test/1"):
        sidecar_file.read_tensors(tmp_path / "model.safetensors", KIND, ["n"])


def test_a_whole_file_with_other_fields_or_no_axes_is_refused(path):
    with pytest.raises(CorruptFileError, match=r"should say \['m'\], but says \['n'\]"):
        sidecar_file.read_tensors(path, KIND, ["m"])
    save_file({"x": torch.tensor(3)}, path, metadata={"format": KIND, "metadata": "{}", "checksum": ""})
    with pytest.raises(CorruptFileError, match="checksum"):
        sidecar_file.read_tensors(path, KIND, [])


def test_a_missing_file_says_who_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="RemosTrainer"):
        sidecar_file.read_tensors(tmp_path / "none.safetensors", KIND, ["n"])


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file_whole_and_nothing_else(path, monkeypatch, moment):
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    owner = os if moment == "fsync" else type(path)
    monkeypatch.setattr(owner, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        sidecar_file.write_tensors(path, {"x": torch.zeros(9)}, KIND, {})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
