from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from remos_hf.adapters import timm_weights
from remos_hf.adapters.timm_weights import checked_file, weights_file
from remos_hf.errors import CorruptFileError, UnsupportedModelError


def known_as(repository, file=None):
    return lambda _: SimpleNamespace(hf_hub_id=repository, hf_hub_filename=file, url="https://example.org/net.pth")


@pytest.mark.parametrize(
    ("name", "config", "asked"),
    [
        ("hf-hub:owner/name@v1", None, ("owner/name", "model.safetensors", "v1")),
        ("net", known_as("owner/net"), ("owner/net", "model.safetensors", None)),
        ("net", known_as("owner/net@v2", "special.bin"), ("owner/net", "special.safetensors", "v2")),
    ],
)
def test_only_safetensors_are_asked_for(name, config, asked, monkeypatch, tmp_path):
    seen = []

    def download(repository, file, revision):
        seen.append((repository, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(timm_weights, "hf_hub_download", download)
    assert weights_file(name, config).suffix == ".safetensors"
    assert seen == [asked]


def test_the_second_name_is_tried_and_then_the_repository_is_refused(monkeypatch):
    seen = []

    def download(repository, file, revision):
        seen.append(file)
        raise EntryNotFoundError("no")

    monkeypatch.setattr(timm_weights, "hf_hub_download", download)
    with pytest.raises(UnsupportedModelError, match="the repository owner/name holds none of"):
        weights_file("hf-hub:owner/name", None)
    assert seen == ["model.safetensors", "open_clip_model.safetensors"]


def test_without_a_network_nothing_is_said_of_the_repository(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(timm_weights, "hf_hub_download", download)
    with pytest.raises(LocalEntryNotFoundError):
        weights_file("hf-hub:owner/name", None)


def test_an_id_that_only_has_a_pickle_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"timm knows it only at https://example.org/net.pth"):
        weights_file("net", known_as(None))


def test_a_folder_gives_its_own_file_or_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UnsupportedModelError, match="holds none of model.safetensors"):
        weights_file(f"local-dir:{tmp_path}", None)
    save_file({"x": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    assert weights_file(f"local-dir:{tmp_path}", None).name == "open_clip_model.safetensors"


def test_a_file_is_looked_at_before_it_is_handed_on(tmp_path):
    good, broken = tmp_path / "good.safetensors", tmp_path / "broken.safetensors"
    save_file({"x": torch.ones(1)}, good)
    broken.write_bytes(b"no")
    assert checked_file(good) == good
    for path, error in (
        (tmp_path / "net.pth", UnsupportedModelError),
        (tmp_path / "none.safetensors", FileNotFoundError),
        (broken, CorruptFileError),
    ):
        with pytest.raises(error):
            checked_file(path)
