import json
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


# --- files that others made ---


def rewritten(path, change):
    """Change a file's header, as text, and leave its tensors as they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = change(content[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "null",
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: '{"a":' * 100_000,
        lambda text: json.dumps({**json.loads(text), "__metadata__": None}),
        lambda text: json.dumps({**json.loads(text), "__metadata__": {"format": KIND, "metadata": 3, "checksum": ""}}),
        lambda text: json.dumps({**json.loads(text), "__metadata__": {"format": KIND}}),
        lambda text: json.dumps({**json.loads(text), "y": None}),
        lambda text: json.dumps({**json.loads(text), "y": {"data_offsets": 3}}),
        lambda text: text.replace("[0,40]", "[0,1e400]"),
        lambda text: text.replace("[0,40]", "[0,99999999999999999999]"),
        lambda text: text.replace("[0,40]", "[-40,40]"),
        lambda text: text.replace('"I64"', '"I65"'),
        lambda text: text.replace("[5]", "[-5]"),
        lambda text: text.replace('"x":', '"x":{"dtype":"I64","shape":[5],"data_offsets":[0,40]},"x":'),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_name(path, change):
    rewritten(path, change)
    with pytest.raises(CorruptFileError, match="a.safetensors"):
        sidecar_file.read_tensors(path, KIND, ["n"])


@pytest.mark.parametrize("text", ["NaN", "1e400", "-Infinity", "[" * 100_000, '{"n": 1, "n": 2}', "9" * 5000, "{"])
def test_metadata_that_are_no_strict_json_are_refused_though_the_checksum_is_right(tmp_path, monkeypatch, text):
    monkeypatch.setattr(json, "dumps", lambda value, real=json.dumps, **how: real(value, **how) if how else text)
    path = sidecar_file.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(5)}, KIND, {})
    monkeypatch.undo()
    with pytest.raises(CorruptFileError, match="a.safetensors"):
        sidecar_file.read_tensors(path, KIND, ["n"])


def test_numbers_that_are_not_finite_are_read_only_where_they_may_stand(tmp_path):
    path = sidecar_file.write_tensors(tmp_path / "a.safetensors", {}, KIND, {"n": float("-inf")})
    with pytest.raises(CorruptFileError, match="-Infinity is no number"):
        sidecar_file.read_tensors(path, KIND, ["n"])
    assert sidecar_file.read_tensors(path, KIND, ["n"], finite=False)[1] == {"n": float("-inf")}


def test_what_a_file_claims_to_hold_is_compared_with_its_size_before_anything_is_read(path):
    rewritten(path, lambda text: text.replace("[5]", f"[{2**40}]").replace("[0,40]", f"[0,{2**43}]"))
    with pytest.raises(CorruptFileError, match="should hold 8,796,093,022,208 bytes of tensors, but holds 40"):
        sidecar_file.read_tensors(path, KIND, ["n"])


def test_a_large_file_that_is_mostly_a_hole_is_refused_at_once(path):
    size = 2**33
    rewritten(path, lambda text: text.replace("[5]", f"[{size // 8}]").replace("[0,40]", f"[0,{size}]"))
    start = path.stat().st_size - 40
    os.truncate(path, start + size)
    with pytest.raises(CorruptFileError, match="most of it was never written"):
        sidecar_file.read_tensors(path, KIND, ["n"])


def test_optional_fields_may_be_missing_and_no_others_may_be_there(path):
    assert sidecar_file.read_tensors(path, KIND, ["n"], optional=["m"])[1] == {"n": 5}
    assert sidecar_file.read_tensors(path, KIND, [], optional=["n", "m"])[1] == {"n": 5}
    with pytest.raises(CorruptFileError, match="should say"):
        sidecar_file.read_tensors(path, KIND, [], optional=["m"])


def test_a_field_that_is_not_what_it_should_be_is_named_with_its_value(path):
    expected = {"n": ("a whole number", sidecar_file.is_count), "m": ("a hash", sidecar_file.is_hash)}
    sidecar_file.check_fields(path, {"n": 5, "other": None}, expected)
    for value in (True, -1, 1.0, 2**53 + 1, "5", None, [5]):
        with pytest.raises(CorruptFileError, match=r"a.safetensors should say a whole number for n, but says"):
            sidecar_file.check_fields(path, {"n": value}, expected)
    with pytest.raises(CorruptFileError, match=r"xxx\.\.\."):
        sidecar_file.check_fields(path, {"m": "x" * 10_000}, expected)
    assert all(sidecar_file.is_hash(value) for value in ("", "0f" * 32))
    assert not any(sidecar_file.is_hash(value) for value in (None, 0, False, "0f", "0F" * 32, "0f" * 32 + "\n"))
